"""The state of a training run: average of weights, AdamW, skipped steps, clipping."""

import numpy as np
import pytest
import torch

from tests.helpers import small_state, take_step
from utils.training.state import Ema, Guard, make_adamw, seed_step

CPU = torch.device("cpu")


def test_ema_closed_form():
    """After k steps at a constant new value: 1 - decay^k of the way."""
    model = torch.nn.Linear(1, 1)
    model.weight.data.fill_(0.0)
    ema = Ema(model, decay=0.9)
    model.weight.data.fill_(1.0)
    for step in range(1000, 1005):  # the decay has grown to its full value
        ema.update(model, step)
    assert ema.state_dict(model)["weight"].item() == pytest.approx(1 - 0.9**5, rel=1e-5)
    ema = Ema(model, decay=0.9999)
    model.weight.data.fill_(3.0)
    ema.update(model, 0)  # decay 0.1: the first weights fade at once
    assert ema.state_dict(model)["weight"].item() == pytest.approx(3 - 0.1 * 2, rel=1e-5)


def test_weight_decay_is_for_matrices():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    optimizer = make_adamw(model, 0.1, 0.5, (0.9, 0.95))
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old * (0.95 if old.ndim == 2 else 1.0))


def test_step_seeds_differ_by_step_and_rank():
    def draw(*key):
        seed_step(*key)
        return torch.rand(1).item()

    assert draw(0, 5, 1) == draw(0, 5, 1)
    assert len({draw(*k) for k in [(0, 5, 1), (0, 5, 0), (0, 6, 1), (1, 5, 1)]}) == 4


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_no_number_changes_nothing(bad, fp16):
    """Weights, moments, step counts after good, bad, good steps are those of the good ones."""
    states = []
    for losses in ([1.0, 2.0], [1.0, bad, 2.0]):
        state = small_state(1.0, fp16=fp16)
        for step, loss in enumerate(losses):
            take_step(state, step, loss)
        states.append(state)
    ours, expected = (
        {k: v for k, v in s.tensors().items() if not k.startswith("ema")} for s in states[::-1]
    )
    assert all(torch.equal(ours[k], expected[k]) for k in expected)
    assert states[1].guard.skipped == 1 and states[1].guard.in_a_row == 0


def test_spikes_are_skipped_once_the_loss_has_settled():
    """Rule: above the running mean by the threshold, after 100 steps; before, only non-finite."""
    guard = Guard(CPU, spike=0.5, patience=3)
    norm = torch.ones(())
    assert not guard.should_skip(torch.tensor(1.0), norm) and not guard.should_skip(
        torch.tensor(99.0), norm
    )
    guard = Guard(CPU, spike=0.5, patience=3)
    losses = np.random.default_rng(0).normal(2.0, 0.05, 100).astype(np.float32)
    mean = 0.0
    for taken, loss in enumerate(losses):
        assert not guard.should_skip(torch.tensor(loss), norm)
        mean += (loss - mean) * max(0.01, 1 / (taken + 1))
    assert (
        guard.state[0].item()
        == pytest.approx(losses.mean(), abs=1e-5)
        == pytest.approx(mean, abs=1e-5)
    )
    assert not guard.should_skip(torch.tensor(mean + 0.45), norm)
    mean += 0.45 * 0.01
    for count in (1, 2, 3):
        assert guard.healthy and guard.should_skip(torch.tensor(mean + 0.55), norm)
        assert (guard.skipped, guard.in_a_row) == (count, count)
        assert guard.state[0].item() == pytest.approx(mean, abs=1e-5)
    assert not guard.healthy
    with pytest.raises(ValueError, match="the last 3 steps up to 103 were all skipped"):
        guard.check(103, 1e-4)
    assert not guard.should_skip(torch.tensor(mean), norm) and guard.in_a_row == 0
    guard.check(104, 1e-4)
    never = Guard(CPU, spike=0.0, patience=3)
    assert not any(never.should_skip(torch.tensor(x), norm) for x in [1.0] * 150 + [1e9])


def test_clipping_is_by_the_norm_over_all_parameters():
    """Adam's first step ignores a gradient's scale, so see its moment: 0.1 of the clipped one."""
    state = small_state(0.0)
    take_step(state, 0, 3.0, max_norm=1.0)
    moment = state.tensors()["optimizer.weight.exp_avg"]
    torch.testing.assert_close(moment, torch.full((1, 2), 0.1 * 2**-0.5), atol=1e-5, rtol=0)
