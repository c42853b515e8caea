"""Several processes end in one line of ours: a mistake, a killed rank, a signal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT, run_command
from utils.options import is_first_to_say, make_parser, run_main

BEGIN = "import os, signal, time\nfrom utils.options import run_main\n"
RANKS = ("bash", "scripts/launch.sh")


def lines_of(tmp_path: Path, body: str) -> tuple[int, list[str]]:
    """Run ``main`` of that body in two processes; return exit status and lines on the screen."""
    script = tmp_path / "script.py"
    script.write_text(f"{BEGIN}def main():\n    rank = int(os.environ['RANK'])\n    {body}\n")
    with open(script, "a") as f:
        f.write("run_main(main)\n")
    done = run_command(*RANKS, script, nproc=2, check=False, PYTHONPATH=str(ROOT))
    return done.returncode, [line for line in done.stderr.splitlines() if line]


@pytest.mark.slow
def test_two_processes_end_in_one_line(tmp_path):
    status, lines = lines_of(tmp_path, "raise ValueError('--lr: -1')")
    assert status == 2 and len(lines) == 1
    assert re.fullmatch(r"error( on rank 1)?: --lr: -1", lines[0])
    waiting = "signal.pause() if rank == 0 else os.kill(os.getpid(), signal.SIGKILL)"
    status, lines = lines_of(tmp_path, waiting)
    assert status == 1 and len(lines) == 1
    assert re.match(r"error: rank 1 \(process \d+\) was killed by SIGKILL; all", lines[0])
    lost = "signal.pause() if rank else None\n    raise RuntimeError('[gloo/pair.cc] closed')"
    status, lines = lines_of(tmp_path, lost)
    assert status == 1 and lines[0] == "error: another process has ended"
    assert re.match(r"error: rank 0 \(process \d+\) ended with exit status 1, see above", lines[1])


@pytest.mark.slow
def test_a_signal_is_said_in_one_line(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"{BEGIN}open(os.environ['RANK'] + '.started', 'w').close()\ntime.sleep(60)\n".replace(
            "os.environ['RANK']", f"'{tmp_path}/' + os.environ['RANK']"
        )
    )
    environment = os.environ | {"PYTHON": sys.executable, "nproc_per_node": "2"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*RANKS, script], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 100
    while len(list(tmp_path.glob("*.started"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[1] == "stopped by SIGTERM\n"
    assert process.returncode == 128 + signal.SIGTERM


@pytest.fixture
def rank_of_a_run(tmp_path, monkeypatch):
    """The environment that torchrun gives to rank 1."""
    (tmp_path / "1").mkdir()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "1" / "error.json"))


def test_ranks_say_the_same_once(rank_of_a_run, capsys, monkeypatch):
    def fail() -> None:
        raise ValueError("--lr: -1")

    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            run_main(fail)
        assert end.value.code == 2
    assert capsys.readouterr().err == "error on rank 1: --lr: -1\n"
    assert is_first_to_say("other") and not is_first_to_say("other")
    monkeypatch.setattr(sys, "argv", ["train.py", "--nonsense"])
    for said in (1, 0):
        with pytest.raises(SystemExit) as end:
            make_parser("about", "example").parse_args()
        assert end.value.code == 2
        assert capsys.readouterr().err.count("unrecognized arguments: --nonsense") == said
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    assert is_first_to_say("other") and is_first_to_say("other")


def test_a_lost_connection_is_said_unless_its_cause_is(rank_of_a_run, capsys):
    """Under a full disk the last line on the screen was that of the rank that had room."""

    def lose() -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")

    for said in ("error on rank 1: another process has ended\n", ""):
        with pytest.raises(SystemExit) as end:
            run_main(lose)
        assert end.value.code == 1 and capsys.readouterr().err == said
        assert is_first_to_say("rank 0 has no room") is bool(said)


def test_errors_that_are_no_lost_connection_keep_their_traceback(rank_of_a_run, capsys):
    def fail() -> None:
        torch.zeros(2) @ torch.zeros(3)

    with pytest.raises(RuntimeError, match="size"):
        run_main(fail)
    assert capsys.readouterr().err == ""
