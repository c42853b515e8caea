"""Readers of cached code grids: our shards, mapped into memory, or whatever else is there.

The shards themselves are those of ``dataset/shards.py``.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset.interface import Codes
from dataset.other_codes import PublishedCodes
from dataset.shards import are_labels, plan_of
from utils.files import require_folder
from utils.npz import map_member, open_member, open_npz
from utils.records import build, read_sealed


@dataclass(frozen=True)
class _Shard:
    """An entry of ``shards`` in ``meta.json``."""

    file: str
    images: int
    sha256: str


class ShardedCodes(Codes):
    """Reader of our shards; threads may share it."""

    def __init__(self, folder: str | Path):
        self.meta = read_sealed(Path(folder) / "meta.json")
        plan = plan_of(self.meta, folder)
        self.num_crops, self.num_tokens = len(plan.crops), plan.num_tokens
        self.num_classes = len(plan.classes)
        entries, what = self.meta.get("shards"), f"{folder}/meta.json: an entry of shards"
        if not isinstance(entries, list) or len(entries) != plan.num_shards:
            raise ValueError(f"{folder}/meta.json is damaged: it names other shards than its plan")
        self._shards, labels = [], []
        for shard in (build(_Shard, entry, what, least=0) for entry in entries):
            path = Path(folder) / "shards" / Path(shard.file).name
            codes, shard_labels = self._open(path)
            count = shard.images
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
        if not are_labels(self.labels, self.num_classes):
            raise ValueError(f"{folder} holds labels outside of its {self.num_classes} classes")
        counts = (self.meta.get("num_coded_images"), self.meta.get("num_skipped_images"))
        if counts != (len(self.labels), plan.num_images - len(self.labels)):
            raise ValueError(f"{folder}/meta.json is damaged: it counts other images")
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
