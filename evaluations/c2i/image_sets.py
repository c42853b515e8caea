"""Sets of images for the evaluator, ``.npz`` or folder: images in batches, statistics and labels
at once.
"""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from dataset.imagenet import IMG_EXTENSIONS, open_image
from evaluations.c2i.metrics import Statistics
from utils.files import require_file
from utils.npz import Member, combine_crc32, map_member, member_names, open_member, open_npz

IMAGES = "arr_0"
LABELS = ("labels", "arr_1")  # guided-diffusion saves labels as a second positional array
LARGEST_IMAGE = 1 << 26  # values of one image
Crc: TypeAlias = tuple[int, int]  # CRC-32 of some bytes, and their number
LARGEST_WHOLE = 1 << 30  # bytes of an array read at once: 8 times the statistics of 4096 features


@dataclass(frozen=True)
class ImageArchive:
    """``.npz`` of images ``arr_0`` (N, H, W, 3), read in batches, statistics and labels (N,).

    ``shape`` is the shape of the images; ``pool`` and ``spatial`` are the stored statistics
    (``mu``, ``sigma`` and ``mu_s``, ``sigma_s``). Whatever the file does not hold is None.
    """

    path: Path
    shape: tuple[int, int, int, int] | None
    pool: Statistics | None
    spatial: Statistics | None
    labels: np.ndarray | None

    @property
    def count(self) -> int:
        """Number of images; 0 if the file holds statistics alone."""
        return self.shape[0] if self.shape else 0

    def without_statistics(self) -> ImageArchive:
        """Return the images alone."""
        return replace(self, pool=None, spatial=None)

    def batches(
        self, batch_size: int, rank: int = 0, size: int = 1, crcs: list[Crc] | None = None
    ) -> Iterator[Tensor]:
        """Yield (B, H, W, 3) in file order: uint8, or float32 for a file of floats, 0-255.

        Yields only batches ``rank``, ``rank + size``, ... and holds one batch at a time. Raises
        ``ValueError`` for a damaged file and for floats outside 0-255. With ``crcs``, to which it
        appends the CRC of each batch, it reads no other batches where the file is not compressed;
        the caller has them checked by ``check``.
        """
        with open_npz(self.path) as archive:
            member = open_member(archive, IMAGES)
            whole = _read_whole(archive, IMAGES) if member.fortran_order else None
            stored = archive.getinfo(f"{IMAGES}.npy").compress_type == zipfile.ZIP_STORED
            mapped = crcs is not None and stored and whole is None
            if mapped:
                whole = map_member(archive, IMAGES)
            for index, start in enumerate(range(0, self.count, batch_size)):
                shape = (min(batch_size, self.count - start), *member.shape[1:])
                batch = member.read(shape) if whole is None else whole[start : start + batch_size]
                if index % size != rank:
                    continue
                if crcs is not None and mapped:
                    crcs.append((zlib.crc32(batch), batch.nbytes))
                if member.dtype != np.uint8:
                    batch = batch.astype(np.float32)
                    _check_range(batch, self.path)
                yield torch.from_numpy(np.ascontiguousarray(batch))

    def check(self, crcs: list[list[Crc]]) -> None:
        """Raise ``ValueError`` unless the batches that all ranks have read, whose ``crcs`` these
        are, make up the file; those that were not mapped were checked as they were read.
        """
        with open_npz(self.path) as archive:
            info, member = archive.getinfo(f"{IMAGES}.npy"), open_member(archive, IMAGES)
            with archive.open(info) as stream:
                crc = zlib.crc32(stream.read(member.stream.tell()))
        in_order = [crc for row in zip_longest(*crcs) for crc in row if crc is not None]
        for part, length in in_order:
            crc = combine_crc32(crc, part, length)
        if in_order and crc != info.CRC:
            raise ValueError(f"{self.path} is not a whole .npz file: Bad CRC-32 of its images")


@dataclass(frozen=True)
class ImageFolderSet:
    """A folder of images of one size, as ``ImageArchive``; by name, 2.png before 10.png.

    If all images are in folders of classes, labels are the places of these among their names.
    """

    path: Path
    shape: tuple[int, int, int, int]
    files: tuple[Path, ...]
    labels: np.ndarray | None
    pool: None = None
    spatial: None = None

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.files)

    def batches(
        self, batch_size: int, rank: int = 0, size: int = 1, crcs: list[Crc] | None = None
    ) -> Iterator[Tensor]:
        """See ``ImageArchive``; ``ValueError`` for a file that is no image of the first's size.

        ``crcs`` stays empty: a damaged file is no image.
        """
        for start in range(rank * batch_size, self.count, size * batch_size):
            yield torch.stack([self._read(file) for file in self.files[start : start + batch_size]])

    def check(self, crcs: list[list[Crc]]) -> None:
        """Do nothing."""

    def without_statistics(self) -> ImageFolderSet:
        """Return the set itself: a folder has no statistics."""
        return self

    def _read(self, file: Path) -> Tensor:
        pixels = np.array(open_image(file))  # (H, W, 3) uint8
        if pixels.shape != self.shape[1:]:
            size, first_size = (f"{s[1]}x{s[0]}" for s in (pixels.shape, self.shape[1:]))
            raise ValueError(
                f"{file} has {size} pixels, the first image of {self.path} has {first_size}"
            )
        return torch.from_numpy(pixels)


