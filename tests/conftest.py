"""Shared fixtures: golden files, weights that anyone can make again, running the real command lines."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = (ROOT.parent / "shared" / "golden", ROOT / "tests" / "golden")

# one test process may not take the whole machine from the processes it starts
torch.set_num_threads(min(2, os.cpu_count() or 1))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def golden():
    """``golden(name)`` opens ../shared/golden/name, or the copy in tests/golden, or skips the test."""

    def open_golden(name: str):
        path = next((folder / name for folder in GOLDEN if (folder / name).is_file()), None)
        if path is None:
            pytest.skip(f"golden file {name} is not there (looked in {GOLDEN[0]} and {GOLDEN[1]})")
        return np.load(path, allow_pickle=False) if path.suffix == ".npz" else path.read_text()

    return open_golden


def fill_from_names(module: torch.nn.Module) -> torch.nn.Module:
    """Fill every parameter from its name by the recipe of the golden files' README."""
    for name, parameter in module.named_parameters():
        raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(parameter.numel())
        s = 2.0 * (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53 - 1.0
        if parameter.ndim > 1:
            value = s * math.sqrt(3.0 / math.prod(parameter.shape[1:]))
        else:
            value = 0.1 * s if name.endswith("bias") else 1.0 + 0.1 * s
        parameter.data = torch.from_numpy(value.reshape(parameter.shape)).float()
    return module


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
