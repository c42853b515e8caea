"""One check that goes wrong stops no other; exit status and files of the doctor."""

import json
import os
import signal
import sys
import time
from argparse import Namespace

import pytest

from scripts.diagnosis import examination
from scripts.diagnosis.check import BROKEN, LEFT_OUT, OK, SLOW, Check, Context, Result
from scripts.diagnosis.examination import examine, report_prefix, run_checks
from scripts.diagnosis.report import advice, as_text
from tests.scripts.diagnosis.helpers import HINT, NO_FILES, all_is_well, context


def all_is_slow(_: Context) -> Result:
    return Result(SLOW, "slow")


def raises(_: Context) -> Result:
    print("what led to it")
    raise RuntimeError("first line\nsecond line")


def crashes(_: Context) -> Result:
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(_: Context) -> Result:
    time.sleep(60)


def leaves(_: Context) -> Result:
    sys.exit(3)


def tells_what_came_before(now: Context) -> Result:
    return Result(OK, json.dumps(now.earlier))


def test_a_check_that_goes_wrong_stops_no_other():
    """Raised, crashed, hung, left: each is a broken line with a reason; the next check runs."""
    functions = [all_is_well, raises, crashes, hangs, leaves, tells_what_came_before]
    checks = [Check("group", f.__name__, f, HINT, limit=1 if f is hangs else 30) for f in functions]
    rows = run_checks(checks, context(), time.monotonic() + 120)
    found = {check.name: result for check, result in rows}
    assert [r.status for r in found.values()] == [OK, BROKEN, BROKEN, BROKEN, BROKEN, OK]
    assert found["raises"].detail == "RuntimeError: first line"
    assert "what led to it" in found["raises"].log and "in raises" in found["raises"].log
    assert found["crashes"].detail == "its process died (SIGSEGV)"
    assert found["hangs"].detail == "did not end within 1 s"
    assert found["leaves"].detail == "SystemExit: 3"
    assert json.loads(found["tells_what_came_before"].detail)["all_is_well"] == {"seconds": 2.0}
    assert len(advice(rows)) == 4 and all(HINT[1:] in sentence for sentence in advice(rows))
    assert "4 broken" in as_text(rows)


def test_what_there_is_no_time_for_is_left_out():
    checks = [
        Check("group", "late", all_is_well, HINT),
        Check("group", "long", all_is_well, HINT, thorough=True),
    ]
    rows = run_checks(checks, context(), time.monotonic())
    assert [result.status for _, result in rows] == [LEFT_OUT, LEFT_OUT]
    assert "--minutes" in rows[0][1].advice and rows[1][1].detail == "left out by --quick"


@pytest.mark.parametrize(
    "functions, status", [([all_is_well, all_is_slow], 0), ([raises, all_is_well], 1)]
)
def test_exit_status_and_files(monkeypatch, tmp_path, capsys, functions, status):
    """Slow is no failure, broken is one; both files hold every line of the table."""
    checks = [Check("group", f.__name__, f, HINT) for f in functions]
    monkeypatch.setattr(examination, "list_checks", lambda options, devices: checks)
    monkeypatch.setattr(examination, "prepare_environment", lambda: None)
    options = Namespace(
        **NO_FILES, quick=True, minutes=None, output=f"{tmp_path}/", gpt_model="GPT-T"
    )
    options.ar_token_num = options.batch = None
    assert examine(options) is (status == 0)
    text, report = capsys.readouterr().out, json.loads((tmp_path / "doctor.json").read_text())
    markdown = (tmp_path / "doctor.md").read_text()
    assert report["broken"] is (status == 1)
    assert {"Processor", "Memory", "Torch", "C++ compiler", "Code"} <= report["machine"].keys()
    for result in report["results"]:
        assert f"| {result['name']} (cpu) | {result['detail']} |" in markdown
        assert f"{result['name']} (cpu): {result['detail']}" in text
    assert str(tmp_path / "doctor.md") in text


def test_where_the_report_goes(tmp_path):
    assert report_prefix(str(tmp_path)) == tmp_path / "doctor"
    assert report_prefix(f"{tmp_path}/new/") == tmp_path / "new" / "doctor"
    assert (
        report_prefix(f"{tmp_path}/mine")
        == report_prefix(f"{tmp_path}/mine.json")
        == tmp_path / "mine"
    )
    assert report_prefix(f"{tmp_path}/main.v2") == tmp_path / "main.v2"
