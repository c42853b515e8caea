"""Readers of cached code grids: of our shards, mapped into memory, and of the published layout.

The shards themselves are those of ``dataset/shards.py``.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from utils.files import read_json, require_folder
from utils.npz import map_member, open_member, open_npz


class Codes:
    """Interface of the readers: random access to the cached codes of a data set."""

    labels: np.ndarray  # (N,) int64
    num_crops: int
    num_tokens: int
    num_classes: int
    crop_weights: np.ndarray | None = None  # (num_crops,) probability of each crop; None: equal
    meta: dict  # as in meta.json; empty for the published layout

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, images: np.ndarray, crops: np.ndarray) -> np.ndarray:
        """Return codes (B, tokens) int64, in raster order, of B (image, crop) pairs."""
        raise NotImplementedError

    def batch(self, images: np.ndarray, crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return codes (B, tokens) int64 and labels (B,) int64 of B (image, crop) pairs."""
        return self.gather(images, crops), self.labels[images]


class ShardedCodes(Codes):
    """Reader of our shards; threads may share it."""

    def __init__(self, folder: str | Path):
        self.meta = read_json(Path(folder) / "meta.json")
        fields = {"classes", "grid", "crops", "image_size", "codebook_size"}
        fields |= {"tokenizer_sha256", "shards"}
        if missing := fields - self.meta.keys():
            raise ValueError(
                f"{folder}/meta.json is damaged: it lacks {', '.join(sorted(missing))}"
            )
        self.num_crops = len(self.meta["crops"])
        self.num_tokens = self.meta["grid"][0] * self.meta["grid"][1]
        self.num_classes = len(self.meta["classes"])
        self._shards, labels = [], []
        for shard in self.meta["shards"]:
            path = Path(folder) / "shards" / Path(shard["file"]).name
            codes, shard_labels = self._open(path)
            count = shard["images"]
            shape = (count, self.num_crops, self.num_tokens)
            if codes.shape != shape or shard_labels.shape != (count,):
                raise ValueError(
                    f"{path} holds codes of shape {codes.shape}, unlike "
                    f"{folder}/meta.json; extract again"
                )
            if codes.dtype.kind != "u" or shard_labels.dtype.kind != "i":
                raise ValueError(
                    f"{path} holds codes of type {codes.dtype} and labels of type "
                    f"{shard_labels.dtype}, expected whole numbers; extract again"
                )
            self._shards.append(codes)
            labels.append(shard_labels)
        self.labels = np.concatenate(labels)
        self._ends = np.cumsum([len(s) for s in self._shards])

    @staticmethod
    def _open(path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Return codes, mapped, and a copy of the labels; a process may have only so many maps."""
        try:
            with open_npz(path) as archive:
                labels = open_member(archive, "labels")
                return map_member(archive, "codes"), labels.read(labels.shape)
        except ValueError as error:
            if os.strerror(errno.ENOMEM) in str(error):
                raise ValueError(
                    f"{path} cannot be mapped: this process has no address space or, at one map "
                    "per shard, no maps left (sysctl vm.max_map_count); raise the limit, or "
                    "extract with a larger --shard-size"
                ) from error
            raise ValueError(
                f"{path} is missing or damaged ({error}); delete it and extract again"
            ) from error

    def gather(self, images: np.ndarray, crops: np.ndarray) -> np.ndarray:
        images, crops = np.asarray(images), np.asarray(crops)
        out = np.empty((len(images), self.num_tokens), np.int64)
        shard_of = np.searchsorted(self._ends, images, side="right")
        for shard in np.unique(shard_of):
            rows = np.flatnonzero(shard_of == shard)
            codes = self._shards[shard]
            first_image = self._ends[shard] - len(codes)
            out[rows] = codes[images[rows] - first_image, crops[rows]]
        return out


class PublishedCodes(Codes):
    """Reader of published ``*_codes/0.npy`` [1, crops, tokens] and ``*_labels/0.npy`` [1].

    labels: all of them (N,), as another process has read them.
    """

    def __init__(
        self,
        folder: str | Path,
        option: str = "--code-path",
        labels: np.ndarray | None = None,
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
            # numpy's reader takes several times as long
            if len(content) != len(first) or not content.startswith(head):
                content = head + self._read(Path(path)).astype(label.dtype).tobytes()
            values.append(content[len(head) :])
        return np.frombuffer(b"".join(values), label.dtype).astype(np.int64)

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
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} is missing or damaged: {error}") from error

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


def open_codes(
    folder: str | Path, option: str = "--code-path", labels: np.ndarray | None = None
) -> Codes:
    """Open codes in our or the published layout; ``ValueError`` naming ``option`` if neither.

    labels: see ``PublishedCodes``.
    """
    require_folder(folder, option, "make it with scripts/autoregressive/extract_codes_c2i.sh")
    if (Path(folder) / "meta.json").is_file():
        return ShardedCodes(folder)
    if (Path(folder) / "plan.json").is_file():
        raise ValueError(
            f"{option}: {folder} is not complete; run extract_codes_c2i.sh again to finish it"
        )
    return PublishedCodes(folder, option, labels)


class MixedCodes(Codes):
    """Two sets of codes of the same images, such as ten crops at range 1.1 and ten at 1.05, as one.

    Crops of the second set are numbered after those of the first. The second set is drawn with
    probability ``weight``, which ``crop_weights`` divides equally among its crops.
    """

    def __init__(self, first: Codes, second: Codes, weight: float):
        for name in ("tokenizer_sha256", "source_sha256", "grid", "classes", "image_size"):
            if first.meta.get(name) != second.meta.get(name):
                raise ValueError(
                    f"--mix-code-path: its {name} differs from that of "
                    "--code-path; they must be equal"
                )
        if first.num_tokens != second.num_tokens or not np.array_equal(first.labels, second.labels):
            raise ValueError(
                "--mix-code-path holds other images than --code-path: labels or code counts differ"
            )
        self.parts, self.labels, self.meta = (first, second), first.labels, first.meta
        self.num_crops = first.num_crops + second.num_crops
        self.num_tokens, self.num_classes = first.num_tokens, first.num_classes
        shares = [(1 - weight) / first.num_crops] * first.num_crops
        shares += [weight / second.num_crops] * second.num_crops
        self.crop_weights = np.array(shares)

    def gather(self, images: np.ndarray, crops: np.ndarray) -> np.ndarray:
        images, crops = np.asarray(images), np.asarray(crops)
        out = np.empty((len(images), self.num_tokens), np.int64)
        split = self.parts[0].num_crops
        second = crops >= split
        for part, rows, offset in zip(self.parts, (~second, second), (0, split), strict=True):
            out[rows] = part.gather(images[rows], crops[rows] - offset)
        return out
