"""Figures of a training run: means between two log lines, and curves."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.distributed import World
from utils.files import cut_torn_line


class Window:
    """Means between two log lines, and speed; the device is waited for only when they are read."""

    def __init__(self, names: Sequence[str], device: torch.device):
        self.names = names
        self._sums, self._counts = torch.zeros(2, len(names), device=device).unbind()  # (K,) each
        self._steps = 0
        self._started = time.perf_counter()

    def add(self, terms: dict[str, Tensor]) -> None:
        """Add one step's scalars, under ``names``; what is not a finite number is left out."""
        values = torch.stack([terms[name] for name in self.names])  # (K,)
        self._sums += values.nan_to_num(0.0, 0.0, 0.0)
        self._counts += values.isfinite()
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        before = time.perf_counter()
        yield
        self._started += time.perf_counter() - before

    def read(self, images: int) -> dict[str, float]:
        """Means, ``images/s`` at ``images`` a step and ``seconds/step`` since the last reading."""
        means = (self._sums / self._counts).tolist()  # waits for the device
        seconds = (time.perf_counter() - self._started) / self._steps
        self._sums.zero_()
        self._counts.zero_()
        self._steps, self._started = 0, time.perf_counter()
        return dict(zip(self.names, means, strict=True)) | {
            "images/s": images / seconds,
            "seconds/step": seconds,
        }


class ScalarLog:
    """Curves of a run, on rank 0: ``metrics.jsonl``; TensorBoard if installed; W&B when asked for.

    Without a folder it records nothing.
    """

    def __init__(
        self, world: World, folder: Path | None, wandb_project: str | None, options: dict[str, Any]
    ):
        self.notes: list[str] = []
        self._file, self._tensorboard, self._wandb = None, None, None
        if not world.is_main or folder is None:
            return
        if wandb_project is not None:
            try:
                import wandb
            except ImportError as error:
                raise ValueError(
                    "--wandb-project needs the package wandb: pip install wandb"
                ) from error
            self._wandb = wandb.init(
                project=wandb_project, name=folder.name, config=options, resume="allow"
            )
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(folder / "tensorboard")
        except ImportError:
            self.notes.append(
                f"curves go to {folder}/metrics.jsonl; pip install tensorboard to "
                "look at them there too"
            )
        cut_torn_line(folder / "metrics.jsonl")
        self._file = open(folder / "metrics.jsonl", "a")  # noqa: SIM115 - open as long as the run

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record ``values`` at ``step``; where a resumed run repeats a step, the later count."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Flush and close."""
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
