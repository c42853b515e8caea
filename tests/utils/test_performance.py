"""How much of a device a program uses."""

import torch

from utils import performance
from utils.performance import Ceiling


def test_a_share_above_one_has_the_ceiling_measured_again(monkeypatch):
    """The ceiling was measured while other programs ran: 145% were printed as utilisation."""
    figures = iter([(1e9, "measured"), (4e9, "measured"), (2e9, "measured")])
    monkeypatch.setattr(performance, "peak_flops", lambda *_: next(figures))
    ceiling = Ceiling(torch.device("cpu"), "none")
    assert ceiling.share(0.5e9) == 0.5
    assert ceiling.share(2e9) == 0.5 and ceiling.flops == 4e9
    assert ceiling.share(5e9) == 1.0 and ceiling.share(2.5e9) == 0.5
