"""Decoding: golden tokens, cached = teacher-forced, sampling filters, randomness per image."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from autoregressive.decoding import sampling
from autoregressive.decoding.generate import Generator, generate
from autoregressive.decoding.sampling import (
    SamplingOptions,
    filter_logits,
    gumbel_noise,
    image_randomness,
    sample,
)
from autoregressive.models.gpt import GPT
from autoregressive.sample.pipeline import quantize
from scripts.diagnosis.models import fill_from_names
from scripts.diagnosis.models import golden_gpt as tiny_gpt
from tests.helpers import random_codes, small_config

GREEDY = dict(temperature=0.0)


@pytest.mark.parametrize("n", [4, 9, 16])
@pytest.mark.parametrize("scale", [1.0, 1.75])
def test_greedy_tokens_are_golden(golden, n, scale):
    file = golden(f"gpt_tiny_n{n}.npz")
    model = tiny_gpt(file)
    cond = torch.from_numpy(file["cond"][:-1])
    uniforms = torch.zeros(len(cond), model.order.num_tokens)
    codes = generate(model, model.order, cond, uniforms, SamplingOptions(cfg_scale=scale, **GREEDY))
    assert np.array_equal(codes.numpy(), file[f"greedy_raster_cfg{scale}"])
    assert np.array_equal(
        codes[:, model.order.permutation].numpy(), file[f"greedy_region_cfg{scale}"]
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


@pytest.mark.parametrize("what", ["int8", "fp8"])
def test_quantised_weights_are_near(golden, what):
    pytest.importorskip("torchao")
    file = golden("gpt_tiny_n4.npz")
    model, rounded = tiny_gpt(file), tiny_gpt(file)
    quantize(rounded, what)
    codes = torch.from_numpy(file["raster_tokens"]).long()
    logits, found = (m.logits(codes, torch.from_numpy(file["cond"])) for m in (model, rounded))
    error = ((found - logits).square().mean() / logits.square().mean()).sqrt().item()
    assert 1e-4 < error < {"int8": 0.05, "fp8": 0.2}[what]


def greedy_without_cache(model: GPT, cond: Tensor, scale) -> Tensor:
    """Slow version: a whole teacher-forced pass per step, argmax, guidance of logits by its
    formula.

    scale: a number, or a function of the share of tokens decoded.
    """
    codes = torch.zeros(len(cond), model.order.num_tokens, dtype=torch.long)
    null = torch.full_like(cond, model.config.num_classes)
    for _, _, start, stop in model.order.steps:
        conditional, unconditional = model.logits(codes, cond), model.logits(codes, null)
        now = scale(start / model.order.num_tokens) if callable(scale) else scale
        logits = unconditional + now * (conditional - unconditional)
        codes[:, model.order.permutation[start:stop]] = logits[:, start:stop].argmax(-1)
    return codes


@pytest.mark.parametrize("n, grid", [(1, 4), (2, 4), (4, 4), (9, 6), (16, 8)])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("n_kv_head", [None, 2])
def test_cached_decoding_is_teacher_forced_argmax(n, grid, scale, n_kv_head):
    config = small_config(ar_token_num=n, grid_height=grid, grid_width=grid, n_kv_head=n_kv_head)
    model = fill_from_names(GPT(config)).double().eval()
    cond = torch.tensor([0, 2, 1])
    with torch.no_grad():
        expected = greedy_without_cache(model, cond, scale)
    uniforms = torch.zeros(3, model.order.num_tokens)
    codes = generate(model, model.order, cond, uniforms, SamplingOptions(cfg_scale=scale, **GREEDY))
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("schedule", ["nested", "1x4,4x3,8x2,4x4,1x16", "16x4", "1x64"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_other_schedules_decode_as_they_are_trained(schedule, scale):
    config = small_config(ar_token_num=16, grid_height=8, grid_width=8, schedule=schedule)
    model = fill_from_names(GPT(config)).double().eval()
    cond = torch.tensor([0, 2, 1])
    with torch.no_grad():
        expected = greedy_without_cache(model, cond, scale)
    options = SamplingOptions(cfg_scale=scale, **GREEDY)
    assert torch.equal(generate(model, model.order, cond, torch.zeros(3, 64), options), expected)


def test_training_after_generating():
    """The published model kept a flag and a cache from the last call; ours has no state to keep."""
    model = fill_from_names(GPT(small_config())).eval()
    codes, cond = random_codes(model.config)
    before = model(codes, cond)[0]
    generate(model, model.order, cond, torch.rand(2, 16), SamplingOptions(cfg_scale=1.5))
    assert torch.equal(model(codes, cond)[0], before)
    model.train()(codes, cond)[0].backward()


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


def test_guidance_interval_counts_decoded_tokens_once():
    """With interval 5 and n = 4, steps from 0, 1, 2, 3 and 4 are guided, those from 8, 12 not."""
    model = fill_from_names(GPT(small_config())).double().eval()
    cond, uniforms = torch.tensor([0, 1]), torch.rand(2, 16)
    plain = SamplingOptions(cfg_scale=3.0, cfg_interval=5)
    guided = generate(model, model.order, cond, uniforms, SamplingOptions(cfg_scale=3.0))[
        :, model.order.permutation
    ]
    until = generate(model, model.order, cond, uniforms, plain)[:, model.order.permutation]
    assert torch.equal(until[:, :8], guided[:, :8])
    with torch.no_grad():
        logits = model.logits(until[:, model.order.inverse], cond)
    assert torch.equal(until[:, 8:], sample(logits[:, 8:], uniforms[:, 8:], SamplingOptions()))


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


def generate_in_batches(model: GPT, batch: int, count: int = 11) -> Tensor:
    codes = []
    for first in range(0, count, batch):
        labels, uniforms = image_randomness(3, range(first, min(first + batch, count)), 3, 64)
        options = SamplingOptions(cfg_scale=1.5, top_p=0.95)
        codes.append(
            generate(
                model, model.order, torch.from_numpy(labels), torch.from_numpy(uniforms), options
            )
        )
    return torch.cat(codes)


def test_batch_size_changes_nothing_but_rounding():
    model = fill_from_names(
        GPT(small_config(grid_height=8, grid_width=8, vocab_size=301, dim=64))
    ).eval()
    in_float32 = [generate_in_batches(model, b) for b in (1, 3, 8)]
    for codes in in_float32[1:]:
        assert (codes == in_float32[0]).float().mean() >= 0.999
    in_float64 = [generate_in_batches(model.double(), b) for b in (1, 3, 8)]
    assert torch.equal(in_float64[0], in_float64[1])
    assert torch.equal(in_float64[0], in_float64[2])


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


@pytest.mark.parametrize(
    "schedule, scale",
    [
        ("linear", lambda p: 1 + 3 * p),
        ("power-cosine", lambda p: 1 + 3 * 0.5 * (1 - math.cos(math.pi * p**2.0))),
    ],
)
def test_guidance_schedules(schedule, scale):
    model = fill_from_names(GPT(small_config(grid_height=8, grid_width=8))).double().eval()
    cond = torch.tensor([0, 2, 1])
    options = SamplingOptions(cfg_scale=4.0, cfg_schedule=schedule, cfg_power=2.0, temperature=0.0)
    with torch.no_grad():
        expected = greedy_without_cache(model, cond, scale)
    codes = generate(model, model.order, cond, torch.zeros(3, 64), options)
    assert torch.equal(codes, expected)
    constant = SamplingOptions(4.0, temperature=0.0)
    assert not torch.equal(codes, generate(model, model.order, cond, torch.zeros(3, 64), constant))


def test_the_unconditional_half_rests_once_guidance_is_over(monkeypatch):
    model = fill_from_names(GPT(small_config(grid_height=8, grid_width=8))).eval()
    rows = []
    decode = model.decode_step
    monkeypatch.setattr(
        model, "decode_step", lambda tokens, *a: rows.append(len(tokens)) or decode(tokens, *a)
    )
    options = SamplingOptions(cfg_scale=2.0, cfg_interval=20)
    generate(model, model.order, torch.tensor([0, 1]), torch.rand(2, 64), options)
    decoded = [step.first for step in model.order.steps]
    assert rows == [4 if d <= 20 else 2 for d in decoded]


def test_a_generator_is_used_again_and_for_shorter_batches():
    """What a batch leaves in the cache, its buffers and its labels does not show in the next."""
    model = fill_from_names(GPT(small_config(grid_height=8, grid_width=8))).double().eval()
    options = SamplingOptions(cfg_scale=2.0, cfg_interval=20)
    generator = Generator(model, model.order, options, batch=4)
    store = generator.cache.store.data_ptr()
    for seed, batch in enumerate((4, 2, 4, 1, 3)):
        labels, uniforms = map(torch.from_numpy, image_randomness(seed, range(batch), 3, 64))
        assert torch.equal(
            generator(labels, uniforms), generate(model, model.order, labels, uniforms, options)
        )
    assert generator.cache.store.data_ptr() == store


def test_steps_are_told_as_they_come():
    model = fill_from_names(GPT(small_config())).eval()
    seen = []
    codes = Generator(model, model.order, SamplingOptions(), 2)(
        torch.tensor([0, 1]),
        torch.rand(2, 16),
        lambda tokens, decoded: seen.append((tokens.clone(), decoded)),
    )
    assert [d for _, d in seen] == [1, 2, 3, 4, 8, 12, 16]
    for tokens, decoded in seen:
        assert torch.equal(tokens[:, :decoded], codes[:, model.order.permutation[:decoded]])


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


@pytest.mark.parametrize("schedule, share", [("linear", 0.25), ("cosine", 0.14644661)])
def test_temperature_schedules(schedule, share):
    options = SamplingOptions(temperature=2.0, temperature_schedule=schedule, temperature_end=0.5)
    assert [options.temperature_at(t, 64) for t in (0, 32, 64)] == pytest.approx([2, 1.25, 0.5])
    assert options.temperature_at(16, 64) == pytest.approx(2 - 1.5 * share)
    model = fill_from_names(GPT(small_config())).double().eval()
    cond, uniforms = torch.tensor([0, 1]), torch.rand(2, 16)
    codes = generate(model, model.order, cond, uniforms, options)
    with torch.no_grad():
        logits = model.logits(codes, cond)  # (2, T, V)
    at = [step.first for step in model.order.steps for _ in range(step.first, step.end)]
    temperatures = torch.tensor([options.temperature_at(t, 16) for t in at])[:, None]
    expected = sample(logits / temperatures, uniforms, SamplingOptions())
    assert torch.equal(codes[:, model.order.permutation], expected)
    with pytest.raises(ValueError, match="--temperature-end 0.0; both must be in"):
        SamplingOptions(temperature_schedule=schedule, temperature_end=0.0)
