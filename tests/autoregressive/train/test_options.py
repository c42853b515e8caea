"""Every option of GPT training has an effect."""

import pytest
import torch

from autoregressive.train import train_c2i
from tests.effects import SHARED_EFFECTS, Command, Effect, Recorded, options_of
from utils.checkpoints.weights_file import load_checkpoint
from utils.training import state as training_state

EFFECTS = SHARED_EFFECTS | {
    "mix_code_path": Effect("{codes105}", "model"),
    "mix_weight": Effect(0.1, "model", "--mix-code-path {codes105}"),
    "image_size": Effect(64, "printed"),
    "downsample_size": Effect(8, "printed"),
    "num_classes": Effect(4, "printed"),
    "vocab_size": Effect(65, "printed"),
    "gpt_model": Effect("GPT-S", "files"),
    "gpt_ckpt": Effect("{trained}", "model"),
    "gpt_resume": Effect("{resume}", "printed"),
    "ar_token_num": Effect(16, "files"),
    "spe_token_num": Effect(2, "printed"),
    "dropout_p": Effect(0.5, "model"),
    "attn_dropout_p": Effect(0.5, "model"),
    "schedule": Effect("4x16", "model"),
    "order": Effect("raster", "model"),
    "group_attention": Effect("causal", "model"),
    "special_tokens": Effect("shared", "model"),
    "special_positions": Effect("predicted", "model"),
    "token_dropout_p": Effect(0.5, "model"),
    "class_dropout_prob": Effect(1.0, "model"),
    "drop_path_rate": Effect(0.5, "model"),
    "recipe": Effect("as-released", "model"),
    "epochs": Effect(2, "files"),
    "global_batch_size": Effect(12, "files"),
    "lr": Effect(1e-2, "model"),
    "lr_schedule": Effect("constant", "model"),
    "warmup_epochs": Effect(1, "model"),
    "grad_precision": Effect("bf16", "model", "--data-parallel fsdp"),
    "data_parallel": Effect("fsdp", "printed"),
    "shard_size": Effect(1, "printed"),
    "cpu_offload": Effect(None, "printed"),
    "activation_checkpointing": Effect("full", "recomputes"),
    "attention": Effect("flex", "printed"),
    "compile": Effect(None, "compiles"),
    "val_code_path": Effect("{codes105}", "printed"),
    "val_every": Effect(1, "printed", "--val-code-path {codes105}"),
    "val_images": Effect(8, "metrics", "--val-code-path {codes105}"),
    "vq_ckpt": Effect("{work}/vq.pt", "files"),
    "sample_every": Effect(1, "files", "--vq-ckpt {work}/vq.pt"),
    "export": Effect("safetensors", "files"),
    "max_skipped_steps": Effect(1, "printed", "--lr 1e30"),
    "no_local_save": Effect(None, "files"),
    "results_dir": Effect("{place}/other", "files"),
    "keep_last": Effect(1, "files", "--ckpt-every 1 --keep-every 0"),
    "keep_every": Effect(1, "files", "--ckpt-every 1 --keep-last 1"),
    "wandb_project": Effect("p", "printed"),
}
REQUIRED = {"code_path", "cloud_save_path"}


def test_the_table_of_effects_names_every_option():
    declared = options_of("autoregressive/train/options.py", "utils/training/options.py")
    assert declared == set(EFFECTS) | REQUIRED


@pytest.fixture(scope="module")
def command(work, trained, codes105, tmp_path_factory) -> Command:
    """The training command, with the folders that options in EFFECTS name."""
    base = [
        "--code-path", "{work}/codes", "--cloud-save-path", "{place}/cloud",
        "--results-dir", "{place}/results",
    ]  # fmt: skip
    base += [
        "--gpt-model", "GPT-T", "--global-batch-size", 8, "--epochs", 1, "--warmup-epochs", 0,
        "--lr", 1e-3,
    ]  # fmt: skip
    base += ["--log-every", 2, "--ckpt-every", 2, "--mixed-precision", "none"]
    return Command(
        main=train_c2i.main,
        base=tuple(base),
        places={
            "work": work,
            "trained": trained,
            "codes105": codes105,
            "resume": trained.parent / "0000008",
        },
        scratch=tmp_path_factory.mktemp("effects"),
        printed=r"error: .*|step \d+.*?loss [0-9.]+|GPT-T: .*|resumed at .*",
        weights=lambda place, part: load_checkpoint(next(place.rglob("*.pt")), "").get(part, {}),
        recorded={
            "compiles": Recorded(torch.nn.Module, "compile", skip=True),
            "recomputes": Recorded(train_c2i.GPT, "recompute_activations"),
            "guard": Recorded(training_state, "Guard"),
        },
    )


@pytest.mark.parametrize("option", EFFECTS)
def test_every_option_has_an_effect(command, tmp_path, monkeypatch, capfd, option):
    assert command.has_effect(option, EFFECTS[option], tmp_path, capfd, monkeypatch)


def test_an_option_without_effect_is_found(command, tmp_path, monkeypatch, capfd):
    """The harness itself: a default written out changes nothing, so tables of effects can fail."""
    assert not command.has_effect("beta1", Effect(0.9, "model"), tmp_path, capfd, monkeypatch)
