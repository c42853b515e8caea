"""Decoding: golden tokens, cached = teacher-forced, guidance, editing."""

import math
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor

from autoregressive.decoding.decoder import Way, make_decoder
from autoregressive.decoding.generate import Generator, generate
from autoregressive.decoding.sampling import SamplingOptions, image_randomness, sample
from autoregressive.models.gpt import GPT
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


@pytest.mark.parametrize(
    "variant",
    [
        {"order": "raster"},
        {"order": "1x4"},
        {"group_attention": "causal"},
        {"group_attention": "causal", "schedule": "4x16", "order": "raster"},
        {"special_tokens": "shared"},
        {"special_tokens": "zeros", "special_positions": "predicted"},
        {"special_tokens": "class"},
        {"special_tokens": "last", "schedule": "4x16"},
        {"special_positions": "predicted"},
    ],
    ids=str,
)
def test_variants_decode_as_they_are_trained(variant):
    """By the model, by the kernels, and both in windows."""
    config = small_config(ar_token_num=4, grid_height=8, grid_width=8, **variant)
    model = fill_from_names(GPT(config)).double().eval()
    cond, uniforms = torch.tensor([0, 2, 1]), torch.zeros(3, 64)
    options = SamplingOptions(cfg_scale=2.0, **GREEDY)
    with torch.no_grad():
        expected = greedy_without_cache(model, cond, 2.0)
    kernels = make_decoder(fill_from_names(GPT(config)).eval(), Way("none", "kernels"), 2 * 3 * 64)
    for decoder in (model, kernels):
        for window in (1, 5):
            codes = generate(decoder, model.order, cond, uniforms, options, window)
            assert torch.equal(codes, expected)


def test_training_after_generating():
    """The published model kept a flag and a cache from the last call; ours has no state to keep."""
    model = fill_from_names(GPT(small_config())).eval()
    codes, cond = random_codes(model.config)
    before = model(codes, cond)[0]
    generate(model, model.order, cond, torch.rand(2, 16), SamplingOptions(cfg_scale=1.5))
    assert torch.equal(model(codes, cond)[0], before)
    model.train()(codes, cond)[0].backward()


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


@pytest.mark.parametrize("way", [Way("none", "eager"), Way("none", "compiled")], ids=str)
def test_a_generator_goes_with_its_last_reference(way):
    """It was part of a cycle, so that its cache stayed until the garbage collector came by."""
    model = small_gpt(4)
    generator = Generator(make_decoder(model, way, 8), model.order, SamplingOptions(), 1)
    gone = weakref.ref(generator)
    del generator
    assert gone() is None


@pytest.mark.parametrize("end", [float("nan"), float("inf")])
def test_temperatures_are_finite(end):
    with pytest.raises(ValueError, match="--temperature-end .* must be finite"):
        SamplingOptions(temperature_end=end)


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


WAYS = [
    Way("none", "eager"),
    Way("none", "kernels"),
    Way("bf16", "kernels"),
    pytest.param(Way("none", "compiled"), marks=pytest.mark.slow),
]


def small_gpt(n, schedule="region"):
    torch.manual_seed(n)
    model = GPT(small_config(ar_token_num=n, grid_height=8, grid_width=8, schedule=schedule))
    model.init_weights()
    torch.nn.init.normal_(model.output.weight, std=0.5)
    return model.eval()


def batch_for(model, batch=3):
    codes, cond = random_codes(model.config, batch)  # (B, T), (B,)
    keep = torch.rand(batch, model.order.num_tokens) < 0.5  # (B, T)
    return codes, cond, keep, torch.rand(batch, model.order.num_tokens)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("n", [1, 4, 16])
@pytest.mark.parametrize("scale", [1.0, 1.75])
def test_kept_codes_are_kept_on_every_way(n, way, scale):
    if way.decoder == "compiled" and (n, scale) != (4, 1.75):
        pytest.skip("one of them compiles")
    model = small_gpt(n)
    codes, cond, keep, uniforms = batch_for(model)
    decoder = make_decoder(model.cast_weights(way.dtype), way, 2 * len(cond) * n)
    generator = Generator(decoder, model.order, SamplingOptions(cfg_scale=scale), 3, editing=True)
    made = generator(cond, uniforms, known=codes, keep=keep)
    assert torch.equal(made[keep], codes[keep])
    assert not torch.equal(made[~keep], codes[~keep])
    steps = []
    again = generator(cond, uniforms, lambda tokens, stop: steps.append(stop), codes, keep)
    assert torch.equal(made, again) and len(steps) == len(model.order.steps)


@pytest.mark.parametrize("n", [1, 4])
def test_editing_nothing_away_is_plain_generation_and_everything_the_image(n):
    model = small_gpt(n)
    codes, cond, keep, uniforms = batch_for(model)
    options = SamplingOptions(cfg_scale=1.5, top_k=7)
    generator = Generator(model, model.order, options, 3, editing=True)
    plain = generate(model, model.order, cond, uniforms, options)
    nothing = torch.zeros_like(keep)
    assert torch.equal(generator(cond, uniforms, known=codes, keep=nothing), plain)
    assert torch.equal(generator(cond, uniforms, known=codes, keep=~nothing), codes)


@pytest.mark.parametrize("n", [1, 4, 16])
def test_likelihood_of_kept_codes_is_that_of_a_teacher_forced_pass(n):
    model = small_gpt(n)
    codes, cond, keep, uniforms = batch_for(model)
    generator = Generator(model, model.order, SamplingOptions(), 3, editing=True)
    made = generator(cond, uniforms, known=codes, keep=keep)
    with torch.no_grad():
        _, losses = model(made, cond)  # (B, T) in region order
    expected = -(losses * keep[:, model.order.permutation]).sum(1)
    torch.testing.assert_close(generator.kept_likelihood, expected, rtol=1e-5, atol=1e-4)


