"""Tokenizer training as a user runs it: killed, resumed, over processes, fine-tuned, exported."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import TRAIN_VQ, kill, newest, run_command, same_tensors, start, wait_for
from tests.tokenizer.helpers import GAN, LIVELY, NAME, tensors, words
from tokenizer import vq_model
from tokenizer.load import load_vq
from tokenizer.vq_model import VQConfig, VQModel
from utils.training import run as training_run


def curve(cloud: Path, what: str) -> list[float]:
    return [
        json.loads(line)[what] for line in (cloud / NAME / "metrics.jsonl").read_text().splitlines()
    ]


def test_killed_and_resumed_ends_in_the_same_bits(work, whole, train, tmp_path):
    """SIGKILL under way; weights, average, discriminator, both optimizers, usage window."""
    folder = tmp_path / NAME / "checkpoints"
    command = [*TRAIN_VQ, *words(work, tmp_path, *LIVELY, "--ckpt-every", 1)]
    process = start(command, OMP_NUM_THREADS=str(torch.get_num_threads()))
    wait_for(lambda: newest(folder) >= 2, process)
    time.sleep(0.02)
    kill(process)
    assert 2 <= newest(folder) < 6
    assert "resumed at step" in train(tmp_path, *LIVELY)
    found, expected = tensors(tmp_path, 6), tensors(whole, 6)
    assert {k.split(".")[0] for k in found} == {"model", "ema", "optimizer", "discriminator"}
    assert "discriminator.optimizer.conv_in.weight.exp_avg_sq" in found
    assert same_tensors(found, expected)


def test_resuming_from_a_folder_elsewhere_or_from_its_weights_alone(whole, train, tmp_path):
    """--vq-ckpt FOLDER goes on at its step to the same bits; --finetune starts at step 0."""
    folder = whole / NAME / "checkpoints" / "0000004"
    assert "resumed at step 4" in train(tmp_path / "on", *LIVELY, "--vq-ckpt", folder)
    assert same_tensors(tensors(tmp_path / "on", 6), tensors(whole, 6))
    still = ("--vq-ckpt", folder, "--finetune", "--lr", 0, "--epochs", 1)
    assert "new run" in train(tmp_path / "anew", *LIVELY, *still)
    before, after = tensors(whole, 4), tensors(tmp_path / "anew", 3)
    taken = [k for k in before if k.startswith("discriminator.model.")]
    assert taken and all(torch.equal(after[k], before[k]) for k in taken)
    assert torch.equal(
        after["model.decoder.conv_out.weight"], before["ema.decoder.conv_out.weight"]
    )


def test_gan_loss_starts_exactly_at_disc_start(train, tmp_path):
    """Until then weights are those without a discriminator; from that step both differ."""
    train(tmp_path / "without", "--ckpt-every", 1)
    train(tmp_path / "with", "--ckpt-every", 1, "--disc-weight", 0.5, "--disc-start", 3)
    assert curve(tmp_path / "with", "adversarial_weight") == [0.0, 0.0, 0.5]
    assert (
        curve(tmp_path / "with", "discriminator")[:2]
        == [0.0, 0.0]
        != curve(tmp_path / "with", "logits_real")[2:]
    )
    for step, same in ((2, True), (3, False)):
        pair = [tensors(tmp_path / k, step) for k in ("with", "without")]
        assert all(torch.equal(pair[0][k], pair[1][k]) for k in pair[1]) is same
    told = [tensors(tmp_path / "with", k)["discriminator.model.conv_in.weight"] for k in (1, 2, 3)]
    assert torch.equal(told[0], told[1]) and not torch.equal(told[1], told[2])


def test_two_processes_see_the_losses_of_one(work, train, tmp_path):
    """To rounding without a GAN loss, whose batch norm sees one process's images; then all runs."""
    options = ("--disc-weight", 0.5, "--disc-start", 4, "--disc-adaptive-weight", "--epochs", 2)
    options += ("--codebook-init", "kmeans", "--revive-dead-codes", 2)
    train(tmp_path / "one", *options, "--gradient-accumulation-steps", 2)
    run_command(*TRAIN_VQ, *words(work, tmp_path / "two", *options), nproc=2)
    for what in ("loss", "grad_norm", "codebook_used", "perplexity"):
        one, two = (curve(tmp_path / k, what) for k in ("one", "two"))
        assert two[:3] == pytest.approx(one[:3], rel=1e-3), what
    assert len(two) == 6 and min(curve(tmp_path / "two", "adversarial_weight")[3:]) > 0


