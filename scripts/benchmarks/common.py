"""What benchmarks share: timing, a process of its own for each way, parts of the published code,
the JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from utils.distributed import init_distributed
from utils.files import write_json
from utils.options import git_revision
from utils.performance import device_name
from utils.precision import has_bfloat16

# what scripts/launch.sh sets on a machine without a GPU (a test compares both); it explains each
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
ALLOCATOR = KEPT_MEMORY | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "GOMP_SPINCOUNT": "5000"}


def seconds(work: Callable[[], object]) -> float:
    """Return the wall-clock time of one call, with what it leaves a GPU to do."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def fastest(work: Callable[[], object], repeats: int) -> float:
    """Return the wall-clock time of the fastest of ``repeats`` calls."""
    return min(seconds(work) for _ in range(repeats))


def warm_up_steps(device: torch.device) -> int:
    """Return the number of training steps that are not timed."""
    return 1 if device.type == "cpu" else 5


def time_steps(
    step: Callable[..., Tensor], batches: Iterable[tuple[Tensor, ...]], device: torch.device
) -> dict[str, float]:
    """Take a step per batch; return the fastest seconds after the warm-up, first and last loss."""
    losses, times = [], []
    for batch in batches:
        started = time.perf_counter()
        loss = step(*(x.to(device, non_blocking=True) for x in batch))
        losses.append(loss.item())  # waits for the device
        times.append(time.perf_counter() - started)
    return {
        "seconds": min(times[warm_up_steps(device) :]),
        "first loss": losses[0],
        "last loss": losses[-1],
    }


def read_bandwidth(device: torch.device) -> float:
    """Return the bytes per second of a sum over 512 MiB."""
    x = torch.zeros(1 << 27, device=device)
    return x.nbytes / fastest(lambda: x.sum().item(), 4)


def run_way(script: str, environment: Mapping[str, str], **options: object) -> None:
    """Run ``script`` with ``options`` in a process of its own."""
    words = [sys.executable, script]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    subprocess.run(words, env=os.environ | environment, check=True)


def figures_of(
    script: str, environment: Mapping[str, str], work: str, **options: object
) -> dict[str, Any]:
    """Return the figures that ``run_way`` leaves in ``work``; ``options`` are those of one way."""
    run_way(script, environment, work=work, **options)
    return json.loads((Path(work) / "figures.json").read_text())


def write_figures(work: str, figures: dict[str, Any]) -> None:
    """Leave ``figures`` for ``figures_of``."""
    write_json(Path(work) / "figures.json", figures)


def write_results(args: Namespace, results: object) -> None:
    """Write ``results`` to ``args.output`` as JSON, with the options and the machine."""
    write_json(args.output, {"options": vars(args), "results": results, **describe_run()})


def describe_run() -> dict[str, Any]:
    """Return what figures depend on besides options: the device, its threads, the commit."""
    threads = torch.get_num_threads()
    return {"device": device_name(), "threads": threads, "git": git_revision()}


def add_output_options(parser: ArgumentParser, output: str, work: str = SUPPRESS) -> None:
    """Add ``--output``, and the options by which a benchmark runs one way in a process of its own.

    work: help of ``--work``, the folder that this process writes to; hidden, as ``--way`` is, if
    there is none.
    """
    parser.add_argument("--output", default=output, help="JSON to write")
    parser.add_argument("--way", help=SUPPRESS)
    parser.add_argument("--work", default=tempfile.gettempdir(), help=work)


def add_precision_option(parser: ArgumentParser) -> None:
    """Add ``--precision``, one or several; see ``precisions``."""
    parser.add_argument(
        "--precision",
        choices=["none", "bf16"],
        nargs="+",
        help="precisions to measure (default: none, and bf16 where the device computes in it)",
    )


def precisions(args: Namespace) -> list[str]:
    """Return the precisions to measure."""
    return args.precision or ["none"] + ["bf16"] * has_bfloat16(init_distributed().device)


class PublishedRMSNorm(nn.Module):
    """x / rms(x) * weight in separate operations, normalised in float32."""

    def __init__(self, weight: nn.Parameter, eps: float):
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        mean_square = x.float().square().mean(-1, keepdim=True)  # (B, T, 1)
        y = x.float() * torch.rsqrt(mean_square + self.eps)  # (B, T, D)
        return y.type_as(x) * self.weight  # (B, T, D)


def use_published_norm(model: nn.Module) -> None:
    """Replace every RMSNorm in ``model`` by the published one, on the same weights."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.RMSNorm):
                setattr(module, name, PublishedRMSNorm(child.weight, child.eps))


class PublishedDataset(Dataset):
    """One .npy of codes and one of labels per image, a random crop of it."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        codes = np.load(self.folder / "codes" / f"{i}.npy")  # (1, crops, T)
        crop = torch.randint(codes.shape[1], (1,)).item()
        return torch.from_numpy(codes[0, crop]), torch.from_numpy(
            np.load(self.folder / "labels" / f"{i}.npy")
        )


def write_published_codes(folder: Path, codes: np.ndarray, labels: np.ndarray) -> None:
    """Write codes (N, crops, T) int64 and labels (N,) for ``PublishedDataset``."""
    for kind in ("codes", "labels"):
        (folder / kind).mkdir(parents=True)
    for i in range(len(codes)):
        np.save(folder / "codes" / f"{i}.npy", codes[i : i + 1])
        np.save(folder / "labels" / f"{i}.npy", labels[i : i + 1])
