"""Tokenizer training as a user runs it: killed, resumed, over processes, fine-tuned, exported,
and its options.
"""

import json
import os
import shutil
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.effects import SHARED_EFFECTS, Command, Effect, Recorded, options_of
from tests.helpers import (
    TRAIN_VQ,
    kill,
    newest,
    quietly,
    run_command,
    same_tensors,
    small_state,
    start,
    take_step,
    wait_for,
)
from tokenizer import train_vq, vq_model
from tokenizer.load import load_vq
from tokenizer.vq_model import VQConfig, VQModel
from utils.checkpoints.folder import read_sharded
from utils.distributed import World
from utils.training import run as training_run
from utils.training import state as training_state

NAME = "VQ-4-24"
NO_GAN = ("--perceptual-weight", 0, "--disc-weight", 0)
GAN = ("--disc-weight", 0.5, "--disc-start", 2)
SMALL = (
    "--vq-model", "VQ-4", "--codebook-size", 64, "--image-size", 24, "--global-batch-size", 8,
    "--lr", 1e-3,
)  # fmt: skip
SMALL += ("--num-workers", 0, "--mixed-precision", "none", "--log-every", 1, "--epochs", 1)


def words(work: Path, cloud: Path, *options: object) -> list[object]:
    return [
        "--data-path", work / "images", "--cloud-save-path", cloud, "--no-local-save", *SMALL,
        *NO_GAN, *options,
    ]  # fmt: skip


@pytest.fixture
def train(work, capfd, monkeypatch):
    def trained(cloud: Path, *options: object) -> str:
        return quietly(capfd, monkeypatch, *words(work, cloud, *options), main=train_vq.main)

    return trained


def tensors(cloud: Path, step: int) -> dict[str, Tensor]:
    return read_sharded(cloud / NAME / "checkpoints" / f"{step:07d}", "")


def curve(cloud: Path, what: str) -> list[float]:
    return [
        json.loads(line)[what] for line in (cloud / NAME / "metrics.jsonl").read_text().splitlines()
    ]


LIVELY = (
    *GAN, "--disc-adaptive-weight", "--ema", "--epochs", 2, "--dropout-p", 0.1,
    "--entropy-loss-ratio", 0.1,
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(work, tmp_path_factory):
    """6 steps of everything at once, that nothing disturbed."""
    cloud = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["train_vq.py", *map(str, words(work, cloud, *LIVELY, "--ckpt-every", 4))]
        )
        train_vq.main()
    return cloud


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


EFFECTS = SHARED_EFFECTS | {
    "data_face_path": Effect("{work}/images", "files"),
    "image_size": Effect(12, "files"),
    "no_flip": Effect(None, "model"),
    "num_workers": Effect(1, "loader"),
    "vq_model": Effect("VQ-8", "printed", "--vq-ckpt {work}/vq.pt"),
    "vq_ckpt": Effect("{work}/vq.pt", "model"),
    "finetune": Effect(
        None, "printed", "--vq-ckpt {folder} --epochs 3 --disc-weight 0.5 --image-size 24"
    ),
    "codebook_size": Effect(32, "model"),
    "codebook_embed_dim": Effect(4, "model"),
    "codebook_l2_norm": Effect(False, "model"),
    "dropout_p": Effect(0.5, "model"),
    "codebook_init": Effect("kmeans", "model"),
    "revive_dead_codes": Effect(1, "model"),
    "reconstruction_loss": Effect("l1", "model"),
    "reconstruction_weight": Effect(0.5, "model"),
    "codebook_weight": Effect(0.5, "model"),
    "commit_loss_beta": Effect(0.5, "model"),
    "entropy_loss_ratio": Effect(0.1, "model"),
    "perceptual_weight": Effect(0.5, "model", "--image-size 16 --vgg-weights {vgg}"),
    "vgg_weights": Effect("{vgg}", "printed", "--image-size 16 --perceptual-weight 0.5"),
    "disc_weight": Effect(0.5, "model", "--disc-start 2 --image-size 24"),
    "disc_start": Effect(3, "model", "--disc-weight 0.5 --disc-start 2 --image-size 24"),
    "disc_type": Effect("stylegan", "printed", "--disc-weight 0.5 --dry-run"),
    "disc_loss": Effect(
        "vanilla", "discriminator", "--disc-weight 0.5 --disc-start 2 --image-size 24"
    ),
    "gen_loss": Effect(
        "non-saturating", "model", "--disc-weight 0.5 --disc-start 2 --image-size 24"
    ),
    "disc_adaptive_weight": Effect(
        None, "model", "--disc-weight 0.5 --disc-start 2 --image-size 24"
    ),
    "epochs": Effect(2, "files"),
    "global_batch_size": Effect(12, "files"),
    "lr": Effect(1e-2, "model"),
    "lr_schedule": Effect("cosine", "model"),
    "compile": Effect(None, "compiles"),
}
# read by helpers that both trainers call, where the loop has no part in it
TESTED_WITH_THE_GPT = {
    "keep_last",
    "keep_every",
    "wandb_project",
    "max_skipped_steps",
    "no_local_save",
}
TESTED_WITH_THE_GPT |= {"results_dir"}