def test_fine_tuning_the_released_file_and_exporting_it(work, tmp_path):
    """train_vq_finetune.sh on a small released-format file; the result loads as such a file."""
    config = VQConfig(**vq_model.VQ_models["VQ-4"])
    torch.manual_seed(0)
    model = VQModel(config)
    model.quantize.codebook_used.zero_()
    torch.save({"model": model.state_dict()}, tmp_path / "released.pt")
    options = words(
        work, tmp_path, "--vq-ckpt", tmp_path / "released.pt", "--lr", 0, "--codebook-size", 256
    )
    log = run_command(
        "bash", "scripts/tokenizer/train_vq_finetune.sh", *options, "--disc-weight", 0.5
    ).stdout
    assert "patchgan: 2,765,633 parameters, from step 0" in log
    assert min(curve(tmp_path, "adversarial_weight")) == 0.5
    assert curve(tmp_path, "codebook_used")[0] <= 8 * 36 / 256
    exported, name = load_vq(tmp_path / NAME / "checkpoints" / "0000003.pt", None)
    assert name == "VQ-4" and same_tensors(exported.weights(), model.weights())


@pytest.mark.parametrize(
    "options, message",
    [
        (("--perceptual-weight", 1), "needs VGG16's weights: vgg16-397923af.pth"),
        (("--finetune",), "--finetune needs --vq-ckpt"),
        (
            ("--codebook-init", "data", "--vq-ckpt", "x.pt"),
            "--codebook-init data makes a new codebook",
        ),
        (("--compile", "--disc-adaptive-weight"), "--disc-adaptive-weight takes gradients apart"),
        (("--disc-weight", 1, "--disc-type", "stylegan"), "--image-size 24 is not a power of 2"),
        (
            ("--codebook-init", "kmeans", "--codebook-size", 1024),
            "24 images have 864 latents for 1024 entries",
        ),
    ],
)
def test_mistakes_are_one_line_before_work_starts(train, tmp_path, monkeypatch, options, message):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    log = train(tmp_path / "out", *options)
    assert message in log and log.startswith("error: ") and log.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_resuming_with_another_discriminator_is_refused(whole, train, tmp_path):
    (tmp_path / NAME / "checkpoints").mkdir(parents=True)
    shutil.copytree(
        whole / NAME / "checkpoints" / "0000004", tmp_path / NAME / "checkpoints" / "0000004"
    )
    assert "another disc_type (disc_type: patchgan there, None now)" in train(
        tmp_path, *LIVELY, "--disc-weight", 0
    )


def test_dry_run_counts_the_discriminator_and_writes_nothing(train, tmp_path):
    log = train(tmp_path / "out", "--disc-weight", 0.5, "--dry-run")
    assert "adversarial" in log and "nothing was written" in log and not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_saves_both(train, tmp_path, monkeypatch, number):
    """A signal in step 2: saved after it or the next, the run ends; then signals are as before."""
    before = signal.getsignal(number)
    seed_step = training_run.seed_step

    def step(seed: int, step: int, rank: int) -> None:
        seed_step(seed, step, rank)
        if step == 1:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(training_run, "seed_step", step)
    assert "stopped by a signal" in train(tmp_path, *GAN, "--epochs", 3)
    last = newest(tmp_path / NAME / "checkpoints")
    assert 2 <= last < 9 and "discriminator.model.conv_in.weight" in tensors(tmp_path, last)
    assert signal.getsignal(number) == before


def test_auto_follows_the_machine(train, monkeypatch, tmp_path):
    monkeypatch.setenv("PAR_CPU", "avx2")
    log = train(tmp_path, "--mixed-precision", "auto")
    assert (
        "--mixed-precision none (float32): this CPU computes in bfloat16 only by emulation" in log
    )
    assert "(PAR_CPU=avx2)" in log
    assert (
        json.loads((tmp_path / NAME / "options.json").read_text())["options"]["mixed_precision"]
        == "none"
    )
