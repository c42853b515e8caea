"""Log lines to screen and file, progress with rate and time to finish; rank 0 only."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from utils.distributed import World
from utils.files import cut_torn_line


def create_logger(world: World, folder: str | Path | None = None) -> logging.Logger:
    """Return a logger to screen and ``folder/log.txt`` on rank 0; others show only warnings."""
    logger = logging.getLogger("par")
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if world.is_main else logging.WARNING)
    handlers: list[logging.Handler] = [_TqdmHandler()]
    if world.is_main and folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        cut_torn_line(Path(folder) / "log.txt")
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
    """Return a tqdm bar, with rate and time to finish, on rank 0; a silent one elsewhere."""
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


def progress_of_bytes(description: str, total: int, initial: int = 0) -> tqdm:
    """Return a tqdm bar over the bytes of one file."""
    return tqdm(
        desc=description,
        total=total,
        initial=initial,
        unit="B",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
    )
