"""Codes that other projects publish, read image by image: RandAR's tar of .npy files and RAR's
.jsonl.

Both are files from outside: names, sizes and ranges are checked, nothing is unpacked to disk, and
nothing is allocated before the bytes that it holds were seen.
"""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path

import numpy as np

from utils.logger import progress_of_bytes
from utils.npz import parse_npy

MAX_CLASSES = 1 << 20
MAX_IMAGE_BYTES = 1 << 20  # of all crops of one image


class TarCodes:
    """Reader of RandAR's layout: ``ANY_codes/LABEL/INDEX.npy`` in an uncompressed tar, int64
    (crops, tokens), raster order.

    Images are in the order of the tar. ``classes``: the numbers up to the largest label, or the
    sorted labels if they are names.
    """

    NAME = re.compile(r"(?:\./)?(?:[^/]+/)*[^/]*_codes/([^/]+)/[^/]+\.npy")

    def __init__(self, path: Path):
        self.path = path
        self._offsets, self._sizes, names = self._list()
        if not names:
            raise ValueError(f"--code-path: {path} holds no file ANY_codes/LABEL/INDEX.npy")
        self.labels, self.classes = number_labels(names, path)
        self._file = open(path, "rb")  # noqa: SIM115 - read from as long as the reader lives
        first = self._read(0)
        if first.ndim != 2:
            raise ValueError(
                f"{path}: the first image has the shape {first.shape}, expected (crops, tokens)"
            )
        self.num_crops, self.num_tokens = first.shape

    def _list(self) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Return offset and size of each image's file, and its label as written."""
        offsets, sizes, names = [], [], []
        try:
            with (
                tarfile.open(self.path, "r:") as tar,
                progress_of_bytes("listing", self.path.stat().st_size) as bar,
            ):
                while (entry := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # or a million stay
                    bar.update(tar.offset - bar.n)
                    match = self.NAME.fullmatch(entry.name)
                    if entry.isdir():
                        continue
                    if not entry.isreg() or match is None or entry.size > MAX_IMAGE_BYTES:
                        raise ValueError(
                            f"--code-path: {self.path} holds {entry.name[:80]!r}, expected only "
                            f"ANY_codes/LABEL/INDEX.npy of at most {MAX_IMAGE_BYTES:,} bytes"
                        )
                    offsets.append(entry.offset_data)
                    sizes.append(entry.size)
                    names.append(match.group(1))
        except tarfile.TarError as error:
            raise ValueError(
                f"--code-path: {self.path} is not a whole, uncompressed tar: {error}"
            ) from error
        return np.array(offsets, np.int64), np.array(sizes, np.int64), names

    def _read(self, i: int) -> np.ndarray:
        self._file.seek(self._offsets[i])
        return parse_npy(self._file.read(self._sizes[i]), f"{self.path}, image {i}")

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> np.ndarray:
        """Return all crops (crops, tokens) of one image."""
        codes = self._read(i)
        if codes.shape != (self.num_crops, self.num_tokens) or codes.dtype.kind not in "iu":
            raise ValueError(
                f"{self.path}: image {i} has {codes.dtype} of shape {codes.shape}, expected "
                f"integers {(self.num_crops, self.num_tokens)}"
            )
        return codes


class JsonlCodes:
    """Reader of RAR's layout: a line ``{"class_id": int, "tokens": [...]}`` per crop, raster order.

    Crops of one image are not kept together there, so each counts as an image of one crop.
    """

    num_crops = 1

    def __init__(self, path: Path):
        self.path = path
        self._file = open(path, "rb")  # noqa: SIM115 - read from as long as the reader lives
        offsets: list[int] = []
        labels: list[str] = []
        with progress_of_bytes("listing", path.stat().st_size) as bar:
            while line := self._line(len(offsets)):
                match = re.search(rb'"class_id"\s*:\s*(\d{1,7})\b', line)
                if match is None:
                    raise ValueError(
                        f"--code-path: {path}, line {len(offsets) + 1} has no class_id"
                    )
                offsets.append(self._file.tell() - len(line))
                labels.append(match.group(1).decode())
                bar.update(len(line))
        if not labels:
            raise ValueError(f"--code-path: {path} is empty")
        self._offsets = np.array(offsets, np.int64)
        self.labels, self.classes = number_labels(labels, path)
        self.num_tokens = len(self._tokens(0))

    def _line(self, i: int) -> bytes:
        line = self._file.readline(MAX_IMAGE_BYTES)
        if len(line) == MAX_IMAGE_BYTES:
            raise ValueError(f"--code-path: {self.path}, line {i + 1} is too long")
        return line

    def _tokens(self, i: int) -> list[int]:
        self._file.seek(self._offsets[i])
        try:
            tokens = json.loads(self._line(i))["tokens"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"--code-path: {self.path}, line {i + 1} has no tokens") from error
        if type(tokens) is not list or not all(type(t) is int and 0 <= t < 1 << 31 for t in tokens):
            raise ValueError(f"--code-path: {self.path}, line {i + 1}: tokens are not all codes")
        return tokens

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> np.ndarray:
        """Return the one crop (1, tokens) of line ``i``."""
        tokens = self._tokens(i)
        if len(tokens) != self.num_tokens:
            raise ValueError(
                f"--code-path: {self.path}, line {i + 1} has {len(tokens)} tokens, the first has "
                f"{self.num_tokens}"
            )
        return np.array([tokens], np.int64)


def number_labels(names: list[str], path: Path) -> tuple[np.ndarray, list[str]]:
    """Return labels (N,) int64 and the names of the classes: numbers are taken as they are, names
    are numbered in sorted order.
    """
    if all(re.fullmatch(r"\d{1,9}", name) for name in names):
        labels = np.array([int(name) for name in names], np.int64)
        if labels.max() >= MAX_CLASSES:
            raise ValueError(f"--code-path: {path} has a class {labels.max()}, which is no label")
        return labels, [str(c) for c in range(labels.max() + 1)]
    classes = sorted(set(names))
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number[name] for name in names], np.int64), classes