def test_the_table_of_effects_names_every_option():
    declared = options_of("tokenizer/options.py", "utils/training/options.py")
    assert declared == set(EFFECTS) | {"data_path", "cloud_save_path"} | TESTED_WITH_THE_GPT


@pytest.fixture(scope="module")
def command(work, vgg, whole, tmp_path_factory) -> Command:
    """The training command, with the files that options in EFFECTS name."""
    base = (
        "--data-path", "{work}/images", "--cloud-save-path", "{place}/cloud",
        "--results-dir", "{place}/results",
    )  # fmt: skip
    return Command(
        main=train_vq.main,
        base=(*base, *SMALL, *NO_GAN, "--log-every", 2, "--image-size", 8),
        places={"work": work, "vgg": vgg, "folder": whole / NAME / "checkpoints" / "0000004"},
        scratch=tmp_path_factory.mktemp("effects"),
        printed=r"error: .*|step \d+.*?loss [0-9.]+|gan: .*|new run|resumed at .*",
        weights=lambda place, part: read_sharded(
            max(place.glob("cloud/*/checkpoints/*/")), f"{part}."
        ),
        recorded={
            "compiles": Recorded(torch.nn.Module, "compile", skip=True),
            "guard": Recorded(training_state, "Guard"),
            "loader": Recorded(train_vq, "DataLoader"),
        },
    )


@pytest.mark.parametrize("option", EFFECTS)
def test_every_option_has_an_effect(command, tmp_path, monkeypatch, capfd, option):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(train_vq, "revive_dead_codes", revive_all_but_one)
    assert command.has_effect(option, EFFECTS[option], tmp_path, capfd, monkeypatch)


def revive_all_but_one(
    args: Namespace, world: World, state: train_vq.VQState, *rest: object
) -> None:
    """The real thing waits for 65,536 codes: here a few are enough to tell the dead."""
    used = state.model.quantize.codebook_used
    window = used.clone()
    used.fill_(3)
    REVIVE(args, world, state, *rest)
    used.copy_(window)


REVIVE = train_vq.revive_dead_codes


def test_reviving_moves_dead_entries_of_weights_and_average(work, train, tmp_path, monkeypatch):
    """All entries but 3 are dead, so both end equal at unit latents, and entry 3 differs."""
    monkeypatch.setattr(train_vq, "revive_dead_codes", revive_all_but_one)
    train(tmp_path, "--revive-dead-codes", 3, "--ema")
    state = tensors(tmp_path, 3)
    same = (state["model.quantize.embedding.weight"] == state["ema.quantize.embedding.weight"]).all(
        1
    )
    assert same.tolist() == [i != 3 for i in range(64)]
    moved = state["model.quantize.embedding.weight"][same]
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(63))


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


@pytest.mark.parametrize("before, after", [(False, True), (True, False), (True, True)])
def test_loss_scales_of_both_models_survive_a_change_of_precision(before, after):
    """As on another machine: fp16 (True) has a loss scale for each; bf16 and float32 have none."""

    def state(fp16: bool) -> train_vq.VQState:
        parts = [small_state(1.0, fp16=fp16) for _ in range(2)]
        return train_vq.VQState(**vars(parts[0]), discriminator=parts[1])

    saved, resumed = state(before), state(after)
    for step in range(3):
        take_step(saved, step, 1.0)
        take_step(saved.discriminator, step, 1.0)
    if before:
        saved.discriminator.scaler.update(8.0)
    start = resumed.scaler.get_scale()
    resumed.load_scalars(json.loads(json.dumps(saved.scalars())))
    assert resumed.guard.state.tolist() == saved.guard.state.tolist()
    assert resumed.scaler.get_scale() == start
    assert resumed.discriminator.scaler.get_scale() == (8.0 if before and after else start)
    for part in (resumed, resumed.discriminator):
        take_step(part, 3, 1.0)
        assert part.guard.skipped == 0


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
