"""The harness that kills whole runs finds what is wrong, and kills all that it starts.

``python -m tests.kill_table WORK`` tries every stage.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tests.crash_points import Stage
from tests.helpers import family, kill, run_command, start
from tests.kill_table import Trial, kills
from utils.files import write_json


def append() -> None:
    """Add to a file, slowly: what a killed run has written stays."""
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    for i in range(50):
        with open(folder / "a.txt", "a") as f:
            f.write(f"{i}\n")
        time.sleep(0.002)


def replace() -> None:
    """Write files whole or not at all."""
    for i in range(50):
        write_json(Path(sys.argv[1]) / f"{i}.json", i)
        time.sleep(0.002)


@pytest.mark.parametrize("main, sound", [(append, False), (replace, True)])
def test_kills_at_random_moments_tell_careless_writers_from_others(tmp_path, main, sound):
    trial = Trial("convert", Stage(main, lambda folder: (folder,)), tmp_path, seed=0)
    result = kills(trial, 4)
    assert result.tried == 4 and result.compared > 0
    assert bool(result.wrong) is not sound, result.wrong


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_what_is_killed_has_no_living_children(tmp_path):
    """torchrun starts ranks in sessions of their own, which a signal to its group spares."""
    process = start(["bash", "-c", f"setsid sleep 300 & touch {tmp_path}/there; sleep 300"])
    while not (tmp_path / "there").exists() or len(family(process)) < 2:
        time.sleep(0.01)
    kill(process)
    assert not family(process)


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="mounts disks")
def test_a_disturbed_stage_ends_the_same(tmp_path):
    table = run_command(
        sys.executable, "-m", "tests.kill_table", tmp_path, "evaluate", "--kills", 1, check=False
    )
    assert table.returncode == 0, table.stdout + table.stderr
    assert table.stdout.count("| all |") == 6
