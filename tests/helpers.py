"""What several test files need: the real command lines, small models, codes and states, slow
versions of formulas.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT
from autoregressive.train import train_c2i
from dataset.shards import CodesPlan, finish_codes, start_codes, write_shard
from scripts.diagnosis.models import fill_from_names
from tokenizer.vq_model import VQModel, make_vq_config
from utils.checkpoints.folder import save_sharded
from utils.distributed import World
from utils.lock import hold
from utils.options import run_main
from utils.training.state import Ema, Guard, TrainingState, make_adamw

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = (ROOT.parent / "shared" / "golden", ROOT / "tests" / "golden")
# those in tests/golden: a clone has them, so no test may do without; all others are in
# ../shared/golden alone
SHIPPED_GOLDEN = {
    *("gpt_tiny_n1.npz", "gpt_tiny_n4.npz", "gpt_tiny_n9.npz", "gpt_tiny_n16.npz"),
    *("sampling.npz", "state_dict_manifest.json", "vq16.npz"),
}

# widths of VGG16's convolutions, 0: pooling
VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)

EXTRACT = ("bash", "scripts/autoregressive/extract_codes_c2i.sh")
TRAIN = ("bash", "scripts/autoregressive/train_c2i.sh")
SAMPLE = ("bash", "scripts/autoregressive/sample_c2i.sh")
TRAIN_VQ = ("bash", "scripts/tokenizer/train_vq.sh")
TRAIN_OPTIONS = (
    "--gpt-model", "GPT-T", "--epochs", 5, "--global-batch-size", 8, "--lr", 1e-3,
    "--warmup-epochs", 1,
)  # fmt: skip
NO_DROPOUT = (
    "--dropout-p", 0, "--attn-dropout-p", 0, "--token-dropout-p", 0, "--class-dropout-prob", 0,
)  # fmt: skip
# folder of a run with TRAIN_OPTIONS at 4 tokens per step
GPT_RUN = "GPT-T-4x-32"


def open_golden(name: str):
    """Open ../shared/golden/name, or the copy in tests/golden.

    Without either the test fails if the repository ships that file, and is skipped if it does not.
    """
    path = next((folder / name for folder in GOLDEN if (folder / name).is_file()), None)
    if path is None:
        stop = pytest.fail if name in SHIPPED_GOLDEN else pytest.skip
        stop(f"golden file {name} is not there (looked in {GOLDEN[0]} and {GOLDEN[1]})")
    return np.load(path, allow_pickle=False) if path.suffix == ".npz" else path.read_text()


def run_command(
    *command: object, nproc: int = 1, check: bool = True, **environment: str
) -> subprocess.CompletedProcess:
    """Run a command line from the root as a user would, on the CPU with ``nproc`` processes."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    env |= {
        "PYTHON": sys.executable,
        "nproc_per_node": str(nproc),
        "CUDA_VISIBLE_DEVICES": "",
        **environment,
    }
    words = [sys.executable if w == "python3" else str(w) for w in command]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def extract_words(work: Path, codes: Path) -> tuple[object, ...]:
    """Return the options for codes of the images in ``work``: ten crops each, five images per
    shard.
    """
    return (
        "--vq-ckpt", work / "vq.pt", "--data-path", work / "images", "--code-path", codes,
        "--image-size", 32, "--ten-crop", "--shard-size", 5,
    )  # fmt: skip


def extract(
    work: Path, codes: Path, *options: object, nproc: int = 1
) -> subprocess.CompletedProcess:
    """Extract codes by the command line, see ``extract_words``."""
    words = (*EXTRACT, *extract_words(work, codes), "--num-workers", 1, *options)
    return run_command(*words, nproc=nproc)


def train_words(work: Path, cloud: Path) -> tuple[object, ...]:
    """Return the options for training GPT-T on the codes in ``work``."""
    return (
        "--cloud-save-path", cloud, "--no-local-save", "--code-path", work / "codes",
        "--spe-token-num", 3, "--ar-token-num", 4, "--mixed-precision", "none", "--log-every", 1,
        *TRAIN_OPTIONS,
    )  # fmt: skip


def train(work: Path, cloud: Path, *options: object, **run_options) -> subprocess.CompletedProcess:
    """Train by the command line, see ``train_words``."""
    return run_command(*TRAIN, *train_words(work, cloud), *options, **run_options)


