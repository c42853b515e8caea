"""Dropout on the CPU, and stochastic depth when compiled."""

from __future__ import annotations

import pytest
import torch

from autoregressive.models.dropout import Dropout
from autoregressive.models.gpt import GPT
from tests.helpers import small_config


def test_dropout_on_the_cpu_keeps_the_share_and_the_mean():
    torch.manual_seed(0)
    for p in (0.1, 0.5, 1.0):
        x = torch.ones(1001, 999, requires_grad=True)
        y = Dropout(p)(x)
        y.sum().backward()
        assert set(y.unique().tolist()) <= {0.0, y.max().item()}
        assert (y == 0).float().mean().item() == pytest.approx(p, abs=2e-3)
        assert torch.equal(x.grad, y.detach())
        if p < 1:
            assert y.max().item() == pytest.approx(1 / (1 - p))
            by_row, by_column = (y == 0).float().mean(0), (y == 0).float().mean(1)
            assert (by_row - p).abs().max() < 0.09 and (by_column - p).abs().max() < 0.09
    torch.manual_seed(3)
    first = Dropout(0.3)(torch.ones(50))
    torch.manual_seed(3)
    assert torch.equal(Dropout(0.3)(torch.ones(50)), first)
    assert torch.equal(Dropout(0.3).eval()(torch.ones(5)), torch.ones(5))


def test_compiled_stochastic_depth_drops_rows_by_the_blocks_rate(compiler):
    """The last of three blocks has the whole rate; rows that stay are divided by what stays."""
    model = GPT(small_config(n_layer=3, drop_path_rate=0.4))
    torch.manual_seed(0)
    for layer, rate in enumerate((0.0, 0.2, 0.4)):
        drop_path = model.layers[layer].drop_path
        out = torch.compile(drop_path)(torch.ones(20_000, 2, 3))
        assert compiler.graphs == 1
        assert (out == 0).all(-1).all(-1).float().mean().item() == pytest.approx(rate, abs=0.02)
        assert out.max().item() == pytest.approx(1 / (1 - rate))
