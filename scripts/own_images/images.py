"""A folder of class folders: what is in it, and its split into training and held-out images."""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset.augmentation import center_crop
from dataset.imagenet import list_images, open_image
from utils.distributed import init_distributed
from utils.logger import progress
from utils.performance import usable_cores

PARTS = ("reference", "held-out", "train")  # of the split; the first two are never trained on
MOST_OPENED = 20_000  # of a larger folder, so many images from all over it are opened
MOST_HELD_OUT = 1_000  # images in each of the two held-out parts


@dataclass(frozen=True)
class Images:
    """What ``look`` found in a folder."""

    counts: dict[str, int]  # readable images per class, classes in the order of their ids
    sides: list[int]  # deciles of the images' shorter side, pixels: 11 numbers from least to most
    seconds: float  # to read and crop one image, on one core
    unreadable: list[str]  # paths relative to the folder


def list_classes(folder: Path) -> dict[str, list[str]]:
    """Return the files of each class relative to ``folder``; hidden folders are no classes."""
    files: dict[str, list[str]] = {}
    for path, _ in list_images(folder, "FOLDER").samples:
        name = os.path.relpath(path, folder)
        if not name.startswith("."):
            files.setdefault(Path(name).parts[0], []).append(name)
    return files


def look(folder: Path) -> Images:
    """Open the images of ``folder`` and return what the plan depends on."""
    classes = list_classes(folder)
    files = [name for names in classes.values() for name in names]
    opened = files[:: math.ceil(len(files) / MOST_OPENED)] if files else []

    def shorter_side(name: str) -> int | None:
        try:
            image = open_image(folder / name)
            center_crop(image, 32)
            return min(image.size)
        except ValueError:
            return None

    cores, started = usable_cores(), time.perf_counter()
    with ThreadPoolExecutor(cores) as threads:
        results = threads.map(shorter_side, opened)
        world = init_distributed(connect=False)
        bar = progress(world, "opening images", len(opened), unit="images", items=results)
        sides = dict(zip(opened, bar, strict=True))
    seconds = (time.perf_counter() - started) * cores / max(1, len(opened))

    unreadable = [name for name, side in sides.items() if side is None]
    readable = {c: len(set(names) - set(unreadable)) for c, names in classes.items()}
    counts = {c: n for c, n in readable.items() if n}
    if not counts:
        raise ValueError(f"FOLDER: none of the {len(opened):,} image files of {folder} is readable")
    known = [side for side in sides.values() if side is not None]
    deciles = np.percentile(known, range(0, 101, 10), method="lower")
    return Images(counts, [int(side) for side in deciles], seconds, unreadable)


def held_out(counts: dict[str, int]) -> dict[str, int]:
    """Return how many images of each class go to each of the two held-out parts, about a tenth.

    Raises ``ValueError`` if a class or the whole has too few to train on and to measure with.
    """
    if few := [c for c, n in counts.items() if n < 4]:
        raise ValueError(
            f"FOLDER: class {few[0]} has {counts[few[0]]} readable images; at least 4 are needed, "
            "2 to train on and 2 to measure with"
        )
    each = max(round(sum(counts.values()) / len(counts) / 10), math.ceil(4 / len(counts)))
    each = min(each, max(1, MOST_HELD_OUT // len(counts)))
    held = {c: min(each, (n - 2) // 2) for c, n in counts.items()}
    if sum(held.values()) < 4:
        raise ValueError(
            f"FOLDER: {sum(counts.values())} images are too few; at least 10 are needed, "
            "of which 8 are held out to measure with"
        )
    return held


def divide(names: list[str], held: int, most: int, seed: int) -> dict[str, list[str]]:
    """Divide the files of one class into ``PARTS``: ``held``, ``held`` and at most ``most`` files.

    By the order of hashes, so that it depends on the names and the seed alone.
    """
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    return dict(
        zip(PARTS, (order[:held], order[held : 2 * held], order[2 * held :][:most]), strict=True)
    )


def split(folder: Path, target: Path, images: Images, most: int, seed: int) -> None:
    """Fill ``target`` with links to the images, ``<part>/<class>/<file>``, unless it exists.

    most: training images per class. ``target`` appears whole or not at all.
    """
    if target.exists():
        return
    aside = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    held = held_out(images.counts)
    try:
        for label, names in list_classes(folder).items():
            good = sorted(set(names) - set(images.unreadable))
            if label not in held:
                continue
            for part, files in divide(good, held[label], most, seed).items():
                for name in files:
                    link(folder / name, aside / part / name)
        os.rename(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def link(source: Path, target: Path) -> None:
    """Make ``target`` a link to the file ``source``, or a copy where the disk has no links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for make in (os.symlink, os.link):
        try:
            make(source.resolve(), target)
            return
        except (OSError, NotImplementedError):
            continue
    shutil.copyfile(source, target)
