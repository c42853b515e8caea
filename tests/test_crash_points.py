"""Killed right before a file operation, and run again: the same bytes, and nothing left over.

``python -m tests.crash_points WORK`` tries every operation of every stage.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import pytest
import torch

from scripts import convert_codes
from tests.crash_points import Stage, contents, run, try_points
from tests.helpers import run_command, small_state
from utils.distributed import World
from utils.files import write_json
from utils.training.run_folder import RunFolder


def convert(tmp_path: Path) -> Stage:
    rows = (f'{{"class_id": {i % 3}, "tokens": {[i] * 16}}}\n' for i in range(9))
    (tmp_path / "old.jsonl").write_text("".join(rows))
    return Stage(
        convert_codes.main,
        lambda folder: (
            "--code-path", tmp_path / "old.jsonl", "--output", folder, "--codebook-size", 64,
            "--shard-size", 2,
        ),
    )  # fmt: skip


def keep_checkpoints() -> None:
    """Save, mirror, prune and export as a run does whose steps set the weights."""
    places = dict(results_dir=f"{sys.argv[1]}/local", cloud_save_path=f"{sys.argv[1]}/cloud")
    args = argparse.Namespace(**places, no_local_save=False, keep_last=1, keep_every=0)
    folder = RunFolder.of(args, World(0, 1, torch.device("cpu")), "run")
    folder.hold()
    state = small_state(0.0)
    first = folder.resume(state, {})
    folder.make()
    for step in range(first + 1, 4):
        state.model.weight.data.fill_(step)
        folder.save(step, state, {"run": {}})
    folder.finish(3, False, "pt", logging.getLogger("test"))


def write_carelessly() -> None:
    """Read what is in the folder, whatever it is, and write in place."""
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    write_json(folder / "a.json", len(list(folder.iterdir())))
    with open(folder / "b.json", "a") as f:
        f.write("1")


def test_killed_at_file_operations_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.training.run_folder.git_revision", lambda: "")
    small_state(0.0)  # torch imports its compiler: once, instead of in every fork
    total, tried, wrong = try_points(convert(tmp_path), tmp_path, points=4)
    assert not wrong and tried == 4 and total > 40
    checkpoints = Stage(keep_checkpoints, lambda folder: (folder,))
    total, tried, wrong = try_points(checkpoints, tmp_path, points=8)
    assert not wrong and tried == 8 and total > 60


def test_the_harness_finds_careless_writers_and_counts_every_operation(tmp_path):
    """mkdir, a.json created, written and renamed, b.json created and written."""
    careless = Stage(write_carelessly, lambda folder: (folder,))
    total, _, wrong = try_points(careless, tmp_path)
    operations = (tmp_path / "ledger").read_bytes().split()[::2]
    assert operations[:4] == [b"os.mkdir", b"open", b"write", b"os.rename"]
    assert total == 8
    assert any("differs: a.json" in w for w in wrong), wrong


def test_both_processes_are_killed(tmp_path):
    def two() -> None:
        keep = Path(sys.argv[1]) / torch.distributed.__name__
        keep.parent.mkdir(exist_ok=True)
        for _ in range(100):
            write_json(keep, 1)

    stage = Stage(two, lambda folder: (folder,))
    assert run(stage, tmp_path / "out", 2, tmp_path / "ledger", 40) & 0x7F == 9
    # of 600; the other process may have done some before the signal reached it
    assert (tmp_path / "ledger").stat().st_size // 151 < 200
    assert contents(tmp_path / "out")


@pytest.mark.slow
def test_killed_stages_end_the_same(tmp_path):
    """In a process that has computed nothing yet, as its forks train."""
    tried = run_command(
        sys.executable, "-m", "tests.crash_points", tmp_path, "reconstruct", "ddp", "--points", 6
    ).stdout
    assert tried.count("| 6 | 0 |") == 2
