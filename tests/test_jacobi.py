"""Jacobi decoding gives the tokens of decoding step by step, whatever the order, noise, options."""

import pytest
import torch

from autoregressive.decoding.decoder import Way, make_decoder
from autoregressive.decoding.generate import Generator, generate
from autoregressive.decoding.sampling import SamplingOptions, image_randomness
from autoregressive.models.gpt import GPT
from tests.helpers import random_codes, small_config

SHRINKING = "1x4,4x3,8x2,4x4,1x16"


def small_gpt(n, schedule="region"):
    torch.manual_seed(n)
    model = GPT(small_config(ar_token_num=n, grid_height=8, grid_width=8, schedule=schedule))
    model.init_weights()
    torch.nn.init.normal_(model.output.weight, std=0.5)
    return model.eval()


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
