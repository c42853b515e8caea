"""Codes that other projects publish, read image by image: the published folders of .npy files,
RandAR's tar of such files and RAR's .jsonl.

All are files from outside: names, sizes and ranges are checked, nothing is unpacked to disk, and
nothing is allocated before the bytes that it holds were seen.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from contextlib import suppress
from pathlib import Path

import numpy as np

from dataset.interface import Codes
from utils.logger import progress_of_bytes
from utils.npz import parse_npy

MAX_CLASSES = 1 << 20
MAX_IMAGE_BYTES = 1 << 20  # of all crops of one image


class PublishedCodes(Codes):
    """Reader of published ``*_codes/0.npy`` [1, crops, tokens] and ``*_labels/0.npy`` [1].

    labels: all of them (N,), as another process has read them.
    """

    def __init__(
        self, folder: str | Path, option: str = "--code-path", labels: np.ndarray | None = None
    ):
        self._codes = self._only_folder(Path(folder), "_codes", option)
        if labels is None:
            labels = self._read_labels(self._only_folder(Path(folder), "_labels", option), option)
        self.labels = labels
        shape = self._read(self._codes / "0.npy").shape
        if len(shape) != 3 or shape[0] != 1:
            raise ValueError(
                f"{option}: {self._codes}/0.npy has the shape {shape}, expected (1, crops, tokens)"
            )
        _, self.num_crops, self.num_tokens = shape
        self.num_classes = int(self.labels.max()) + 1
        self.classes = [str(label) for label in range(self.num_classes)]
        self.meta: dict = {}

    def _read_labels(self, folder: Path, option: str) -> np.ndarray:
        """Return the labels (N,) int64, of a file each."""
        count = sum(entry.name.endswith(".npy") for entry in os.scandir(self._codes))
        if count == 0:
            raise ValueError(f"{option}: {self._codes} holds no .npy files")
        label = self._read(folder / "0.npy")
        first = (folder / "0.npy").read_bytes()
        head = first[: len(first) - label.nbytes]
        values = []
        for path in (f"{folder}/{i}.npy" for i in range(count)):
            content = b""
            with suppress(OSError), open(path, "rb", buffering=0) as file:
                content = file.read()
            # one header is parsed, which takes several times as long as reading it
            if len(content) != len(first) or not content.startswith(head):
                content = head + self._read(Path(path)).astype(label.dtype).tobytes()
            values.append(content[len(head) :])
        labels = np.frombuffer(b"".join(values), label.dtype).astype(np.int64)
        if len(labels) != count or labels.min() < 0 or labels.max() >= MAX_CLASSES:
            raise ValueError(f"{option}: {folder} holds a file that is not one label")
        return labels

    @staticmethod
    def _only_folder(folder: Path, end: str, option: str) -> Path:
        folders = sorted(p for p in folder.glob(f"*{end}") if p.is_dir())
        if len(folders) != 1:
            raise ValueError(
                f"{option}: {folder} holds no codes: expected meta.json with shards/ (written by "
                "extract_codes_c2i.sh when it ends) or one folder *_codes beside one *_labels"
            )
        return folders[0]

    @staticmethod
    def _read(path: Path) -> np.ndarray:
        try:
            values = parse_npy(path.read_bytes(), str(path))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is missing or damaged: {error}") from error
        if values.dtype.kind not in "iu":
            raise ValueError(f"{path} holds {values.dtype}, expected whole numbers")
        return values

    def gather(self, images: np.ndarray, crops: np.ndarray) -> np.ndarray:
        pairs = zip(images, crops, strict=True)
        return np.stack([self.image(i)[c] for i, c in pairs]).astype(np.int64)

    def image(self, i: int) -> np.ndarray:
        """Return all crops (crops, tokens) of one image."""
        path, shape = self._codes / f"{i}.npy", (1, self.num_crops, self.num_tokens)
        codes = self._read(path)
        if codes.shape != shape:
            raise ValueError(f"{path} has the shape {codes.shape}, expected {shape}")
        return codes[0]


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
