"""Sampling: filters, the inverse-CDF draw, randomness per image, options."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from autoregressive.decoding import sampling
from autoregressive.decoding.sampling import (
    SamplingOptions,
    filter_logits,
    gumbel_noise,
    image_randomness,
    sample,
)


def test_largest_uniform_draws_a_token_that_can_be_drawn():
    """Whatever the probabilities add up to in float32: 1 or, by rounding, a little more or less."""
    torch.manual_seed(0)
    logits = torch.randn(200, 10, 333)
    logits[:, :, 300:] = -torch.inf
    totals = logits.softmax(-1).cumsum(-1)[..., -1]
    assert (totals < 1).any() and (totals == 1).any() and (totals > 1).any()
    drawn = sample(logits, torch.full((200, 10), 1 - 2**-24), SamplingOptions())
    assert drawn.max() < 300


def parallel_cumsum(x: Tensor, dim: int = -1, *, block: int) -> Tensor:
    """Cumulative sum as a GPU makes it: of blocks by doubling, plus the sum of the blocks before.

    Also from run to run, there, another association: ``block`` stands for it.
    """
    assert dim == -1
    size = x.shape[-1]
    blocks = torch.nn.functional.pad(x, (0, -size % block)).unflatten(-1, (-1, block)).clone()
    step = 1
    while step < block:
        blocks[..., step:] = blocks[..., step:] + blocks[..., :-step]
        step *= 2
    before = torch.zeros_like(blocks[..., 0, 0])
    for i in range(blocks.shape[-2]):
        last = blocks[..., i, -1].clone()
        blocks[..., i, :] += before[..., None]
        before = before + last
    return blocks.flatten(-2)[..., :size]


def draw_in_parallel(monkeypatch, block: int, exact: bool) -> tuple[Tensor, Tensor]:
    """Tokens drawn where cumulative sums are ``parallel_cumsum``, and which are allowed: (B, t)."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(8, 2048, generator=generator)
    allowed = logits >= logits.topk(200).values[:, -1:]
    # uniform numbers about the sums at tokens that are cut off, where rounding decides
    sums = parallel_cumsum(logits.masked_fill(~allowed, -torch.inf).softmax(-1), block=1024)
    rises = sums.diff(dim=-1).masked_fill(allowed[:, 1:], 0.0)
    places = rises.topk(20).indices  # (B, 20)
    steps = (sums.gather(-1, places) * 2**24).round()[..., None] + torch.arange(-1, 2)
    uniforms = (steps.flatten(1) / 2**24).clamp(0, 1 - 2**-24)  # (B, 60)
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "sums_in_order", lambda device: not exact)
        patch.setattr(Tensor, "cumsum", lambda x, dim: parallel_cumsum(x, dim, block=block))
        logits = logits[:, None].expand(-1, uniforms.shape[1], -1)  # (B, 60, V)
        drawn = sample(logits, uniforms, SamplingOptions(top_k=200))
    return drawn, allowed.gather(-1, drawn)


def test_no_token_of_probability_0_where_sums_are_made_in_parallel(monkeypatch):
    """On CUDA a token that top-k had cut off could be drawn, and another one in the next run."""
    runs = []
    for block in (32, 256, 1024):
        drawn, allowed = draw_in_parallel(monkeypatch, block, exact=True)
        assert allowed.all()
        runs.append(drawn)
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    before = [draw_in_parallel(monkeypatch, block, exact=False) for block in (1024, 256)]
    assert not before[0][1].all(), "such a sum shows the mistake"
    assert not torch.equal(before[0][0], before[1][0]), "and that it depends on the order"


def test_sums_of_whole_numbers_draw_what_those_in_order_do(monkeypatch):
    """But for a uniform number at the very edge of a token; the largest one ends within."""
    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(20, 50, 301, generator=generator)
    uniforms = torch.rand(20, 50, generator=generator)
    uniforms[0] = 1 - 2**-24
    uniforms[1] = 0.0
    for options in (SamplingOptions(), SamplingOptions(top_k=9), SamplingOptions(top_p=0.8)):
        in_order = sample(logits, uniforms, options)
        with monkeypatch.context() as patch:
            patch.setattr(sampling, "sums_in_order", lambda device: False)
            drawn = sample(logits, uniforms, options)
        assert (drawn == in_order).float().mean() > 0.999 and drawn.max() < 301


@pytest.mark.parametrize("k, p", [(5, 1.0), (0, 0.8), (20, 0.7), (0, 0.05)])
def test_filters_are_golden(golden, k, p):
    file = golden("sampling.npz")
    probabilities = filter_logits(torch.from_numpy(file["logits"]), k, p).softmax(-1)
    torch.testing.assert_close(
        probabilities, torch.from_numpy(file[f"probs_k{k}_p{p}"]), atol=1e-6, rtol=0
    )


def test_filters_that_keep_everything():
    logits = torch.randn(3, 7)
    assert torch.equal(filter_logits(logits, 0, 1.0), logits)
    assert torch.equal(filter_logits(logits, 7, 1.0), logits)
    assert torch.equal(filter_logits(logits, 100, 1.0), logits)


