"""GPT training as a user runs it: any spread over processes, killed, stopped, resumed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from autoregressive.models.config import VARIANTS, GPT_models, GPTConfig, variant_of
from autoregressive.models.gpt import GPT
from autoregressive.models.load import load_gpt
from autoregressive.train import train_c2i
from scripts.diagnosis.models import fill_from_names
from tests.fake_cuda import CUDA
from tests.helpers import GPT_RUN as NAME
from tests.helpers import (
    NO_DROPOUT,
    TRAIN,
    TRAIN_OPTIONS,
    curve,
    kill,
    newest,
    quietly,
    random_codes,
    run_command,
    same_tensors,
    small_config,
    start,
    train,
    train_words,
    wait_for,
    weights,
)
from utils.checkpoints.weights_file import state_sha256
from utils.parallel import fill, local, shard


def test_training_mixes_two_sets(work, codes105, monkeypatch, capfd, tmp_path):
    mix = ("--mix-code-path", codes105, "--mix-weight", 0.5)
    words = (*train_words(work, tmp_path / "out"), *mix, "--epochs", 1)
    assert "24 images x 20 crops" in quietly(capfd, monkeypatch, *words)


def start_from(trained: Path, cloud: Path, step: int) -> None:
    folder = cloud / NAME / "checkpoints"
    folder.mkdir(parents=True)
    shutil.copytree(trained.parent / f"{step:07d}", folder / f"{step:07d}")


def test_training_resumes_at_the_very_next_step_bit_for_bit(work, trained, tmp_path):
    """All later checkpoints removed, as by a kill: retraining the rest ends in the same bits."""
    start_from(trained, tmp_path, 8)
    (tmp_path / NAME / "checkpoints" / "0000012.tmp").mkdir()
    log = train(work, tmp_path, "--ckpt-every", 4, "--ema").stdout
    assert "at step 8" in log and "step 9 " in log and "step 8 " not in log
    for key in ("model", "ema"):
        assert same_tensors(weights(tmp_path, 15, key), weights(trained.parents[2], 15, key)), key
    assert not same_tensors(weights(tmp_path, 15), weights(tmp_path, 15, "ema"))


# the issue asks for ten kills of each; PAR_KILLS=10 makes them, in about ten minutes
KILLS = int(os.environ.get("PAR_KILLS", "1"))
SPREAD = [("fsdp", 2)] if KILLS == 1 else [("ddp", 1), ("fsdp", 1), ("ddp", 2), ("fsdp", 2)]
EPOCHS = KILLS + 1
STEPS = 12 * EPOCHS
LONG = [
    "--no-local-save", "--mixed-precision", "none", *TRAIN_OPTIONS, "--epochs", EPOCHS,
    "--global-batch-size", 2, "--log-every", 1, "--ema",
]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(work, tmp_path_factory):
    """``uninterrupted(mode, nproc)``: hashes of weights and average after an undisturbed run."""
    known = {}

    def hashes(mode: str, nproc: int) -> list[str]:
        if (mode, nproc) not in known:
            cloud = tmp_path_factory.mktemp("uninterrupted")
            options = [
                "--code-path", work / "codes", "--cloud-save-path", cloud,
                "--data-parallel", mode,
            ]  # fmt: skip
            run_command(*TRAIN, *LONG, *options, nproc=nproc)
            known[mode, nproc] = final_hashes(cloud)
        return known[mode, nproc]

    return hashes


def final_hashes(cloud: Path) -> list[str]:
    return [state_sha256(weights(cloud, STEPS, key)) for key in ("model", "ema")]


@pytest.mark.parametrize("mode, nproc", SPREAD)
def test_killed_at_random_moments_ends_in_the_same_bits(work, uninterrupted, tmp_path, mode, nproc):
    """SIGKILL of all, every other time in the middle of a checkpoint; float32, dropout, EMA."""
    command = [*TRAIN, "--code-path", work / "codes", "--cloud-save-path", tmp_path, *LONG]
    command += ["--ckpt-every", 2, "--data-parallel", mode]
    folder = tmp_path / NAME / "checkpoints"
    rng = np.random.default_rng([nproc, mode == "fsdp"])
    for i in range(KILLS):
        target = newest(folder) + int(rng.integers(2, 12))
        process = start(command, nproc_per_node=str(nproc))
        wait_for(
            lambda t=target, i=i: newest(folder) >= t and (i % 2 or list(folder.glob("*.tmp"))),
            process,
        )
        time.sleep(rng.uniform(0, 0.03))
        kill(process)
    assert newest(folder) < STEPS
    assert "resumed at step" in run_command(*command, nproc=nproc).stdout
    assert final_hashes(tmp_path) == uninterrupted(mode, nproc)


def test_spreading_over_processes_changes_nothing_but_rounding(work, monkeypatch, capfd, tmp_path):
    """1 process at batch 8 = 4 at batch 2 = 4 accumulation steps of 2; DDP = FSDP = hybrid: 21
    steps, loss to 1e-5.
    """
    ways = {
        "one": (1,),
        "accumulated": (1, "--gradient-accumulation-steps", 4),
        "ddp": (4,),
        "fsdp": (4, "--data-parallel", "fsdp", "--gradient-accumulation-steps", 2),
        "hsdp": (4, "--data-parallel", "hsdp", "--shard-size", 2),
    }
    base = (
        "--code-path", work / "codes", "--val-code-path", work / "codes", "--no-local-save",
        *TRAIN_OPTIONS,
    )  # fmt: skip
    base += (
        *NO_DROPOUT, "--mixed-precision", "none", "--epochs", 7, "--log-every", 1,
        "--export", "none",
    )  # fmt: skip
    together = []
    for name, (nproc, *options) in ways.items():
        words = [*base, "--cloud-save-path", tmp_path / name, *options]
        if nproc == 1:
            assert "on 1 x cpu" in quietly(capfd, monkeypatch, *words)
        else:
            together.append([str(word) for word in words])
    # one launch for all: starting a process takes longer than its run
    several = ("bash", "scripts/launch.sh", "-m", "tests.several_runs", json.dumps(together))
    assert run_command(*several, nproc=4).stdout.count("on 4 x cpu") == len(together)
    one = curve(tmp_path / "one")
    assert len(one) == 21 and one[-1] < one[0] - 0.01
    for name in ways:
        assert curve(tmp_path / name) == pytest.approx(one, abs=1e-5), name
        assert curve(tmp_path / name, "grad_norm") == pytest.approx(
            curve(tmp_path / "one", "grad_norm"), rel=1e-3
        )
        assert curve(tmp_path / name, "val/loss") == pytest.approx(
            curve(tmp_path / "one", "val/loss"), abs=1e-5
        )


def test_a_checkpoint_resumes_on_other_processes_and_modes(work, monkeypatch, capfd, tmp_path):
    """5 steps on one process, 5 sharded over two, 5 replicated: the losses of one process."""
    base = (*NO_DROPOUT, "--ema", "--ckpt-every", 5)
    quietly(capfd, monkeypatch, *train_words(work, tmp_path / "one"), *base)
    place = tmp_path / "one" / NAME / "checkpoints"
    for step in (10, 15):
        shutil.rmtree(place / f"{step:07d}")
    (tmp_path / "one" / NAME / "metrics.jsonl").rename(tmp_path / "expected.jsonl")
    for last, options in ((10, ("--data-parallel", "fsdp")), (15, ())):
        log = train(work, tmp_path / "one", *base, *options, nproc=2).stdout
        assert f"resumed at step {last - 5}" in log
        assert last == 10 or "0000012 is damaged: the bytes of 00001-of-00002" in log
        if last == 10:
            shutil.rmtree(place / "0000015")
            shutil.copytree(place / "0000010", place / "0000012")
            damaged = place / "0000012" / "00001-of-00002.safetensors"  # which rank 1 checks
            content = damaged.read_bytes()
            damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            (tmp_path / "one" / NAME / "metrics.jsonl").unlink()
            (place / "0000015.pt").unlink()
    expected = [
        json.loads(line)["loss"] for line in (tmp_path / "expected.jsonl").read_text().splitlines()
    ]
    assert curve(tmp_path / "one") == pytest.approx(expected[10:], abs=1e-5)


def test_half_precision_learns_in_every_mode(work, monkeypatch, capfd, tmp_path):
    """bf16 under DDP, sharded fp16 with its loss scale: first and last losses near float32's."""
    # many processors compute in fp16 by emulation, a hundred times slower
    monkeypatch.setitem(GPT_models, "GPT-T", dict(n_layer=1, dim=32, n_head=1))
    base = (
        "--code-path", work / "codes", "--no-local-save", *TRAIN_OPTIONS, *NO_DROPOUT,
        "--log-every", 1,
    )  # fmt: skip
    curves = {}
    for name, options in {
        "none": (),
        "bf16": (),
        "fp16": ("--data-parallel", "fsdp", "--grad-precision", "fp16"),
    }.items():
        quietly(
            capfd, monkeypatch, *base, "--mixed-precision", name,
            "--cloud-save-path", tmp_path / name, *options,
        )  # fmt: skip
        curves[name] = curve(tmp_path / name)
        assert curves[name] == pytest.approx(curves["none"], abs=5e-3)
        assert curve(tmp_path / name, "skipped")[-1] == 0


