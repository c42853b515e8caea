"""Log lines to screen and file, curves, progress with rate and time to finish; rank 0 only."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from utils.distributed import World


def create_logger(world: World, folder: str | Path | None = None) -> logging.Logger:
    """A logger that writes to the screen and to ``folder/log.txt`` on rank 0; other ranks show warnings only."""
    logger = logging.getLogger("par")
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if world.is_main else logging.WARNING)
    handlers: list[logging.Handler] = [_TqdmHandler()]
    if world.is_main and folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(Path(folder) / "log.txt"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    return logger


class _TqdmHandler(logging.Handler):
    """Print above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def progress(
    world: World,
    description: str,
    total: int,
    initial: int = 0,
    unit: str = "it",
    items: Iterable | None = None,
) -> tqdm:
    """A tqdm bar (rate and time to finish included) on rank 0, a silent one elsewhere."""
    return tqdm(
        items,
        desc=description,
        total=total,
        initial=initial,
        unit=f" {unit}",
        disable=not world.is_main or total == 0,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
    )


class ScalarLog:
    """Curves of one run, rank 0 only: ``metrics.jsonl`` always, TensorBoard if it is installed, W&B when asked for.

    Without a folder it records nothing.
    """

    def __init__(self, world: World, folder: Path | None, wandb_project: str | None, options: dict[str, Any]):
        self.notes: list[str] = []
        self._file, self._tensorboard, self._wandb = None, None, None
        if not world.is_main or folder is None:
            return
        if wandb_project is not None:
            try:
                import wandb
            except ImportError as error:
                raise ValueError("--wandb-project needs the package wandb: pip install wandb") from error
            self._wandb = wandb.init(project=wandb_project, name=folder.name, config=options, resume="allow")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(folder / "tensorboard")
        except ImportError:
            self.notes.append(f"curves go to {folder}/metrics.jsonl; pip install tensorboard to look at them there too")
        self._file = open(folder / "metrics.jsonl", "a")  # noqa: SIM115 - open as long as the run

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record ``values`` at ``step``; a resumed run may record a step again, then the later one counts."""
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
