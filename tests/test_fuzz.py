"""Damaged files of every kind, each through what the commands read it by.

``python -m tests.fuzz WORK --cases 1000`` tries thousands.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests import fuzz
from tests.fuzz import Kind, try_kind
from tests.fuzz_kinds import make_kinds

CASES = 3  # per kind


def test_damaged_files_end_in_a_clear_error_or_the_right_result(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    kinds = make_kinds(tmp_path)
    assert len(kinds) == 30
    found = [try_kind(name, kind, 0, range(CASES), tmp_path) for name, kind in kinds.items()]
    assert [line for _, bad in found for line in bad] == []
    assert sum(counts.total() for counts, _ in found) == CASES * len(kinds)


def raise_two_lines(path: Path) -> None:
    raise ValueError(f"{path}\nis damaged")


def allocate(path: Path) -> None:
    try:
        np.zeros(1 << 40, np.uint8)
    except MemoryError as error:
        raise ValueError(f"{path} is damaged") from error


# what a reader does with a damaged file -> what the harness calls it
CARELESS = {
    "traceback": lambda path: {}["x"],
    "unclear": raise_two_lines,
    "allocation": allocate,
    "wrong": lambda path: path.read_bytes(),
    "hang": lambda path: time.sleep(60),
    "crash": lambda path: os.kill(os.getpid(), signal.SIGKILL),
}


@pytest.mark.parametrize("verdict", CARELESS)
def test_the_harness_finds_careless_readers(tmp_path, monkeypatch, verdict):
    monkeypatch.setattr(fuzz, "SECONDS", 0.3)
    folder = tmp_path / "whole"
    folder.mkdir()
    (folder / "file").write_bytes(bytes(range(64)))

    def read(copy: Path) -> object:
        path = copy / "file"
        return 0 if path.read_bytes() == bytes(range(64)) else CARELESS[verdict](path)

    counts, bad = try_kind("x", Kind(folder, read, ("file",)), 0, range(2), tmp_path)
    assert counts == {verdict: 2} and len(bad) == 2
