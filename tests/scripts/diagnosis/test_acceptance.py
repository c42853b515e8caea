"""The acceptance run of a GPU, rehearsed: it keeps what it has, whatever one of its parts does."""

import json
import math
import os
import signal
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from scripts.diagnosis import acceptance
from scripts.diagnosis.acceptance import GPU, REHEARSAL, Job, Part, accept, list_parts
from scripts.diagnosis.acceptance_tables import add_ratios, sampling_table
from scripts.diagnosis.check import run_here

CASES = tuple({"case": i} for i in range(3))


def measures(case, job):
    assert job.work.is_dir() and job.until > time.monotonic()
    return {"figure": 2.0 * case["case"]}


def fails_once(case, job):
    if case["case"] == 1:
        raise RuntimeError("out of order\nat length")
    return {"figure": 1.0}


def crashes(case, job):
    if case["case"] == 2:
        os.kill(os.getpid(), signal.SIGSEGV)
    return {"figure": 1.0}


def hangs(case, job):
    time.sleep(60 if case["case"] == 1 else 0)
    return {"figure": 1.0}


def options(tmp_path, **changes):
    given = dict(acceptance="rehearsal", output=str(tmp_path / "results"), minutes=None)
    return Namespace(**given | changes)


def rows_of(tmp_path: Path, table: str) -> list[dict]:
    record = json.loads((tmp_path / "results" / f"gpu-{table}.json").read_text())
    assert record.keys() == {"options", "results", "device", "threads", "git", "code"}
    for row in record["results"]:
        assert row.pop("took") >= 0
        assert row.pop("log", "Traceback").startswith("Traceback")
    return record["results"]


def use_parts(monkeypatch, *functions, seconds=20.0):
    parts = [Part(f.__name__, f.__name__, CASES, f, seconds) for f in functions]
    monkeypatch.setattr(acceptance, "list_parts", lambda sizes: parts)
    monkeypatch.setattr(acceptance, "TABLES", ())


@pytest.mark.slow
def test_a_part_that_goes_wrong_stops_no_other_and_keeps_its_figures(monkeypatch, tmp_path, capsys):
    """A case raises, a process dies; the rest is measured, and again only what is missing."""
    use_parts(monkeypatch, fails_once, crashes, measures)
    assert not accept(options(tmp_path))
    text = capsys.readouterr().out
    assert rows_of(tmp_path, "fails_once") == [
        {"case": 0, "figure": 1.0},
        {"case": 1, "error": "RuntimeError: out of order"},
        {"case": 2, "figure": 1.0},
    ]
    assert rows_of(tmp_path, "crashes") == [{"case": i, "figure": 1.0} for i in (0, 1)]
    assert [row["figure"] for row in rows_of(tmp_path, "measures")] == [0.0, 2.0, 4.0]
    assert "failed: 1: RuntimeError: out of order" in text and "died (SIGSEGV)" in text

    use_parts(monkeypatch, fails_once, crashes, measures)
    assert not accept(options(tmp_path))
    text = capsys.readouterr().out
    assert "fails_once: 0 of 1 cases" in text and "crashes: 0 of 1 cases" in text
    assert "measures: all measured before" in text
    assert len(rows_of(tmp_path, "fails_once")) == 3


@pytest.mark.slow
def test_a_part_that_hangs_is_ended_in_time_for_the_next(monkeypatch, tmp_path, capsys):
    """It has its share of the minutes; what it had measured stays, and that is no failure."""
    use_parts(monkeypatch, hangs, measures)
    started = time.monotonic()
    assert accept(options(tmp_path, minutes=10 / 60))
    assert time.monotonic() - started < 30
    assert "left out: did not end within" in capsys.readouterr().out
    assert rows_of(tmp_path, "hangs") == [{"case": 0, "figure": 1.0}]
    assert len(rows_of(tmp_path, "measures")) == 3


def test_figures_of_other_code_or_another_device_are_measured_again(tmp_path):
    records = acceptance.Records(tmp_path, {"device": "a", "code": "b"})
    records.add("training", [{"case": 1}], {})
    for device, code, kept in (("a", "b", 1), ("a", "c", 0), ("b", "b", 0)):
        run = {"device": device, "code": code}
        assert len(acceptance.Records(tmp_path, run).rows("training")) == kept
    assert acceptance.hash_of_code() == acceptance.hash_of_code()


