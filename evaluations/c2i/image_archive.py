"""What the evaluator reads, ``.npz`` or folder: images as a stream, statistics and labels whole, nothing unpickled."""

from __future__ import annotations

import lzma
import math
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from dataset.imagenet import open_image
from evaluations.c2i.metrics import Statistics
from utils.files import require_file

IMAGES, LABELS = "arr_0", ("labels", "arr_1")  # guided-diffusion saves labels as a second positional array
LARGEST_IMAGE = 1 << 26  # values of one image
LARGEST_WHOLE = 1 << 30  # bytes of an array that is read at once: 8 times the statistics of 4096 features
HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


@dataclass(frozen=True)
class ImageArchive:
    """What an ``.npz`` holds: images ``arr_0`` (N, H, W, 3), read batch by batch, statistics, labels (N,).

    ``shape`` is that of the images, None if there are none; ``pool`` and ``spatial`` are the stored statistics
    (``mu``, ``sigma`` and ``mu_s``, ``sigma_s``), None if there are none.
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
        """The same images alone."""
        return replace(self, pool=None, spatial=None)

    def batches(self, batch_size: int, rank: int = 0, size: int = 1) -> Iterator[torch.Tensor]:
        """The images in file order: (B, H, W, 3) uint8, or float32 for a file of floats, values 0-255.

        Only batches ``rank``, ``rank + size``, ... are handed out. Holds one batch at a time. Raises ``ValueError`` for
        a damaged file and for floats outside 0-255.
        """
        with _readable(self.path), zipfile.ZipFile(self.path) as archive:
            member = _open_member(archive, IMAGES, self.path)
            whole = _read_whole(archive, IMAGES, self.path) if member.fortran_order else None
            for index, start in enumerate(range(0, self.count, batch_size)):
                shape = (min(batch_size, self.count - start), *member.shape[1:])
                batch = member.read(shape) if whole is None else whole[start : start + batch_size]
                if index % size != rank:
                    continue
                if member.dtype != np.uint8:
                    batch = batch.astype(np.float32)
                    _check_range(batch, self.path)
                yield torch.from_numpy(np.ascontiguousarray(batch))


@dataclass(frozen=True)
class ImageFiles:
    """A folder of images of one size in place of an ``ImageArchive``, ordered by name, 2.png before 10.png."""

    path: Path
    shape: tuple[int, int, int, int]
    files: tuple[Path, ...]
    pool: None = None
    spatial: None = None
    labels: None = None

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.files)

    def batches(self, batch_size: int, rank: int = 0, size: int = 1) -> Iterator[torch.Tensor]:
        """As of ``ImageArchive``; ``ValueError`` for a file that is no image or has another size than the first."""
        for start in range(rank * batch_size, self.count, size * batch_size):
            yield torch.stack([self._read(file) for file in self.files[start : start + batch_size]])

    def without_statistics(self) -> ImageFiles:
        """The same: a folder stores none."""
        return self

    def _read(self, file: Path) -> torch.Tensor:
        pixels = np.array(open_image(file))  # (H, W, 3) uint8
        if pixels.shape != self.shape[1:]:
            found, others = (f"{s[1]}x{s[0]}" for s in (pixels.shape, self.shape[1:]))
            raise ValueError(f"{file} has {found} pixels, the first image of {self.path} has {others}")
        return torch.from_numpy(pixels)


ImageSet: TypeAlias = ImageArchive | ImageFiles


def open_images(path: str | Path, name: str) -> ImageSet:
    """A folder of images or an ``.npz``; ``name`` is what messages call it. ``ValueError`` for anything else."""
    if not Path(path).is_dir():
        return open_archive(path, name)
    found = [p for p in Path(path).rglob("*") if p.suffix.lower() in IMG_EXTENSIONS]
    files = tuple(sorted(found, key=lambda p: [w.zfill(20) if w.isdigit() else w for w in re.split(r"(\d+)", str(p))]))
    if not files:
        raise ValueError(f"{name}: no images in {path}")
    height, width, channels = np.array(open_image(files[0])).shape
    return ImageFiles(Path(path), (len(files), height, width, channels), files)


def open_archive(path: str | Path, name: str) -> ImageArchive:
    """Look into an ``.npz`` without reading its images; ``name`` is what messages call it.

    Raises one-line ``ValueError`` for a file that is no whole ``.npz``, holds neither images nor statistics, or
    holds them with another dtype or shape, Python objects or too few bytes.
    """
    path = require_file(path, name)
    with _readable(path), zipfile.ZipFile(path) as archive:
        found = [entry.removesuffix(".npy") for entry in archive.namelist() if entry.endswith(".npy")]
        shape = _image_shape(_open_member(archive, IMAGES, path), path) if IMAGES in found else None
        pool = _read_statistics(archive, "mu", "sigma", found, path)
        spatial = _read_statistics(archive, "mu_s", "sigma_s", found, path)
        labels = _read_labels(archive, shape, found, path)
    if shape is None and pool is None:
        keys = ", ".join(found) or "nothing"
        raise ValueError(f"{name}: {path} holds neither images (arr_0) nor statistics (mu and sigma); found {keys}")
    return ImageArchive(path, shape, pool, spatial, labels)


@dataclass
class _Member:
    """One array of an archive, its header read, its values still to come."""

    stream: BinaryIO
    name: str
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype

    def read(self, shape: tuple[int, ...]) -> np.ndarray:
        """The next values as an array of ``shape``."""
        data = bytearray(self.stream.read(math.prod(shape) * self.dtype.itemsize))
        values = np.frombuffer(data, self.dtype)
        if values.size != math.prod(shape):
            raise EOFError(f"{self.name} ends too early")
        return values.reshape(shape, order="F" if self.fortran_order else "C")


def _open_member(archive: zipfile.ZipFile, name: str, path: Path) -> _Member:
    """Read the header of an array, and hold it against the number of bytes that are there."""
    info = archive.getinfo(f"{name}.npy")
    stream = archive.open(info)
    try:
        version = np.lib.format.read_magic(stream)
        if version not in HEADER_READERS:
            raise ValueError(f"written in version {version} of the format")
        shape, fortran_order, dtype = HEADER_READERS[version](stream)
    except (ValueError, KeyError, IndexError, SyntaxError, tokenize.TokenError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: {name} is no readable array: {reason}") from error
    if any(type(side) is not int or side < 0 for side in shape):
        raise ValueError(f"{path}: {name} is no readable array: its shape is {shape}")
    if dtype.hasobject:
        raise ValueError(f"{path}: {name} holds Python objects, which are never loaded; expected numbers")
    expected, present = math.prod(shape) * dtype.itemsize, info.file_size - stream.tell()
    if expected != present:
        raise ValueError(f"{path}: {name} should have {expected} bytes of values and has {present}: damaged file")
    return _Member(stream, name, shape, fortran_order, dtype)


def _image_shape(member: _Member, path: Path) -> tuple[int, int, int, int]:
    shape, dtype = member.shape, member.dtype
    if len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise ValueError(f"{path}: {member.name} has the shape {shape}, expected images (N, H, W, 3)")
    if dtype != np.uint8 and dtype.kind != "f":
        raise ValueError(f"{path}: {member.name} is {dtype}, expected uint8 (or floats) with values 0-255")
    if math.prod(shape[1:]) > LARGEST_IMAGE:
        raise ValueError(f"{path}: images of {shape[2]}x{shape[1]} pixels are larger than any that fit in memory by 64")
    return shape


def _read_statistics(
    archive: zipfile.ZipFile, mu_name: str, sigma_name: str, found: list[str], path: Path
) -> Statistics | None:
    present = [name for name in (mu_name, sigma_name) if name in found]
    if not present:
        return None
    if len(present) == 1:
        raise ValueError(f"{path} holds {present[0]} without its partner; expected {mu_name} and {sigma_name}")
    mu, sigma = (_read_whole(archive, name, path) for name in present)
    if mu.dtype.kind != "f" or sigma.dtype.kind != "f" or mu.ndim != 1 or sigma.shape != mu.shape * 2:
        raise ValueError(
            f"{path}: {mu_name} is {mu.dtype} {mu.shape} and {sigma_name} {sigma.dtype} {sigma.shape}, "
            "expected floats (D,) and (D, D)"
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{path}: {mu_name} or {sigma_name} holds values that are not finite")
    if (sigma.diagonal() < 0).any() or not np.allclose(sigma, sigma.T, rtol=1e-3, atol=1e-6 * abs(sigma).max()):
        raise ValueError(f"{path}: {sigma_name} is no covariance: not symmetric, or a variance is negative")
    return Statistics(mu, sigma)


def _read_labels(
    archive: zipfile.ZipFile, shape: tuple[int, ...] | None, found: list[str], path: Path
) -> np.ndarray | None:
    name = next((n for n in LABELS if n in found), None)
    if name is None or shape is None:
        return None
    member = _open_member(archive, name, path)
    if name != LABELS[0] and (member.shape != shape[:1] or member.dtype.kind not in "iu"):
        return None  # a second positional array of something else
    labels = member.read(member.shape) if member.shape == shape[:1] else np.zeros(member.shape[:0])
    if labels.shape != shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(f"{path}: labels are {labels.dtype} {labels.shape}, expected {shape[0]} integers")
    return labels


def _read_whole(archive: zipfile.ZipFile, name: str, path: Path) -> np.ndarray:
    member = _open_member(archive, name, path)
    size = math.prod(member.shape) * member.dtype.itemsize
    if size > LARGEST_WHOLE:
        raise ValueError(f"{path}: {name} would take {size:,} bytes of memory, at most {LARGEST_WHOLE:,} are read")
    return member.read(member.shape)


def _check_range(batch: np.ndarray, path: Path) -> None:
    low, high = float(batch.min()), float(batch.max())
    if not (low >= 0 and high <= 255):
        raise ValueError(f"{path}: arr_0 has values in {low:g}..{high:g}, expected 0..255")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what ``zipfile`` raises for damaged, encrypted or foreign files into one ``ValueError``."""
    try:
        yield
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        MemoryError,
        EOFError,
        struct.error,
        NotImplementedError,
        RuntimeError,
        OSError,
    ) as error:
        raise ValueError(f"{path} is no whole .npz file: {error}") from error