ImageSet: TypeAlias = ImageArchive | ImageFolderSet


def open_images(path: str | Path, name: str) -> ImageSet:
    """Open a folder of images or an ``.npz``; ``name`` is its name in error messages."""
    if not Path(path).is_dir():
        return open_archive(path, name)
    images = [p for p in Path(path).rglob("*") if p.suffix.lower() in IMG_EXTENSIONS]
    files = tuple(
        sorted(
            images,
            key=lambda p: [w.zfill(20) if w.isdigit() else w for w in re.split(r"(\d+)", str(p))],
        )
    )
    if not files:
        raise ValueError(f"{name}: no images in {path}")
    height, width, channels = np.array(open_image(files[0])).shape
    folders = [file.relative_to(path).parts[0] for file in files if file.parent != Path(path)]
    labels = None
    if len(folders) == len(files):
        labels = np.unique(folders, return_inverse=True)[1]  # (N,)
    return ImageFolderSet(Path(path), (len(files), height, width, channels), files, labels)


def open_archive(path: str | Path, name: str) -> ImageArchive:
    """Open an ``.npz`` without reading its images; ``name`` is its name in error messages.

    Raises ``ValueError`` if the file is damaged, holds neither images nor statistics, or holds them
    with another dtype or shape.
    """
    path = require_file(path, name)
    with open_npz(path) as archive:
        names = member_names(archive)
        shape = _image_shape(open_member(archive, IMAGES), path) if IMAGES in names else None
        pool = _read_statistics(archive, "mu", "sigma", names, path)
        spatial = _read_statistics(archive, "mu_s", "sigma_s", names, path)
        labels = _read_labels(archive, shape, names, path)
    if shape is None and pool is None:
        found = ", ".join(names) or "nothing"
        raise ValueError(
            f"{name}: {path} holds neither images (arr_0) nor statistics (mu and "
            f"sigma); found {found}"
        )
    return ImageArchive(path, shape, pool, spatial, labels)


def _image_shape(member: Member, path: Path) -> tuple[int, int, int, int]:
    shape, dtype = member.shape, member.dtype
    if len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise ValueError(
            f"{path}: {member.name} has the shape {shape}, expected images (N, H, W, 3)"
        )
    if dtype != np.uint8 and dtype.kind != "f":
        raise ValueError(
            f"{path}: {member.name} is {dtype}, expected uint8 (or floats) with values 0-255"
        )
    if math.prod(shape[1:]) > LARGEST_IMAGE:
        raise ValueError(
            f"{path}: images of {shape[2]}x{shape[1]} pixels are too large to be read in batches"
        )
    return shape


def _read_statistics(
    archive: zipfile.ZipFile, mu_name: str, sigma_name: str, names: list[str], path: Path
) -> Statistics | None:
    present = [name for name in (mu_name, sigma_name) if name in names]
    if not present:
        return None
    if len(present) == 1:
        raise ValueError(
            f"{path} holds {present[0]} without its partner; expected {mu_name} and {sigma_name}"
        )
    mu, sigma = (_read_whole(archive, name) for name in present)
    if (
        mu.dtype.kind != "f"
        or sigma.dtype.kind != "f"
        or mu.ndim != 1
        or sigma.shape != mu.shape * 2
    ):
        raise ValueError(
            f"{path}: {mu_name} is {mu.dtype} {mu.shape} and {sigma_name} {sigma.dtype} "
            f"{sigma.shape}, expected floats (D,) and (D, D)"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{path}: {mu_name} or {sigma_name} holds values that are not finite")
    if (sigma.diagonal() < 0).any() or not np.allclose(
        sigma, sigma.T, rtol=1e-3, atol=1e-6 * abs(sigma).max()
    ):
        raise ValueError(
            f"{path}: {sigma_name} is not a covariance: not symmetric, or a variance is negative"
        )
    return Statistics(mu, sigma)


def _read_labels(
    archive: zipfile.ZipFile, shape: tuple[int, ...] | None, names: list[str], path: Path
) -> np.ndarray | None:
    name = next((n for n in LABELS if n in names), None)
    if name is None or shape is None:
        return None
    member = open_member(archive, name)
    if member.shape == shape[:1] and member.dtype.kind in "iu":
        return member.read(member.shape)
    if name != LABELS[0]:
        return None  # the second positional array is not labels
    raise ValueError(
        f"{path}: labels are {member.dtype} {member.shape}, expected {shape[0]} integers"
    )


def _read_whole(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    member = open_member(archive, name)
    if member.num_bytes > LARGEST_WHOLE:
        raise ValueError(
            f"{member.path}: {name} would take {member.num_bytes:,} bytes of memory, at most "
            f"{LARGEST_WHOLE:,} are read"
        )
    return member.read(member.shape)


def _check_range(batch: np.ndarray, path: Path) -> None:
    low, high = float(batch.min()), float(batch.max())
    if not (low >= 0 and high <= 255):
        raise ValueError(f"{path}: arr_0 has values in {low:g}..{high:g}, expected 0..255")