def start(command: Sequence[object], **environment: str) -> subprocess.Popen:
    """A command in a session of its own, to be killed whole."""
    env = os.environ | {
        "PYTHON": sys.executable,
        "CUDA_VISIBLE_DEVICES": "",
        "nproc_per_node": "1",
        "PAR_TEST_RUN": uuid.uuid4().hex,
        **environment,
    }
    words = [str(w) for w in command]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        words, cwd=ROOT, env=env, start_new_session=True, stdout=quiet, stderr=quiet
    )
    process.mark = f"PAR_TEST_RUN={env['PAR_TEST_RUN']}".encode()
    return process


def family(process: subprocess.Popen) -> list[int]:
    """Return what lives of a command of ``start``: torchrun's ranks are sessions of their own."""
    found = []
    for place in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if process.mark in place.read_bytes().split(b"\0"):
                found.append(int(place.parent.name))
    return found


def kill(process: subprocess.Popen) -> None:
    """SIGKILL a process of ``start`` and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    while left := family(process):
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()


def wait_for(what: Callable[[], object], process: subprocess.Popen) -> None:
    """Return once ``what()`` is true; fail if the process ends first or after two minutes."""
    deadline = time.time() + 120
    while not what():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.002)


def newest(folder: Path) -> int:
    """Return the step of the newest whole checkpoint in ``folder``, or 0."""
    return max(
        (int(p.name) for p in folder.glob("*") if p.is_dir() and p.name.isdigit()), default=0
    )


def quietly(capfd, monkeypatch, *options: object, main=train_c2i.main) -> str:
    """Run ``main`` in this process, starting one takes long; return what it printed.

    If it ends early, its exit status is 2, as after every mistake of a user.
    """
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, options)])
    try:
        run_main(main)
    except SystemExit as end:
        assert end.code == 2
    finally:
        signal.set_wakeup_fd(-1)  # the run's socket is closed by now
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
    return "".join(capfd.readouterr())


def curve(cloud: Path, what: str = "loss") -> list[float]:
    """Return a figure of each log line of the run of the GPT in ``cloud``."""
    lines = (cloud / GPT_RUN / "metrics.jsonl").read_text().splitlines()
    return [v[what] for v in map(json.loads, lines) if what in v]


def same_tensors(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def small_config(**changes) -> GPTConfig:
    base = dict(
        n_layer=2, dim=32, n_head=4, vocab_size=19, num_classes=3, grid_height=4, grid_width=4
    )
    return GPTConfig(**base | changes)


def random_codes(config: GPTConfig, batch: int = 2) -> tuple[Tensor, Tensor]:
    codes = torch.randint(config.vocab_size, (batch, config.grid_height * config.grid_width))
    return codes, torch.randint(config.num_classes, (batch,))


def make_plan(**changes) -> CodesPlan:
    base = dict(
        classes=["a", "b", "c"], num_images=10, source_sha256="s", image_size=8, grid=[2, 2]
    )
    base |= dict(
        crops=["center", "center_of_flipped"], crop_range=1.0, codebook_size=70, tokenizer="VQ-4"
    )
    base |= dict(tokenizer_sha256="t", precision="none", shard_size=4)
    return CodesPlan(**base | changes)


def write_all(folder: Path, plan: CodesPlan) -> tuple[np.ndarray, np.ndarray]:
    """Write random codes of all images of ``plan``; return codes (N, crops, T), labels (N,)."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, plan.codebook_size, (plan.num_images, len(plan.crops), plan.num_tokens))
    labels = np.arange(plan.num_images) % 3
    start_codes(folder, plan)
    for shard in range(plan.num_shards):
        index = np.array(plan.shard_images(shard))
        write_shard(folder, plan, shard, codes[index], labels[index], index)
    finish_codes(folder, plan, [f"{i}.png" for i in range(plan.num_images)])
    return codes, labels


