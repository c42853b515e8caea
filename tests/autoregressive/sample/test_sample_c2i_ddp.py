"""Sampling for metrics as a user runs it: one process or two, killed or not, released files."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import threading
import time
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.decoding.cpu import build
from autoregressive.decoding.decoder import Way
from autoregressive.models.gpt import GPT, GPT_models, GPTConfig
from autoregressive.sample import sample_c2i_ddp
from scripts.diagnosis.models import fill_from_names
from tests.fake_cuda import fake_cuda
from tests.helpers import SAMPLE, digest, kill, quietly, run_command, small_config, start
from tokenizer.vq_model import VQModel, make_vq_config
from utils.distributed import World


def sample_words(work: Path, gpt: Path, folder: Path) -> tuple[object, ...]:
    """Return the options for 22 samples of 24 x 24 pixels in six batches."""
    return (
        "--vq-ckpt", work / "vq.pt", "--gpt-ckpt", gpt, "--sample-dir", folder,
        "--image-size-eval", 24, "--num-fid-samples", 22, "--per-proc-batch-size", 4,
        "--precision", "none", "--cfg-scale", 1.5,
    )  # fmt: skip


def sample(work: Path, gpt: Path, folder: Path, *options: object, nproc: int = 1):
    return run_command(*SAMPLE, *sample_words(work, gpt, folder), *options, nproc=nproc)


@pytest.fixture
def sample_here(work, capfd, monkeypatch):
    """``sample_here(gpt, folder, *options)``: as ``sample``, in this process; what it printed."""

    def run(gpt: Path, folder: Path, *options: object) -> str:
        words = (*sample_words(work, gpt, folder), *options)
        return quietly(capfd, monkeypatch, *words, main=sample_c2i_ddp.main)

    return run


SAMPLE_NAME = "GPT-T-0000015-size-32-size-24-VQ-4-topk-0-topp-1.0-temperature-1.0-cfg-1.5-seed-0"


@pytest.fixture(scope="module")
def sampled(work, trained) -> Path:
    sample(work, trained, work / "samples")
    return work / "samples" / f"{SAMPLE_NAME}.npz"


def test_samples_have_the_published_form(sampled):
    with np.load(sampled, allow_pickle=False) as npz:
        assert npz["arr_0"].shape == (22, 24, 24, 3) and npz["arr_0"].dtype == np.uint8
        assert npz["labels"].shape == (22,) and set(npz["labels"]) <= {0, 1, 2}
    assert json.loads(sampled.with_suffix(".json").read_text())["options"]["cfg_scale"] == 1.5
    assert sorted(p.name for p in sampled.parent.iterdir()) == [
        f"{SAMPLE_NAME}.json",
        f"{SAMPLE_NAME}.npz",
    ]


def test_two_processes_and_a_kill_give_the_same_bytes(work, trained, sampled, tmp_path):
    command = [*SAMPLE, *sample_words(work, trained, tmp_path)]
    process = start(command)
    deadline = time.time() + 120
    while not any(sum(p.read_bytes()) >= 2 for p in tmp_path.glob("*.done*")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.005)
    kill(process)
    assert not (tmp_path / f"{SAMPLE_NAME}.npz").exists()
    made = sum(sum(p.read_bytes()) for p in tmp_path.glob("*.done*"))
    log = run_command(*command, "--png", nproc=2).stdout
    assert f"{6 - made} of 6 batches of 4 to make on 2 x cpu" in log
    assert digest(tmp_path / f"{SAMPLE_NAME}.npz") == digest(sampled)
    assert sorted(p.suffix for p in tmp_path.iterdir() if p.is_file()) == [".json", ".npz"]


@pytest.mark.skipif(shutil.which("taskset") is None, reason="taskset is not installed")
def test_one_core_gives_the_same_bytes(work, trained, sampled, tmp_path):
    one_core = ("taskset", "-c", min(os.sched_getaffinity(0)))
    run_command(*one_core, *SAMPLE, *sample_words(work, trained, tmp_path))
    assert digest(tmp_path / f"{SAMPLE_NAME}.npz") == digest(sampled)


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    build.load.cache_clear()
    yield
    build.load.cache_clear()


def test_sampling_without_a_compiler_is_said(trained, sampled, sample_here, no_compiler, tmp_path):
    log = sample_here(trained, tmp_path)
    assert "slower than our kernels, which cannot be had: no C++ compiler" in log
    assert not json.loads((tmp_path / f"{SAMPLE_NAME}.json").read_text())["options"]["compile"]
    with np.load(sampled) as by_kernels, np.load(tmp_path / f"{SAMPLE_NAME}.npz") as by_torch:
        assert (by_kernels["arr_0"] == by_torch["arr_0"]).mean() > 0.99
    refused = sample_here(trained, tmp_path / "none", "--compile")
    assert "error: --compile: no kernels for decoding on this CPU" in refused


def test_pngs_are_the_images(trained, sample_here, tmp_path):
    sample_here(trained, tmp_path, "--png")
    pngs = sorted((tmp_path / SAMPLE_NAME).iterdir())
    with np.load(tmp_path / f"{SAMPLE_NAME}.npz", allow_pickle=False) as npz:
        assert np.array_equal(np.stack([np.asarray(Image.open(p)) for p in pngs]), npz["arr_0"])


def test_balanced_classes_take_turns(work, trained, sampled, tmp_path):
    sample(work, trained, tmp_path, "--class-protocol", "balanced")
    with np.load(tmp_path / f"{SAMPLE_NAME}.npz") as npz, np.load(sampled) as drawn:
        assert npz["labels"].tolist() == [i % 3 for i in range(22)]
        same = npz["labels"] == drawn["labels"]
        assert 0 < same.sum() < 22
        # the same randomness, image by image
        assert np.array_equal(npz["arr_0"][same], drawn["arr_0"][same])


@pytest.mark.parametrize("n", [1, 16])
@pytest.mark.parametrize("key", ["model", None])
def test_released_checkpoints_sample_with_and_without_flags(sample_here, tmp_path, n, key):
    """A released file has no config of ours: size, n and classes are read off its weights."""
    config = GPTConfig(**GPT_models["GPT-T"], vocab_size=64, num_classes=3, ar_token_num=n)
    state = fill_from_names(GPT(config)).state_dict()
    torch.save(
        {key: state, "args": argparse.Namespace(lr=1e-4)} if key else state, tmp_path / "PAR-T.pt"
    )
    flags = (
        ("--gpt-model", "GPT-T", "--ar-token-num", n, "--spe-token-num", n - 1)
        if key
        else ("--from-fsdp",)
    )
    options = ("--image-size", 32, "--num-fid-samples", 2, *flags)
    log = sample_here(tmp_path / "PAR-T.pt", tmp_path, *options)
    assert f"n = {n}, {n + 64 // n - 1} steps per batch" in log
    (npz,) = tmp_path.glob("GPT-T-PAR-T-size-32-size-24-VQ-4-*-seed-0.npz")
    assert np.load(npz)["arr_0"].shape == (2, 24, 24, 3)


def test_jacobi_decoding_makes_the_same_file(work, tmp_path, capfd, monkeypatch):
    """With the noise it takes by default, and the schedule that the checkpoint records."""
    config = GPTConfig(
        **GPT_models["GPT-T"], vocab_size=64, num_classes=3, grid_height=8, grid_width=8,
        ar_token_num=16, schedule="nested",
    )  # fmt: skip
    model = fill_from_names(GPT(config))
    checkpoint = {"model": model.state_dict(), "config": asdict(config), "gpt_model": "GPT-T"}
    torch.save(checkpoint, tmp_path / "PAR-T.pt")
    arrays = []
    for folder, *options in (("steps", "--noise", "gumbel"), ("jacobi", "--jacobi", 8)):
        words = ["--vq-ckpt", work / "vq.pt", "--gpt-ckpt", tmp_path / "PAR-T.pt", "--compile"]
        words += ["--num-fid-samples", 3, "--per-proc-batch-size", 2, "--precision", "none"]
        words += ["--sample-dir", tmp_path / folder, *options]
        said = quietly(capfd, monkeypatch, *words, main=sample_c2i_ddp.main)
        assert "n = 16, 10 steps per batch" in said
        (npz,) = (tmp_path / folder).glob("*-size-32-size-32-*.npz")  # as trained
        arrays.append(np.load(npz)["arr_0"])
        recorded = json.loads(npz.with_suffix(".json").read_text())
        assert recorded["options"]["schedule"] == "nested"
        calls = recorded["speed"]["forward_calls_per_batch"]
        assert calls == 10 if folder == "steps" else 2 <= calls <= 10
    assert np.array_equal(*arrays)
    words[-2:] = ["--schedule", "region"]
    said = quietly(capfd, monkeypatch, *words, main=sample_c2i_ddp.main)
    assert "--schedule region contradicts" in said and "which says nested" in said


def test_samples_of_other_options_are_not_taken_for_these(trained, sampled, sample_here):
    """The published name leaves out the number of images: more must not be answered by fewer."""
    again = sample_here(trained, sampled.parent)
    assert "is there already, made with these options" in again
    before = digest(sampled)
    log = sample_here(trained, sampled.parent, "--num-fid-samples", 30)
    assert "error: " in log and "made with other options or weights" in log
    assert digest(sampled) == before


def test_what_killed_writers_left_does_not_hinder(work, trained, sampled, tmp_path):
    """Killed after the record, half a header written; other options under the same name."""
    fingerprint = json.loads(sampled.with_suffix(".json").read_text())["fingerprint"]
    (tmp_path / f"{SAMPLE_NAME}.npz.{fingerprint}.done").write_bytes(b"\1\1\1\0\0\0")
    (tmp_path / f"{SAMPLE_NAME}.npz.{fingerprint}.partial").write_bytes(b"PK")
    (tmp_path / f"{SAMPLE_NAME}.npz.00000000.partial").write_bytes(b"other")
    sample(work, trained, tmp_path)
    assert digest(tmp_path / f"{SAMPLE_NAME}.npz") == digest(sampled)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".npz", ".partial"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "nproc, environment, prefix",
    [(2, {}, "error( on rank 1)?"), (1, {"RANK": "1"}, "error on rank 1")],
)
def test_a_mistake_is_said_whichever_process_meets_it(nproc, environment, prefix):
    words = ("--vq-ckpt", "nowhere.pt", "--gpt-ckpt", "nowhere.pt")
    done = run_command(*SAMPLE, *words, nproc=nproc, check=False, **environment)
    assert done.returncode == 2
    assert re.match(f"{prefix}: --gpt-ckpt: nowhere.pt does not exist in .*\n$", done.stderr)


def test_moving_average_of_weights_can_be_sampled(work, trained, sampled, sample_here, tmp_path):
    sample(work, trained, tmp_path, "--gpt-ema")
    assert digest(tmp_path / f"{SAMPLE_NAME}.npz") != digest(sampled)
    state = torch.load(trained, weights_only=True)
    torch.save({"model": state["model"]}, tmp_path / "plain.pt")
    options = ("--image-size", 32, "--gpt-ema")
    log = sample_here(tmp_path / "plain.pt", tmp_path, *options)
    assert re.search("error: --gpt-ema: .*plain.pt holds no moving average", log)


def test_samples_of_another_tokenizer_are_refused(trained, sample_here, tmp_path):
    """A tokenizer of the right shape whose codes the GPT has not learned."""
    other = VQModel(make_vq_config("VQ-4", codebook_size=64))
    torch.save(
        {"model": other.state_dict(), "vq_model": "VQ-4", "config": asdict(other.config)},
        tmp_path / "vq.pt",
    )
    log = sample_here(trained, tmp_path, "--vq-ckpt", tmp_path / "vq.pt")
    assert "error: " in log and "is not the tokenizer that made the codes of --gpt-ckpt" in log


class Stream:
    """Stands for a CUDA stream and its events, and notes the device of the thread that waits."""

    devices: ClassVar[list[object]] = []

    def wait_event(self, event: object) -> None:
        self.devices.append(getattr(CURRENT, "device", 0))

    def record_event(self) -> object:
        return object()


CURRENT = threading.local()


def test_images_are_written_by_a_thread_on_the_device_of_the_rank(monkeypatch):
    """A new thread's device is 0: each rank opened a context there."""
    device = torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda d: setattr(CURRENT, "device", d.index))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(Stream, "devices", [])
    pinned: list[torch.Tensor] = []  # from other memory a copy waits until the GPU is idle
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    codes = torch.zeros(2, 16, dtype=torch.int64)

    class FakeGenerator:
        calls = 7

        def __call__(self, cond, randomness):
            return codes

    pipeline = Namespace(
        gpt=GPT(small_config()),
        make_generator=lambda *_: FakeGenerator(),
        randomness=lambda *_: None,
        decode=lambda codes: torch.zeros(2, 3, 8, 8),
    )
    file = Namespace(images_of=lambda c: range(2 * c, 2 * c + 2), write=lambda *_: None)
    args = Namespace(per_proc_batch_size=2, quantize="none", global_seed=0, image_size_eval=8)
    args.class_protocol = "balanced"
    with fake_cuda():
        world = World(3, 4, device)
        sample_c2i_ddp.make_chunks(args, world, pipeline, Way("bf16", "eager"), file, [0, 1, 2])
    assert Stream.devices == [3, 3, 3] and len(pinned) == 3
