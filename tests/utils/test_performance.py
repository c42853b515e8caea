"""How much of a device a program uses."""

from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT, run_command
from utils import performance
from utils.performance import Ceiling


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_memory_is_of_the_process_itself():
    """getrusage counts what a process' parent had: small ways seemed to need what scale.py did."""
    held = torch.ones(1 << 28)
    code = "import torch; from utils.performance import peak_memory as peak; "
    code += "print(peak(torch.device('cpu')))"
    peak = int(run_command("python3", "-c", code, PYTHONPATH=str(ROOT)).stdout)
    assert 1 << 26 < peak < held.nbytes


@pytest.mark.parametrize("status", ["Name:\tpython\nVmRSS:\t  9 kB\n", None])
def test_memory_is_told_where_linux_does_not(monkeypatch, status):
    """gVisor's status has no VmHWM, other systems have no status at all."""

    def read(path: Path) -> str:
        if status is None:
            raise FileNotFoundError(path)
        return status

    monkeypatch.setattr(Path, "read_text", read)
    assert performance.peak_memory(torch.device("cpu")) > 1 << 24


def test_a_share_above_one_has_the_ceiling_measured_again(monkeypatch):
    """The ceiling was measured while other programs ran: 145% were printed as utilisation."""
    figures = iter([(1e9, "measured"), (4e9, "measured"), (2e9, "measured")])
    monkeypatch.setattr(performance, "peak_flops", lambda *_: next(figures))
    ceiling = Ceiling(torch.device("cpu"), "none")
    assert ceiling.share(0.5e9) == 0.5
    assert ceiling.share(2e9) == 0.5 and ceiling.flops == 4e9
    assert ceiling.share(5e9) == 1.0 and ceiling.share(2.5e9) == 0.5