def test_inverse_cdf_against_closed_form():
    """Probabilities 0, .5, 0, .25, .25, 0: u in [0, .5) is 1, [.5, .75) is 3, [.75, 1) is 4."""
    logits = torch.tensor([0, 0.5, 0, 0.25, 0.25, 0]).log()
    u = torch.tensor([0.0, 0.25, 0.4999, 0.5, 0.7499, 0.75, 0.9999999])
    drawn = sample(logits.expand(1, len(u), -1), u[None], SamplingOptions())
    assert drawn.tolist() == [[1, 1, 1, 3, 3, 4, 4]]


def test_sampled_frequencies_follow_the_softmax():
    logits = torch.randn(1, 1, 50, generator=torch.Generator().manual_seed(1)) * 2
    u = (torch.arange(20000) + 0.5) / 20000
    drawn = sample(logits.expand(1, 20000, -1), u[None], SamplingOptions(temperature=0.7))
    frequencies = drawn.flatten().bincount(minlength=50) / 20000
    torch.testing.assert_close(
        frequencies, (logits / 0.7).softmax(-1).flatten(), atol=1.1e-4, rtol=0
    )


def test_top_k_1_is_greedy_for_any_u():
    logits = torch.randn(2, 5, 31)
    drawn = sample(logits, torch.rand(2, 5), SamplingOptions(top_k=1))
    assert torch.equal(drawn, logits.argmax(-1))


def test_randomness_is_a_function_of_seed_and_index():
    labels, uniforms = image_randomness(0, range(4, 12), 1000, 576)
    again_labels, again_uniforms = image_randomness(0, range(6, 8), 1000, 576)
    assert np.array_equal(labels[2:4], again_labels)
    assert np.array_equal(uniforms[2:4], again_uniforms)
    other_labels, other_uniforms = image_randomness(1, range(4, 12), 1000, 576)
    assert not np.array_equal(labels, other_labels)
    assert not np.array_equal(uniforms, other_uniforms)
    assert uniforms.min() >= 0 and uniforms.max() < 1
    assert abs(uniforms.mean() - 0.5) < 0.02


@pytest.mark.parametrize(
    "option, value",
    [
        ("cfg_scale", 0.5),
        ("cfg_scale", 1e38),
        ("temperature", 1e-42),
        ("cfg_interval", -2),
        ("temperature", -1),
        ("top_k", -1),
        ("top_p", 0),
    ],
)
def test_impossible_options_are_named(option, value):
    with pytest.raises(ValueError, match="--" + option.replace("_", "-")):
        SamplingOptions(**{option: value})


def test_gumbel_noise_is_standard_and_a_function_of_key_and_code():
    _, keys = image_randomness(1, range(40), 10, 64, "gumbel")
    keys = torch.from_numpy(keys)
    noise = gumbel_noise(keys, 500)  # (40, 64, 500)
    assert torch.equal(gumbel_noise(keys[3:5, 7], 100), noise[3:5, 7, :100])
    assert abs(noise.mean() - 0.57722) < 0.005 and abs(noise.var() - math.pi**2 / 6) < 0.01
    sorted_cdf = torch.exp(-torch.exp(-noise.flatten().sort().values))  # uniform, if Gumbel
    expected = (torch.arange(len(sorted_cdf)) + 0.5) / len(sorted_cdf)
    assert (sorted_cdf - expected).abs().max() < 1.95 / math.sqrt(len(sorted_cdf))  # 0.1%, K-S
    flat = noise.flatten(0, 1) - noise.mean()
    correlation = (flat[:-1] * flat[1:]).mean(1) / flat.var()  # of neighbouring tokens
    assert correlation.abs().max() < 5 / math.sqrt(500) and abs(correlation.mean()) < 0.005


def test_gumbel_draws_follow_the_softmax():
    logits = torch.randn(1, 1, 50, generator=torch.Generator().manual_seed(1)) * 2
    logits[..., 7] = -torch.inf
    _, keys = image_randomness(2, range(1), 10, 40000, "gumbel")
    options = SamplingOptions(temperature=0.7, noise="gumbel")
    drawn = sample(logits.expand(1, 40000, -1), torch.from_numpy(keys), options)
    frequencies = drawn.flatten().bincount(minlength=50) / 40000
    p = (logits / 0.7).softmax(-1).flatten()
    assert ((frequencies - p).abs() < 4.5 * (p * (1 - p) / 40000).sqrt() + 1e-9).all()
    assert frequencies[7] == 0


def test_gumbel_noise_is_finite_for_every_key():
    """31 bits near their end round to a uniform of 1, whose noise was -inf: with one token left, a
    token of probability 0 was drawn (seed 0, image 3927).
    """
    keys = torch.from_numpy(image_randomness(0, range(3927, 3928), 1000, 576, "gumbel")[1])
    assert torch.isfinite(gumbel_noise(keys[:, 149], 2)).all()
    logits = torch.full((1, 576, 2), -torch.inf)
    logits[..., 1] = 0.0
    assert (sample(logits, keys, SamplingOptions(noise="gumbel")) == 1).all()
