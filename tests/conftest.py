"""Shared fixtures: golden files, weights that anyone can make again, running the real command lines."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scripts.diagnosis.models import fill_from_names
from tokenizer.vq_model import VQModel, make_vq_config
from utils.precision import cpu_name

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = (ROOT.parent / "shared" / "golden", ROOT / "tests" / "golden")
# those in tests/golden: a clone has them, so no test may do without; all others are in ../shared/golden alone
SHIPPED_GOLDEN = {
    *("gpt_tiny_n1.npz", "gpt_tiny_n4.npz", "gpt_tiny_n9.npz", "gpt_tiny_n16.npz"),
    *("sampling.npz", "state_dict_manifest.json", "vq16.npz"),
}

# widths of VGG16's convolutions, 0: pooling
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)

# one test process may not take the whole machine from the processes it starts
torch.set_num_threads(min(2, os.cpu_count() or 1))


def pytest_report_header() -> str:
    return f"PAR_CPU: {cpu_name()}; torch uses {torch.backends.cpu.get_cpu_capability()}"


# fixtures that run the real command lines for seconds
SLOW_FIXTURES = {"work", "trained"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU without one; mark as slow what stands on the command lines of ``SLOW_FIXTURES``."""
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def golden():
    """``golden(name)`` opens ../shared/golden/name, or the copy in tests/golden.

    Without either the test fails if the repository ships that file, and is skipped if it does not.
    """

    def open_golden(name: str):
        path = next((folder / name for folder in GOLDEN if (folder / name).is_file()), None)
        if path is None:
            stop = pytest.fail if name in SHIPPED_GOLDEN else pytest.skip
            stop(f"golden file {name} is not there (looked in {GOLDEN[0]} and {GOLDEN[1]})")
        return np.load(path, allow_pickle=False) if path.suffix == ".npz" else path.read_text()

    return open_golden


@pytest.fixture
def own_process():
    """``own_process(f, *args)`` is ``f(*args)`` of a new process: if torch's compiler takes that down, a test fails."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda f, *args: pool.submit(f, *args).result(timeout=300)


def run_command(
    *command: object, nproc: int = 1, check: bool = True, **environment: str
) -> subprocess.CompletedProcess:
    """Run a command line from the repository's root as a user would, on the CPU with ``nproc`` processes."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    env |= {"PYTHON": sys.executable, "nproc_per_node": str(nproc), "CUDA_VISIBLE_DEVICES": "", **environment}
    words = [sys.executable if w == "python3" else str(w) for w in command]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


EXTRACT = ("bash", "scripts/autoregressive/extract_codes_c2i.sh")
TRAIN = ("bash", "scripts/autoregressive/train_c2i.sh")
TRAIN_VQ = ("bash", "scripts/tokenizer/train_vq.sh")


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    """Images of 3 classes, a random tokenizer in our format, its codes: what the later steps start from."""
    folder = tmp_path_factory.mktemp("work")
    rng = np.random.default_rng(0)
    for label in ("ape", "bee", "cat"):
        (folder / "images" / label).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 256, (40, 36 + i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / label / f"{i}.png")
    vq = fill_from_names(VQModel(make_vq_config("VQ-4", codebook_size=64)))
    torch.save({"model": vq.state_dict(), "vq_model": "VQ-4", "config": asdict(vq.config)}, folder / "vq.pt")
    extract(folder, folder / "codes")
    return folder


@pytest.fixture(scope="session")
def vgg(tmp_path_factory) -> Path:
    """Random weights under the names of torchvision's VGG16, without the classifier."""
    path, channels, place = tmp_path_factory.mktemp("vgg") / "vgg16.pth", 3, 0
    generator, state = torch.Generator().manual_seed(0), {}
    for width in VGG16:
        if width:
            std = math.sqrt(2 / (9 * channels))
            state[f"features.{place}.weight"] = std * torch.randn(width, channels, 3, 3, generator=generator)
            state[f"features.{place}.bias"] = 0.1 * torch.randn(width, generator=generator)
            channels, place = width, place + 1  # ReLU
        place += 1
    torch.save(state, path)
    return path


def extract(work: Path, codes: Path, *options: object, nproc: int = 1):
    base = ("--vq-ckpt", work / "vq.pt", "--data-path", work / "images", "--code-path", codes, "--image-size", 32)
    return run_command(*EXTRACT, *base, "--ten-crop", "--shard-size", 5, "--num-workers", 1, *options, nproc=nproc)


def start(command: list[object], **environment: str) -> subprocess.Popen:
    """A command in a session of its own, to be killed whole."""
    env = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "nproc_per_node": "1", **environment}
    words = [str(w) for w in command]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(words, cwd=ROOT, env=env, start_new_session=True, stdout=quiet, stderr=quiet)


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def same_tensors(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


TRAIN_OPTIONS = ("--gpt-model", "GPT-T", "--epochs", 5, "--global-batch-size", 8, "--lr", 1e-3, "--warmup-epochs", 1)


def train(work: Path, cloud: Path, *options: object, **run_options):
    base = ("--cloud-save-path", cloud, "--no-local-save", "--code-path", work / "codes", "--spe-token-num", 3)
    base += ("--ar-token-num", 4, "--mixed-precision", "none", "--log-every", 1, *TRAIN_OPTIONS)
    return run_command(*TRAIN, *base, *options, **run_options)


@pytest.fixture(scope="session")
def trained(work) -> Path:
    train(work, work / "gpt", "--ckpt-every", 4, "--ema")
    return work / "gpt" / "GPT-T-4x-32" / "checkpoints" / "0000015.pt"