def test_sigterm_saves_and_the_run_goes_on(work, uninterrupted, tmp_path):
    """torchrun hands the signal to both processes: one step, both save, both resume bit for bit,
    replicated: each reads its file and sends it to the other.
    """
    command = [*TRAIN, "--code-path", work / "codes", "--cloud-save-path", tmp_path, *LONG]
    process = start(command, nproc_per_node="2")
    log = tmp_path / NAME / "log.txt"
    wait_for(lambda: log.exists() and "step 7 " in log.read_text(), process)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    seen = max(
        int(line.split("step ")[1].split()[0])
        for line in log.read_text().splitlines()
        if ": loss " in line
    )
    saved = newest(tmp_path / NAME / "checkpoints")
    assert saved == seen < STEPS and "stopped by a signal" in log.read_text()
    assert f"resumed at step {saved}" in run_command(*command, nproc=2).stdout
    assert final_hashes(tmp_path) == uninterrupted("ddp", 2)


def test_sigusr1_ends_one_process_with_status_0(work, tmp_path):
    options = [
        "--code-path", work / "codes", "--no-local-save", *TRAIN_OPTIONS, "--epochs", 3000,
        "--log-every", 1,
    ]  # fmt: skip
    process = start([*TRAIN, "--cloud-save-path", tmp_path, *options])
    log = tmp_path / NAME / "log.txt"
    wait_for(lambda: log.exists() and "step 3 " in log.read_text(), process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 0
    assert newest(tmp_path / NAME / "checkpoints") >= 3


def ranks_of(cloud: Path) -> list[int]:
    """Process ids of the ranks that train into ``cloud``, from /proc."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if (
                str(cloud).encode() in words
                and b"--nnodes" not in words  # the launcher
                and b"bash" not in words
            ):
                found.append(int(folder.name))
    return sorted(found)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds the ranks in /proc")
def test_a_rank_that_dies_is_started_again(work, uninterrupted, tmp_path):
    """One of two processes is killed: torchrun starts both again, and they end in equal bits."""
    command = [
        *TRAIN, "--code-path", work / "codes", "--cloud-save-path", tmp_path, *LONG,
        "--ckpt-every", 5,
    ]  # fmt: skip
    process = start([*command, "--data-parallel", "fsdp"], nproc_per_node="2", max_restarts="1")
    wait_for(lambda: newest(tmp_path / NAME / "checkpoints") >= 10, process)
    os.kill(ranks_of(tmp_path)[-1], signal.SIGKILL)
    assert process.wait(timeout=120) == 0
    log = (tmp_path / NAME / "log.txt").read_text()
    assert "new run" in log and "resumed at step" in log
    assert final_hashes(tmp_path) == uninterrupted("fsdp", 2)


def test_a_full_disk_stops_the_run_and_spares_what_was_saved(work, trained, tmp_path):
    """A limit on the size of files stands for a full disk: the shard cannot be written."""
    start_from(trained, tmp_path, 8)
    before = {p: p.read_bytes() for p in (tmp_path / NAME).rglob("*") if p.is_file()}
    options = ("--code-path", work / "codes", "--no-local-save", *TRAIN_OPTIONS, "--ema")
    options = " ".join(map(str, (*options, "--mixed-precision", "none")))
    script = f"ulimit -f 2000; bash {TRAIN[1]} --cloud-save-path {tmp_path} {options}"
    done = run_command("bash", "-c", script, check=False)
    assert done.returncode == 2
    assert re.search(
        r"error: a checkpoint could not be written to .*/checkpoints \([0-9.,]+ [GK]iB free\)",
        done.stderr,
    )
    assert [p.name for p in (tmp_path / NAME / "checkpoints").iterdir()] == ["0000008"]
    assert all(p.read_bytes() == content for p, content in before.items())


def test_local_results_and_cloud_hold_the_same(work, trained, monkeypatch, capfd, tmp_path):
    base = (
        "--cloud-save-path", tmp_path / "cloud", "--results-dir", tmp_path / "results",
        "--epochs", 1,
    )  # fmt: skip
    base += (
        "--code-path", work / "codes", "--gpt-model", "GPT-T", "--global-batch-size", 8,
        "--gpt-ckpt", trained,
    )  # fmt: skip
    quietly(capfd, monkeypatch, *base)
    local, cloud = (tmp_path / p / NAME / "checkpoints" for p in ("results", "cloud"))
    names = sorted(str(p.relative_to(local)) for p in local.rglob("*") if p.is_file())
    assert names == [
        "0000003.pt",
        "0000003/00000-of-00001.safetensors",
        "0000003/meta.json",
    ]
    assert all((local / n).read_bytes() == (cloud / n).read_bytes() for n in names[1:])
    assert same_tensors(weights(tmp_path / "results", 3), weights(tmp_path / "cloud", 3))
    options = json.loads((local.parent / "options.json").read_text())["options"]
    assert (options["lr"], options["lr_schedule"], options["attn_dropout_p"]) == (
        1e-4,
        "cosine",
        0.1,
    )
    assert "loss" in (local.parent / "log.txt").read_text()


def test_variants_travel_with_the_weights(work, monkeypatch, capfd, tmp_path):
    """Into the config and the run's name; training that starts from them has them, or says why."""
    variant = {"order": "1x4", "group_attention": "causal", "special_tokens": "zeros"}
    variant |= {"schedule": "4x16", "special_positions": "predicted"}
    base = (
        "--code-path", work / "codes", "--no-local-save", *TRAIN_OPTIONS, "--epochs", 1,
    )  # fmt: skip
    options = [word for k, v in variant.items() for word in (f"--{k.replace('_', '-')}", v)]
    quietly(capfd, monkeypatch, *base, "--cloud-save-path", tmp_path / "a", *options)
    run = tmp_path / "a" / f"{NAME}-4x16-1x4-causal-zeros-predicted"
    state = next((run / "checkpoints").glob("*.pt"))
    gpt, _, _ = load_gpt(state, grid=None)
    assert variant_of(gpt.config) == variant
    start = (*base, "--gpt-ckpt", state, "--cloud-save-path")
    quietly(capfd, monkeypatch, *start, tmp_path / "b")
    assert (tmp_path / "b" / run.name).is_dir()
    other = quietly(capfd, monkeypatch, *start, tmp_path / "c", "--order", "raster")
    assert "--order raster" in other and "1x4" in other


def test_resuming_takes_the_new_learning_rate(work, trained, monkeypatch, capfd, tmp_path):
    start_from(trained, tmp_path, 8)
    base = (
        "--code-path", work / "codes", "--cloud-save-path", tmp_path, "--no-local-save",
        *TRAIN_OPTIONS,
    )  # fmt: skip
    base += ("--mixed-precision", "none", "--log-every", 1)
    quietly(capfd, monkeypatch, *base, "--lr", 1e-5)
    assert len(curve(tmp_path, "lr")) == 7 and max(curve(tmp_path, "lr")) < 1e-5
    other = quietly(capfd, monkeypatch, *base, "--lr-schedule", "constant")
    assert "another lr_schedule (lr_schedule: cosine there, constant now)" in other


def test_resuming_on_codes_of_another_crop_range_is_refused(
    trained, codes105, monkeypatch, capfd, tmp_path
):
    start_from(trained, tmp_path, 8)
    base = (
        "--cloud-save-path", tmp_path, "--no-local-save", *TRAIN_OPTIONS,
        "--mixed-precision", "none",
    )  # fmt: skip
    log = quietly(capfd, monkeypatch, *base, "--code-path", codes105)
    assert "another crop_range (crop_range: 1.1 there, 1.05 now)" in log


def test_nan_loss_stops_with_the_reason_and_is_never_saved(work, monkeypatch, capfd, tmp_path):
    base = (
        "--code-path", work / "codes", "--cloud-save-path", tmp_path, "--no-local-save",
        *TRAIN_OPTIONS,
    )  # fmt: skip
    base += ("--mixed-precision", "none", "--log-every", 1, "--lr", 1e30, "--ckpt-every", 1)
    log = quietly(capfd, monkeypatch, *base, "--max-skipped-steps", 6)
    assert (
        "error: the last 6 steps up to 8 were all skipped, as their loss was not a finite number"
        in log
    )
    # two steps skipped in a row may be bad luck
    assert newest(tmp_path / NAME / "checkpoints") <= 4


def test_fine_tuning_a_released_file_with_other_classes(work, monkeypatch, capfd, tmp_path):
    """LlamaGen's file, n = 1 and other classes: both tables start anew with a note, no others."""
    config = GPTConfig(
        **GPT_models["GPT-T"],
        vocab_size=64,
        num_classes=7,
        grid_height=8,
        grid_width=8,
        ar_token_num=1,
    )
    state = fill_from_names(GPT(config)).state_dict()
    torch.save({"model": state, "args": Namespace(lr=1e-4)}, tmp_path / "c2i_T.pt")
    base = (
        "--code-path", work / "codes", "--no-local-save", *TRAIN_OPTIONS,
        "--cloud-save-path", tmp_path,
    )  # fmt: skip
    log = quietly(
        capfd, monkeypatch, *base, "--gpt-ckpt", tmp_path / "c2i_T.pt", "--epochs", 1, "--lr", 0
    )
    assert "has 7 classes, the codes have 3: the class table starts anew" in log
    assert "special tokens start anew" in log
    trained = weights(tmp_path, 3)
    assert trained["cls_embedding.embedding_table.weight"].shape == (4, 128)
    assert trained["spe_tok_embeddings.special_embeddings.weight"].shape == (3, 128)
    assert all(
        torch.equal(trained[k], state[k])
        for k in state
        if k != "cls_embedding.embedding_table.weight"
    )


def test_dry_run_forecasts_and_writes_nothing(work, monkeypatch, capfd, tmp_path):
    options = (
        "--code-path", work / "codes", *TRAIN_OPTIONS, "--cloud-save-path", tmp_path / "c",
        "--dry-run",
    )  # fmt: skip
    log = quietly(
        capfd, monkeypatch, *options, "--results-dir", tmp_path / "r", "--vq-ckpt", work / "vq.pt"
    )
    assert "1,591,808 parameters" in log and "step 2 " in log and "step 3 " not in log
    assert (
        "dry run: 0.02 GiB per process" in log
        and "for the 15 steps to do; nothing was written" in log
    )
    assert not list(tmp_path.iterdir())


TRAINED = dict(image_size=64, downsample_size=16, gpt_model="GPT-T", vocab_size=19, num_classes=3)
TRAINED |= dict(ar_token_num=4, spe_token_num=3, gpt_ckpt=None, code_path="codes")
TRAINED |= dict.fromkeys(VARIANTS)
NO_RATES = ("class_dropout_prob", "token_dropout_p", "attn_dropout_p", "dropout_p")


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_no_rank_holds_a_whole_model_in_host_memory(two_ranks, mode):
    """For a GPU: each rank made the whole model on the host, eight times 12 GB for GPT-3B."""
    args = Namespace(**TRAINED, **dict.fromkeys(NO_RATES, 0.0), drop_path_rate=0.0)
    torch.manual_seed(0)
    model, weights, _ = train_c2i.make_model(args, None, CUDA)
    assert all(parameter.is_meta for parameter in model.parameters())
    if mode == "fsdp":
        shard(two_ranks, model, model.layers, mode, "none")
    fill(model, weights, two_ranks.device)

    reference = GPT(model.config)
    torch.manual_seed(0)
    expected = train_c2i.initial_weights(reference, {})
    for (name, whole), parameter in zip(expected, model.parameters(), strict=True):
        part = local(parameter)
        assert parameter.requires_grad and torch.equal(part, whole[: len(part)]), name
        assert len(part) == (len(whole) if mode == "ddp" else -(-len(whole) // 2)), name
    loss, _ = model(*random_codes(model.config))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_initial_weights_are_those_of_init_weights():
    model = GPT(small_config())
    torch.manual_seed(0)
    model.init_weights()
    torch.manual_seed(0)
    weights = dict(train_c2i.initial_weights(model, {"norm.weight": torch.full((32,), 7.0)}))
    assert weights.pop("norm.weight")[0] == 7
    state = {k: v for k, v in model.state_dict().items() if k != "norm.weight"}
    assert same_tensors(weights, state)
