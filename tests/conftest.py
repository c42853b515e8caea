"""Shared fixtures: golden files, weights that anyone can make again, running the real command
lines.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.helpers import VGG16, extract, open_golden, train, write_images_and_tokenizer
from utils.distributed import World
from utils.precision import cpu_name

# Test processes share the cores with each other (pytest -n 2) and with the programs they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))


def pytest_report_header() -> str:
    return f"PAR_CPU: {cpu_name()}; torch uses {torch.backends.cpu.get_cpu_capability()}"


# fixtures that run the real command lines for seconds
SLOW_FIXTURES = {"work", "trained"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU without one; mark as slow what stands on the command lines of
    ``SLOW_FIXTURES``.
    """
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def golden():
    """``golden(name)`` opens a golden file: see ``open_golden``."""
    return open_golden


@pytest.fixture(scope="session", autouse=True)
def compiled_code(tmp_path_factory) -> None:
    """Keep what torch.compile makes apart: its cache may be another processor's."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    """Images of 3 classes, a random tokenizer in our format, its codes: the later steps' start."""
    folder = tmp_path_factory.mktemp("work")
    write_images_and_tokenizer(folder)
    extract(folder, folder / "codes")
    return folder


@pytest.fixture(scope="session")
def codes105(work) -> Path:
    """Codes of the same images with crops in another range."""
    extract(work, work / "codes105", "--crop-range", 1.05)
    return work / "codes105"


@pytest.fixture(scope="session")
def vgg(tmp_path_factory) -> Path:
    """Random weights under the names of torchvision's VGG16, without the classifier."""
    path, channels, place = tmp_path_factory.mktemp("vgg") / "vgg16.pth", 3, 0
    generator, state = torch.Generator().manual_seed(0), {}
    for width in VGG16:
        if width:
            std = math.sqrt(2 / (9 * channels))
            state[f"features.{place}.weight"] = std * torch.randn(
                width, channels, 3, 3, generator=generator
            )
            state[f"features.{place}.bias"] = 0.1 * torch.randn(width, generator=generator)
            channels, place = width, place + 1  # ReLU
        place += 1
    torch.save(state, path)
    return path


@pytest.fixture(scope="session")
def trained(work) -> Path:
    train(work, work / "gpt", "--ckpt-every", 4, "--ema")
    return work / "gpt" / "GPT-T-4x-32" / "checkpoints" / "0000015.pt"


class CountingCompiler:
    """A back-end of torch.compile that counts graphs and runs them as they are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.graphs = 0
        real = torch.compile
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", lambda *a, **k: real(*a, **k | {"backend": self}))

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Tensor]):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def compiler(monkeypatch):
    """Count graphs; a step that torch would leave uncompiled raises."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield CountingCompiler(monkeypatch)
    torch._dynamo.reset()


@pytest.fixture
def two_ranks() -> Iterator[World]:
    """Rank 0 of two whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield World(0, 2, torch.device("cpu"))
    dist.destroy_process_group()