def write_published_layout(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write the codes of ``write_all`` in the published layout; return the same."""
    codes, labels = write_all(folder / "ours", make_plan())
    for kind, values in (("codes", codes[:, None]), ("labels", labels[:, None])):
        (folder / f"imagenet384_{kind}").mkdir(parents=True)
        for i, value in enumerate(values):
            np.save(folder / f"imagenet384_{kind}" / f"{i}.npy", value)
    return codes, labels


def small_state(
    value: float, spike: float = 0.0, patience: int = 3, fp16: bool = False
) -> TrainingState:
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.data.fill_(value)
    scaler = torch.amp.GradScaler("cpu", enabled=fp16)
    guard = Guard(torch.device("cpu"), spike, patience)
    return TrainingState(model, make_adamw(model, 0.1, 0.0, (0.9, 0.95)), scaler, Ema(model), guard)


def take_step(state: TrainingState, step: int, loss: float, max_norm: float = 0.0) -> None:
    """One update whose loss and gradient are ``loss`` and (loss, loss)."""
    state.scaler.scale(state.model(torch.full((1, 2), loss)).sum()).backward()
    state.update(step, torch.tensor(loss), state.gradient_norm(), max_norm)


def recipe_state(use_gamma: bool = True) -> dict[str, Tensor]:
    """The recipe's weights of the Inception under our names."""
    from evaluations.c2i.inception import state_from_tensorflow  # takes a second
    from evaluations.c2i.self_check import recipe_constants

    return state_from_tensorflow(recipe_constants(use_gamma))


def slow_lpips(weights: Path, a: Tensor, b: Tensor) -> list[float]:
    """Zhang et al. 2018, equation 1, from VGG16's table of layers."""
    from torchmetrics.functional.image import lpips  # takes seconds

    state = torch.load(weights, weights_only=True)
    folder = Path(lpips.__file__).parent
    linear = torch.load(folder / "lpips_models" / "vgg.pth", map_location="cpu", weights_only=True)
    shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).view(2, 3, 1, 1)
    distance, place, stage = torch.zeros(len(a)), 0, 0
    x = torch.cat([(a - shift) / scale, (b - shift) / scale])
    for width in VGG16:
        if width == 0:
            one, other = (h / h.square().sum(1, keepdim=True).add(1e-8).sqrt() for h in x.chunk(2))
            weight = linear[f"lin{stage}.model.1.weight"].view(1, -1, 1, 1)
            distance += ((one - other).square() * weight).sum(1).mean((1, 2))
            x, stage = F.max_pool2d(x, 2), stage + 1
        else:
            x = F.conv2d(
                x, state[f"features.{place}.weight"], state[f"features.{place}.bias"], padding=1
            ).relu()
            place += 1
        place += 1
    return distance.tolist()


def image_file(path: Path, width: int = 48, height: int = 32) -> tuple[Path, np.ndarray]:
    """Write an image of noise; return its path and pixels (H, W, 3)."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return path, pixels


def trainable_gpt(**changes: Any) -> GPT:
    """Return a GPT of ten compiled blocks in ``train()`` mode."""
    model = GPT(small_config(n_layer=10, **changes)).train()
    model.init_weights()
    nn.init.normal_(model.output.weight)
    for block in model.layers:
        block.compile()
    return model


def train_steps(model: GPT, steps: int) -> None:
    """Forward and backward of ``steps`` batches of random codes."""
    for seed in range(steps):
        torch.manual_seed(seed)
        model(*random_codes(model.config))[0].backward()


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def shard_digests(codes: Path) -> list[str]:
    """Return the hashes of the shards of a folder of codes, and assert that it has nothing else."""
    assert not [p for p in (codes / "shards").iterdir() if p.suffix != ".npz"]
    return [digest(p) for p in sorted((codes / "shards").iterdir())]


def weights(cloud: Path, step: int, key: str = "model", name: str = GPT_RUN) -> dict[str, Tensor]:
    """Return the weights (or ``ema``) that a run of the GPT in ``cloud`` exported at ``step``."""
    return torch.load(cloud / name / "checkpoints" / f"{step:07d}.pt", weights_only=True)[key]


def gpt_checkpoint(folder: Path) -> GPT:
    """Write a training checkpoint of a small GPT, as a run does."""
    model = GPT(small_config(ar_token_num=4))
    model.init_weights()
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    files = save_sharded(folder, tensors, None).result()
    facts = {
        "gpt_model": "GPT-S",
        "config": asdict(model.config),
        "steps": 7,
        "classes": ["a|b", "c", "d"],
    }
    (folder / "meta.json").write_text(json.dumps(facts | files | {"scalars": {}}))
    return model


def write_images_and_tokenizer(folder: Path) -> None:
    """Write eight images of each of 3 classes and a random tokenizer in our format."""
    rng = np.random.default_rng(0)
    for label in ("ape", "bee", "cat"):
        (folder / "images" / label).mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 256, (40, 36 + i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / label / f"{i}.png")
    vq = fill_from_names(VQModel(make_vq_config("VQ-4", codebook_size=64)))
    torch.save(
        {"model": vq.state_dict(), "vq_model": "VQ-4", "config": asdict(vq.config)},
        folder / "vq.pt",
    )


def hold_in_fork(path: Path, children: int = 0) -> int:
    """Hold ``path`` in a fork of this process, and its lock in forks of that; return its id."""
    reader, writer = os.pipe()
    if pid := os.fork():
        os.read(reader, 1)
        return pid
    hold(path, World(0, 1, torch.device("cpu")), "folder")
    for _ in range(children):
        if os.fork() == 0:
            break
    else:
        os.write(writer, b"1")
    time.sleep(1.5 if children else 60)
    os._exit(0)