def test_the_run_on_a_gpu_is_what_was_asked_for():
    """Under nine minutes; every size, n, batch and way."""
    parts = list_parts(GPU)
    assert sum(part.seconds for part in parts) <= 60 * acceptance.ACCEPTANCE_MINUTES <= 9 * 60 - 20
    sampled = [c for part in parts for c in part.cases if part.table == "sampling"]
    assert len(sampled) == 3 * 2 * 3 * 3
    assert {c["gpt_model"] for c in sampled} == {"GPT-B", "GPT-XL", "GPT-3B"}
    assert sampled[0] == {
        "gpt_model": "GPT-3B", "n": 4, "precision": "bf16", "batch": 1, "way": "compiled",
    }  # fmt: skip
    trained = [c for part in parts for c in part.cases if part.table == "training"]
    assert {c["gpt_model"] for c in trained} == {"GPT-L", "GPT-XL", "GPT-3B"}
    assert {c["way"] for c in trained} >= {"ours, compiled, attention dropout"}
    networks = [c for part in parts for c in part.cases if part.table == "networks"]
    assert {c["network"] for c in networks} == {"VQ-16", "Inception"}


def test_less_memory_halves_the_batch(monkeypatch, tmp_path):
    seen = []

    def step(args, folder):
        seen.append(args.batch)
        if args.batch > 2:
            raise torch.OutOfMemoryError("no memory")
        return {"seconds": 0.5}

    monkeypatch.setattr(acceptance.training, "measure", step)
    monkeypatch.setattr(acceptance.training, "write_codes", lambda folder, count: None)
    case = dict(gpt_model="GPT-T", precision="none", way="ours", steps=1, batch=8)
    figures = acceptance.train(case, Job(tmp_path, math.inf))
    assert seen == [8, 4, 2] and figures["images per step"] == 2 and figures["images/s"] == 4


@pytest.mark.slow
def test_outcomes_of_tests_are_read(tmp_path):
    """Also of a run that time cut short, which the next one takes up again."""
    test = tmp_path / "test_outcomes.py"
    test.write_text(
        "import time\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n"
        "def test_long(): time.sleep(60)\n"
    )
    job = Job(tmp_path, time.monotonic() + acceptance.MARGIN + 3)
    row = acceptance.run_tests({"tests": str(test)}, job)
    assert row == {
        "passed": 1, "failed": 1, "outcomes": {"test_good": "passed", "test_bad": "failed"},
        "unfinished": True,
    }  # fmt: skip
    assert not acceptance.is_of(row | {"tests": "a"}, {"tests": "a"})
    test.write_text("def test_bad(): assert 1 == 2\n")
    row = acceptance.run_tests({"tests": str(test)}, Job(tmp_path, time.monotonic() + 60))
    assert row["failed"] == 1 and "assert 1 == 2" in row["failures"] and "unfinished" not in row
    text = "tests/a.py::test_one[{'a': 2}-True] PASSED [ 50%]\ntests/a.py::test_two "
    assert acceptance.outcomes_of(text)["outcomes"] == {"test_one[{'a': 2}-True]": "passed"}


def test_the_table_of_sampling_has_a_line_per_case():
    shape = {"gpt_model": "GPT-B", "n": 4, "batch": 1}
    rows = [shape | {"way": w, "seconds": s} for w, s in (("compiled", 0.5), ("published", 2.0))]
    add_ratios(rows)
    assert rows[0]["over published"] == 4.0 and "over published-compiled" not in rows[0]
    lines = sampling_table(rows)
    assert lines[2] == "| GPT-B | 4 | 1 | 2 |  | 0.5 | 4.00x |  |  |  |  |  |" and len(lines) == 3


@pytest.mark.slow
def test_rehearsal(monkeypatch, tmp_path, capsys):
    """All parts but the tests at the size of GPT-T; in this process, and compiling nothing."""
    parts = [part for part in list_parts(REHEARSAL) if part.table != "tests"]
    assert {part.table for part in parts} == {"sampling", "training", "networks"}
    monkeypatch.setattr(acceptance, "list_parts", lambda sizes: parts)
    monkeypatch.setattr(acceptance, "call_apart", lambda function, given, limit: function(*given))
    monkeypatch.setattr(acceptance, "run_apart", lambda check, now, left: run_here(check, now))
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *args, **named: None)
    assert accept(options(tmp_path))
    ways = {row["way"]: row for row in rows_of(tmp_path, "sampling")}
    assert ways.keys() == set(acceptance.WAYS)
    assert ways["compiled"]["over published"] > 0 and 0 < ways["compiled"]["MBU"] < 3
    assert all(0 < row["mfu"] < 3 for row in rows_of(tmp_path, "training"))
    networks = rows_of(tmp_path, "networks")
    assert networks[0]["extracted images/s"] > 0 and networks[1]["ours images/s"] > 0
    page = (tmp_path / "results" / "gpu-acceptance.md").read_text()
    assert page.partition("## ")[2].strip() in capsys.readouterr().out
    assert "| GPT-T | 64 | 1 |" in page and "Nothing was measured" in page
