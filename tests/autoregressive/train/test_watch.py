"""Pictures and validation during training."""

from __future__ import annotations

from argparse import Namespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT
from autoregressive.models.load import load_gpt
from autoregressive.train import watch
from tests.helpers import GPT_RUN as NAME
from tests.helpers import (
    TRAIN,
    TRAIN_OPTIONS,
    curve,
    quietly,
    random_codes,
    run_command,
    same_tensors,
    small_config,
    train,
    train_steps,
    trainable_gpt,
    weights,
)
from utils.distributed import World


class HeldOut:
    """Seven images of random codes, of one crop each."""

    num_crops = 1

    def __init__(self, config: GPTConfig):
        self.codes, self.labels = (x.numpy() for x in random_codes(config, 7))

    def __len__(self) -> int:
        return 7

    def batch(self, images: np.ndarray, crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.codes[images], self.labels[images]


def test_pictures_and_validation_compile_nothing(compiler, monkeypatch, tmp_path):
    """A picture took up to eight compilations in mid-run, an odd last batch of validation one."""
    model = trainable_gpt()
    train_steps(model, 1)
    monkeypatch.setattr(watch, "save_png", lambda *_: None)
    world, decoded = World(0, 1, torch.device("cpu")), []
    vq = Namespace(decode_code=lambda codes: decoded.append(codes) or torch.zeros(16, 3, 8, 8))
    assert compiler.graphs == 1
    losses = watch.validate(model, model, HeldOut(model.config), 7, 2, world, "none")
    watch.draw_samples(model, vq, tmp_path / "a.png", world, "none", False)
    assert compiler.graphs == 1 and decoded[0].shape == (16, 4, 4)
    train_steps(model, 1)
    assert compiler.graphs == 1 and losses["val/loss"] > 0


def test_validation_with_flex_attention_keeps_one_shape(compiler, monkeypatch):
    """It stays compiled: uncompiled FlexAttention holds all scores."""
    model = GPT(small_config()).eval()
    model.init_weights()
    nn.init.normal_(model.output.weight)
    world, codes = World(0, 1, torch.device("cpu")), HeldOut(model.config)
    expected = watch.validate(model, model, codes, 7, 2, world, "none")
    model.block_mask, shapes = "flex", []

    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        shapes.append(len(x))
        model.block_mask = None
        return model(x, y)

    found = watch.validate(forward, model, codes, 7, 2, world, "none")
    assert shapes == [2, 2, 2, 2]
    assert found == pytest.approx(expected)


def test_too_few_held_out_images_are_refused(work, tmp_path):
    options = ("--val-code-path", work / "codes", "--val-images", 1)
    done = train(work, tmp_path / "out", *options, nproc=2, check=False)
    assert (
        done.returncode != 0
        and "--val-images 1: take at least one for each of the 2 processes" in done.stderr
    )
    assert not (tmp_path / "out").exists()


def test_pictures_and_validation_while_training(work, monkeypatch, capfd, tmp_path):
    """The same with sharded weights, gathered by all ranks; training is not changed."""
    base = (
        "--code-path", work / "codes", "--no-local-save", *TRAIN_OPTIONS,
        "--mixed-precision", "none",
    )  # fmt: skip
    watch = (
        "--val-code-path", work / "codes", "--val-every", 4, "--val-images", 20,
        "--vq-ckpt", work / "vq.pt",
    )  # fmt: skip
    quietly(capfd, monkeypatch, *base, "--cloud-save-path", tmp_path / "plain")
    quietly(
        capfd, monkeypatch, *base, *watch, "--sample-every", 10,
        "--cloud-save-path", tmp_path / "ddp",
    )  # fmt: skip
    run_command(
        *TRAIN, *base, *watch, "--sample-every", 10,
        "--cloud-save-path", tmp_path / "fsdp", "--data-parallel", "fsdp", nproc=2,
    )  # fmt: skip
    assert same_tensors(weights(tmp_path / "plain", 15), weights(tmp_path / "ddp", 15))
    pictures = [sorted((tmp_path / k / NAME / "samples").iterdir()) for k in ("ddp", "fsdp")]
    assert [[p.name for p in ps] for ps in pictures] == [["0000010.png", "0000015.png"]] * 2
    for k in ("ddp", "fsdp"):
        whole, first, rest = (
            curve(tmp_path / k, f"val/loss{part}") for part in ("", "_first", "_rest")
        )
        assert len(whole) == 4
        assert whole == pytest.approx((np.array(first) * 4 + np.array(rest) * 60) / 64, abs=1e-6)
    model, _, _ = load_gpt(tmp_path / "ddp" / NAME / "checkpoints" / "0000015.pt", (8, 8))
    from dataset.codes import open_codes

    codes = open_codes(work / "codes")
    images = np.arange(20)
    x, y = codes.batch(images * 24 // 20, images % 10)
    with torch.no_grad():
        logits = model.logits(torch.from_numpy(x), torch.from_numpy(y))
    targets = torch.from_numpy(x)[:, model.permutation]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert curve(tmp_path / "ddp", "val/loss")[-1] == pytest.approx(expected.item(), abs=1e-5)
