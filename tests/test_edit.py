"""Editing: kept codes stay, on every way of decoding; the canvas; the command."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.decoding.decoder import Way, make_decoder
from autoregressive.decoding.generate import Generator, generate
from autoregressive.decoding.sampling import SamplingOptions
from autoregressive.models.gpt import GPT
from autoregressive.sample import edit_c2i
from autoregressive.sample.canvas import blend, mask_of_codes, open_canvas
from tests.helpers import quietly, random_codes, small_config

WAYS = [
    Way("none", "eager"),
    Way("none", "kernels"),
    Way("bf16", "kernels"),
    Way("none", "compiled"),
]


def small_gpt(n):
    torch.manual_seed(n)
    model = GPT(small_config(ar_token_num=n, grid_height=8, grid_width=8))
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


def image_file(path, width=48, height=32):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path, pixels


def test_canvas_masks_what_it_is_told(tmp_path):
    path, pixels = image_file(tmp_path / "a.png")
    square, masked = open_canvas(path, 32)
    assert np.array_equal(square, pixels[:, 8:40]) and not masked.any()
    _, masked = open_canvas(path, 32, boxes=[(9, 2, 12, 30)])
    assert masked[2:30, 1:4].all() and masked.sum() == 28 * 3
    mask = np.zeros((32, 48), np.uint8)
    mask[5, 20] = 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    _, masked = open_canvas(path, 32, tmp_path / "mask.png")
    assert masked[5, 12] and masked.sum() == 1
    _, masked = open_canvas(path, 16, tmp_path / "mask.png")  # one pixel survives the resize
    assert masked[2, 6] and masked.sum() == 1
    square, masked = open_canvas(path, 64, margins=(16, 32, 0, 0))
    assert masked[:32].all() and masked[:, :16].all() and masked.sum() == 64 * 64 - 48 * 32
    assert np.array_equal(square[32:, 16:], pixels)


def test_canvas_refuses_what_does_not_fit(tmp_path):
    path, _ = image_file(tmp_path / "a.png")
    with pytest.raises(ValueError, match="--box 9 2 9 3: expected left < right"):
        open_canvas(path, 32, boxes=[(9, 2, 9, 3)])
    with pytest.raises(ValueError, match="inside the image's 48x32 pixels"):
        open_canvas(path, 32, boxes=[(0, 0, 49, 3)])
    other, _ = image_file(tmp_path / "b.png", 47)
    with pytest.raises(ValueError, match="is 47x32, but --image is 48x32"):
        open_canvas(path, 32, other)


def test_codes_are_masked_by_any_pixel_and_blended():
    masked = np.zeros((8, 8), bool)
    masked[3, 4] = True
    anew = mask_of_codes(masked, (4, 4))
    assert anew[1, 2] and anew.sum() == 1
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    hard = blend(black, white, anew, 0)
    assert (hard[2:4, 4:6] == 255).all() and hard.sum() == 4 * 3 * 255
    soft = blend(black, white, anew, 1)
    assert (soft[2:4, 4:6] == 255).all() and 0 < soft[1, 4, 0] < 255 and soft[0, 0, 0] == 0


def test_the_command_edits(work, trained, tmp_path, capfd, monkeypatch):
    path, pixels = image_file(tmp_path / "a.png", 32, 32)
    output = tmp_path / "out" / "edit.png"
    options = ("--image", path, "--vq-ckpt", work / "vq.pt", "--gpt-ckpt", trained)
    options += ("--classes", "0,2", "--box", 0, 0, 16, 32, "--candidates", 3, "--no-compile")
    said = quietly(capfd, monkeypatch, *options, "--output", output, main=edit_c2i.main)
    assert "32 of 64 codes made anew" in said, said
    record = json.loads(output.with_suffix(".json").read_text())
    assert np.array(record["log_likelihood_of_kept_codes"]).shape == (2, 1, 3)
    for i in range(2):
        made = np.asarray(Image.open(output.with_stem(f"edit-{i}")))
        assert np.array_equal(made[:, 16:], pixels[:, 16:])
        assert not np.array_equal(made[:, :16], pixels[:, :16])
    sheet = Image.open(output.with_stem("edit-sheet"))
    assert sheet.width == 6 * 34 + 2 and sheet.height == 2 * (16 + 36)
    said = quietly(
        capfd, monkeypatch, *options[:6], "--classes", 0, "--output", output, main=edit_c2i.main
    )
    assert said.endswith("give --mask, --box, --margins or --keep-share\n"), said
    decoded = ("--kept-pixels", "decoded", "--keep-share", 0.5, "--trace", "--feather", 2)
    quietly(
        capfd, monkeypatch, *options[:6], "--classes", 1, *decoded, "--output", output,
        "--no-compile", main=edit_c2i.main,
    )  # fmt: skip
    assert output.is_file() and output.with_suffix(".gif").is_file()
