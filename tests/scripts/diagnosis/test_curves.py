"""Curves of training runs: each mistake that was made for real is recognised, and nothing else."""

import json

import pytest

from scripts import doctor
from scripts.diagnosis.curves import judge, read_curves
from scripts.experiments.mistakes import CURVES, MISTAKES
from tests.helpers import quietly


def run_folder(tmp_path, lines):
    (tmp_path / "options.json").write_text(json.dumps({"options": {"vocab_size": 256}}))
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def stored(name):
    text = (CURVES / f"{name.replace(' ', '-')}.jsonl").read_text()
    options, *lines = map(json.loads, text.splitlines())
    assert options == {"vocab_size": 256}
    return lines


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_recognised(tmp_path, name):
    verdicts = judge(read_curves(run_folder(tmp_path, stored(name))))
    assert [verdict.name for verdict in verdicts] == [name]
    assert verdicts[0].evidence and (name == "healthy") == (verdicts[0].advice == "")


@pytest.mark.parametrize("name", ["healthy", "learning rate too high", "wrong codes"])
def test_a_run_without_held_out_codes_is_judged_by_its_loss(tmp_path, name):
    lines = [line for line in stored(name) if "loss" in line]
    assert [v.name for v in judge(read_curves(run_folder(tmp_path, lines)))] == [name]


def test_a_resumed_run_counts_each_step_once_and_a_torn_line_not(tmp_path):
    lines = stored("healthy")
    folder = run_folder(tmp_path, lines[:30] + lines[20:])
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('\n{"step": 99999, "loss": 3.')
    assert read_curves(folder) == read_curves(run_folder(folder, lines))


def test_the_doctor_reads_a_run(tmp_path, capfd, monkeypatch):
    folder = run_folder(tmp_path, stored("overfitting"))
    said = quietly(capfd, monkeypatch, "--run", folder, main=doctor.main)
    assert "resembles: overfitting (held-out loss" in said and "ln V = 5.55" in said
    assert not (tmp_path / "results").exists()
    said = quietly(capfd, monkeypatch, "--run", tmp_path / "nothing", main=doctor.main)
    assert said.startswith("error: --run:") and "metrics.jsonl does not exist" in said
    (folder / "metrics.jsonl").write_text('{"step": 1}\n[1]\n')
    said = quietly(capfd, monkeypatch, "--run", folder, main=doctor.main)
    assert said.startswith("error: --run:")
    assert [v.name for v in judge(read_curves(run_folder(folder, [{"step": 9, "loss": 4.0}])))] == [
        "too short"
    ]
