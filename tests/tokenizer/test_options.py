"""Every option of tokenizer training has an effect."""

import pytest
import torch

from tests.effects import SHARED_EFFECTS, Command, Effect, Recorded, options_of
from tests.tokenizer.helpers import NAME, NO_GAN, SMALL, revive_all_but_one
from tokenizer import options, train_vq, vq_loss
from utils.checkpoints.folder import read_sharded
from utils.training import state as training_state

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


def test_choices_are_the_losses_there_are():
    """Their names stand in options.py again, which imports no torch."""
    for name in ("PIXEL_LOSSES", "DISCRIMINATOR_LOSSES", "GENERATOR_LOSSES"):
        assert getattr(options, name) == tuple(getattr(vq_loss, name))


def test_every_discriminator_is_another():
    kinds = {type(vq_loss.make_discriminator(kind, 32)) for kind in options.DISCRIMINATORS}
    assert len(kinds) == len(options.DISCRIMINATORS)