# Jacobi decoding gives the tokens of decoding step by step.

SHRINKING = "1x4,4x3,8x2,4x4,1x16"


def randomness(noise, batch=3, tokens=64):
    labels, numbers = image_randomness(5, range(batch), 3, tokens, noise)
    return torch.from_numpy(labels), torch.from_numpy(numbers)


@pytest.mark.parametrize("noise", ["uniform", "gumbel"])
@pytest.mark.parametrize("window", [2, 5, 64])
@pytest.mark.parametrize("n", [1, 4, 16])
def test_same_tokens_as_step_by_step_to_the_byte(n, window, noise):
    """By the kernels in float32, whose rows depend on no other row; guided, then not."""
    model = small_gpt(n)
    cond, numbers = randomness(noise)
    options = SamplingOptions(cfg_scale=1.75, cfg_interval=30, top_k=40, top_p=0.9, noise=noise)
    decoder = make_decoder(model, Way("none", "kernels"), 2 * 3 * 64)
    expected = generate(decoder, decoder.order, cond, numbers, options)
    generator = Generator(decoder, decoder.order, options, 3, window=window)
    assert torch.equal(generator(cond, numbers), expected)
    assert -(-len(decoder.order.steps) // window) <= generator.calls <= len(decoder.order.steps)
    one = Generator(decoder, decoder.order, options, 1, window=window)
    for i in range(3):  # an image's tokens depend on no other image
        assert torch.equal(one(cond[i : i + 1], numbers[i : i + 1]), expected[i : i + 1])


@pytest.mark.parametrize("way", [Way("bf16", "kernels"), Way("none", "compiled")], ids=str)
def test_same_tokens_by_other_decoders(way):
    model = small_gpt(4).cast_weights(way.dtype)
    cond, numbers = randomness("gumbel")
    options = SamplingOptions(cfg_scale=1.5, noise="gumbel")
    decoder = make_decoder(model, way, 2 * 3 * 16)
    with torch.compiler.set_stance("force_eager"):  # what is compiled stays the same
        expected = generate(decoder, decoder.order, cond, numbers, options)
        assert torch.equal(generate(decoder, decoder.order, cond, numbers, options, 4), expected)


@pytest.mark.parametrize("noise", ["uniform", "gumbel"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cfg_scale": 2.0, "cfg_schedule": "linear"},
        {"cfg_scale": 2.0, "temperature_schedule": "cosine", "temperature_end": 0.2},
        {"temperature": 0.0},
    ],
)
@pytest.mark.parametrize(
    "n, schedule", [(4, "region"), (16, "nested"), (16, SHRINKING), (4, "4x16")]
)
def test_same_tokens_by_torch_in_float64(n, schedule, options, noise):
    """Values that change from step to step, and orders whose steps grow and shrink."""
    model = small_gpt(n, schedule).double()
    cond, numbers = randomness(noise)
    options = SamplingOptions(**options, noise=noise)
    expected = generate(model, model.order, cond, numbers, options)
    for window in (3, 64):
        assert torch.equal(generate(model, model.order, cond, numbers, options, window), expected)


@pytest.mark.parametrize("n", [1, 4, 16])
def test_editing_in_windows(n):
    """Same tokens and likelihoods; kept codes are their own draft, so fewer calls are needed."""
    model = small_gpt(n).double()
    codes, cond = random_codes(model.config, 3)
    keep = torch.rand(3, 64, generator=torch.Generator().manual_seed(0)) < 0.9
    options = SamplingOptions(cfg_scale=1.5, noise="gumbel")
    _, numbers = randomness("gumbel")
    by_step = Generator(model, model.order, options, 3, editing=True)
    windows = Generator(model, model.order, options, 3, editing=True, window=8)
    expected = by_step(cond, numbers, known=codes, keep=keep)
    seen = []
    made = windows(cond, numbers, lambda tokens, done: seen.append(done), codes, keep)
    assert torch.equal(made, expected) and torch.equal(made[keep], codes[keep])
    torch.testing.assert_close(windows.kept_likelihood, by_step.kept_likelihood)
    assert seen == sorted(set(seen)) and seen[-1] == 64 and len(seen) == windows.calls
    assert torch.equal(windows(cond, numbers, known=codes, keep=keep | True), codes)
    assert windows.calls == -(-len(model.order.steps) // 8)


def test_independent_tokens_settle_at_the_second_look():
    """If no token depends on another, one call draws all of them, and the next one sees it."""
    model = small_gpt(4)
    torch.nn.init.zeros_(model.output.weight)  # every token equally likely
    cond, numbers = randomness("gumbel", batch=2)
    generator = Generator(
        model, model.order, SamplingOptions(noise="gumbel"), 2, window=len(model.order.steps)
    )
    generator(cond, numbers)
    assert generator.calls == 2


def test_released_models_do_not_load_as_another_schedule():
    """The schedule is part of the config: nested has the special tokens of the paper's order."""
    region, nested = small_gpt(16), small_gpt(16, "nested")
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (region, nested)]
    assert shapes[0] == shapes[1]
    nested.load_state_dict(region.state_dict())
    codes, cond = random_codes(region.config, 2)
    assert not torch.allclose(region(codes, cond)[0], nested(codes, cond)[0])
