"""One run per folder: others are told who holds it, a dead holder is taken over."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.helpers import hold_in_fork
from utils import lock
from utils.distributed import World
from utils.files import atomic_path, remove_temporary, temporary_path
from utils.lock import hold, release_all
from utils.processes import has_ended, machine

ALONE = World(0, 1, torch.device("cpu"))


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@pytest.fixture(autouse=True)
def free():
    yield
    release_all(delete=True)


def test_a_second_run_is_told_who_holds_the_folder(tmp_path):
    pid = hold_in_fork(tmp_path / ".lock")
    started = time.monotonic()
    with pytest.raises(ValueError, match=f"folder is in use by another run: process {pid} on .*20"):
        hold(tmp_path / ".lock", ALONE, "folder")
    assert time.monotonic() - started < 1 and not has_ended(pid)
    end(pid)
    hold(tmp_path / ".lock", ALONE, "folder")  # a killed holder is taken over at once
    hold(tmp_path / ".lock", ALONE, "folder")  # a run may ask twice
    assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()
    release_all(delete=True)
    assert not (tmp_path / ".lock").exists()


def test_the_rest_of_a_killed_run_is_waited_for(tmp_path):
    """Rank 0 is dead, a process of its run still holds the lock for a second."""
    pid = hold_in_fork(tmp_path / ".lock", children=1)
    end(pid)
    started = time.monotonic()
    hold(tmp_path / ".lock", ALONE, "folder")
    assert 0.5 < time.monotonic() - started < 10


def test_waiting_for_a_killed_run_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.3)
    end(hold_in_fork(tmp_path / ".lock", children=1))
    with pytest.raises(ValueError, match="folder is in use by another run"):
        hold(tmp_path / ".lock", ALONE, "folder")
    time.sleep(1.5)


def test_temporary_files_of_the_dead_are_removed_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a[1].json"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    ours, foreign = temporary_path(path), path.with_name(f"{path.name}.tmp-1-00000000-00000000")
    monkeypatch.setattr(os, "getpid", lambda: dead.pid)
    theirs = temporary_path(path)
    monkeypatch.undo()
    for leftover in (ours, theirs, foreign):
        leftover.touch()
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
    assert sorted(tmp_path.iterdir()) == sorted([path, ours, foreign])
    remove_temporary(path)  # by the only writer of all machines
    assert sorted(tmp_path.iterdir()) == sorted([path, ours])


def test_the_dead_are_told_from_the_living():
    child = subprocess.Popen([sys.executable, "-c", ""])
    while not has_ended(child.pid):  # a zombie, as nobody has asked for its status
        time.sleep(0.01)
    child.wait()
    assert not has_ended(os.getpid()) and has_ended(child.pid) and machine()


def test_a_link_in_place_of_a_lock_is_not_followed(tmp_path):
    """A folder from elsewhere may hold one: the file that it led to was emptied."""
    (tmp_path / "thesis.tex").write_text("all of it")
    (tmp_path / ".lock").symlink_to(tmp_path / "thesis.tex")
    with pytest.raises(ValueError, match=r"folder cannot be locked: .*\.lock: "):
        hold(tmp_path / ".lock", ALONE, "folder")
    assert (tmp_path / "thesis.tex").read_text() == "all of it"
