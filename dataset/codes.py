"""Cached code grids: shards written atomically, and a memory-mapped reader.

A folder of codes holds ``plan.json`` (the plan of all shards, written first), ``shards/00000.npz``
... and ``meta.json`` (written last: the plan with counts and checksums). A shard is an uncompressed
npz of

    codes    uint16 (images, crops, tokens), raster order (uint32 for over 65,536 entries)
    labels   int64  (images,)
    index    int64  (images,) position of the image in the sorted listing of the source folder
    skipped  int64  (unreadable images,) position of images that were left out
    reasons  str    (unreadable images,)

so ``numpy.load`` reads it anywhere, its zip CRCs detect damage, and the reader maps its codes in
place. Processes on any number of machines share the work through the claim files of
``dataset/claims.py``.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from utils.files import (
    atomic_path,
    remove_ended,
    require_folder,
    sha256_file,
    temporary_path,
    write_json,
)
from utils.npz import map_member, open_npz


@dataclass(frozen=True)
class CodesPlan:
    """What the content of a folder of codes depends on; a rerun must agree in every field."""

    classes: list[str]
    num_images: int  # files in the source listing
    source_sha256: str  # of the listing: relative paths, one per line
    image_size: int
    grid: list[int]  # height, width in codes
    crops: list[str]  # names, in order
    crop_range: float
    codebook_size: int
    tokenizer: str  # name, such as VQ-16
    tokenizer_sha256: str | None  # of its weights; None: not known
    precision: str
    shard_size: int  # images per shard

    @property
    def num_tokens(self) -> int:
        """Codes per crop."""
        return self.grid[0] * self.grid[1]

    @property
    def num_shards(self) -> int:
        """Number of shard files."""
        return -(-self.num_images // self.shard_size)

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """Smallest type that holds every code and is at least uint16."""
        return np.uint16 if self.codebook_size <= 1 << 16 else np.uint32

    def shard_images(self, shard: int) -> range:
        """Return the source indices of one shard."""
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.num_images))


def shard_path(folder: str | Path, shard: int) -> Path:
    """Return the path of shard number ``shard``."""
    return Path(folder) / "shards" / f"{shard:05d}.npz"


def start_codes(folder: str | Path, plan: CodesPlan) -> None:
    """Record ``plan`` in ``folder``; ``ValueError`` if it records another, with the differences.

    Of several processes that start at once, one records its plan and the others compare
    theirs with it.
    """
    path = Path(folder) / "plan.json"
    remove_ended(path)
    aside = temporary_path(path)
    write_json(aside, asdict(plan))
    try:
        os.link(aside, path)
        return
    except FileExistsError:
        pass
    finally:
        aside.unlink()

    recorded = _read_json(path)
    wanted = json.loads(json.dumps(asdict(plan)))
    if differing := [k for k in wanted if recorded.get(k) != wanted[k]]:
        k = differing[0]
        raise ValueError(
            f"--code-path: {folder} already holds codes made with another "
            f"{', '.join(differing)} ({k}: {_short(recorded.get(k))} there, "
            f"{_short(wanted[k])} now); give another folder or delete it"
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it does not hold a JSON object")
    return value


def write_shard(
    folder: str | Path,
    plan: CodesPlan,
    shard: int,
    codes: np.ndarray,
    labels: np.ndarray,
    index: np.ndarray,
    skipped: Sequence[tuple[int, str]] = (),
) -> None:
    """Write one shard atomically: codes (images, crops, tokens), labels and index (images,).

    ``skipped``: (index, reason) of unreadable images.
    """
    assert codes.shape[1:] == (len(plan.crops), plan.num_tokens), codes.shape
    assert len(codes) == len(labels) == len(index)
    codes = codes.astype(plan.dtype)
    missing = np.array([i for i, _ in skipped], np.int64)
    reasons = np.array([r for _, r in skipped], np.str_)
    with atomic_path(shard_path(folder, shard)) as temporary, open(temporary, "wb") as f:
        np.savez(f, codes=codes, labels=labels, index=index, skipped=missing, reasons=reasons)


def shard_damage(folder: str | Path, plan: CodesPlan, shard: int) -> str | None:
    """Return what is wrong with an existing shard, or None; all bytes are checked against CRCs."""
    path = shard_path(folder, shard)
    try:
        with zipfile.ZipFile(path) as archive:
            if bad := archive.testzip():
                return f"checksum of {bad} fails"
        with np.load(path, allow_pickle=False) as arrays:
            indices = np.sort(np.concatenate([arrays["index"], arrays["skipped"]]))
            shape, labels = arrays["codes"].shape, arrays["labels"].shape
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        return str(error)
    if not np.array_equal(indices, plan.shard_images(shard)):
        return "it does not hold each of its images once"
    if shape != (*labels, len(plan.crops), plan.num_tokens):
        return f"codes of shape {shape} and labels of shape {labels} are not those of the plan"
    return None


def finished_damage(folder: str | Path, meta: dict, shard: int) -> str | None:
    """Return what is wrong with a finished shard, or None; also checks its hash in ``meta``."""
    plan = CodesPlan(**{f.name: meta[f.name] for f in fields(CodesPlan)})
    if (damage := shard_damage(folder, plan, shard)) is not None:
        return damage
    if sha256_file(shard_path(folder, shard)) != meta["shards"][shard]["sha256"]:
        return "its sha256 is not the one in meta.json"
    return None


def num_skipped(path: str | Path) -> int:
    """Return the number of unreadable images that a shard leaves out."""
    with np.load(path, allow_pickle=False) as arrays:
        return len(arrays["skipped"])


def finish_codes(folder: str | Path, plan: CodesPlan, sources: Sequence[str]) -> dict | None:
    """Write ``meta.json``, and ``skipped.json`` if images were unreadable; return the former.

    Returns None and writes nothing while a shard is missing or damaged. ``sources``: paths in
    listing order, which ``skipped.json`` names.
    """
    paths = [shard_path(folder, s) for s in range(plan.num_shards)]
    if not all(p.exists() for p in paths):
        return None
    if any(shard_damage(folder, plan, s) for s in range(plan.num_shards)):
        return None

    shards, skipped, coded = [], [], 0
    for path in paths:
        with np.load(path, allow_pickle=False) as arrays:
            count = len(arrays["labels"])
            rows = zip(arrays["skipped"].tolist(), arrays["reasons"].tolist(), strict=True)
            skipped += [{"index": i, "path": sources[i], "reason": reason} for i, reason in rows]
        shards.append({"file": f"shards/{path.name}", "images": count, "sha256": sha256_file(path)})
        coded += count

    report = Path(folder) / "skipped.json"
    if skipped:
        write_json(report, skipped)
    else:
        report.unlink(missing_ok=True)
    counts = {"num_coded_images": coded, "num_skipped_images": len(skipped)}
    meta = {**asdict(plan), **counts, "shards": shards}
    write_json(Path(folder) / "meta.json", meta)
    # left by processes killed right after their last shard
    remove_ended(Path(folder) / "shards")
    for pattern in ("*.claim", "*.lapsed-*"):
        for claim in (Path(folder) / "shards").glob(pattern):
            claim.unlink(missing_ok=True)
    return meta


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
        self.meta = _read_json(Path(folder) / "meta.json")
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
        try:
            with open_npz(path) as archive:
                return map_member(archive, "codes"), map_member(archive, "labels")
        except ValueError as error:
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
    """Reader of published ``*_codes/0.npy`` [1, crops, tokens] and ``*_labels/0.npy`` [1]."""

    def __init__(self, folder: str | Path, option: str = "--code-path"):
        self._codes = self._only_folder(Path(folder), "_codes", option)
        labels = self._only_folder(Path(folder), "_labels", option)
        count = sum(1 for _ in self._codes.glob("*.npy"))
        if count == 0:
            raise ValueError(f"{option}: {self._codes} holds no .npy files")
        values = [self._read(labels / f"{i}.npy").item() for i in range(count)]
        self.labels = np.array(values, np.int64)
        shape = self._read(self._codes / "0.npy").shape
        if len(shape) != 3 or shape[0] != 1:
            raise ValueError(
                f"{option}: {self._codes}/0.npy has the shape {shape}, expected (1, crops, tokens)"
            )
        _, self.num_crops, self.num_tokens = shape
        self.num_classes = int(self.labels.max()) + 1
        self.classes = [str(label) for label in range(self.num_classes)]
        self.meta: dict = {}

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


def open_codes(folder: str | Path, option: str = "--code-path") -> Codes:
    """Open codes in our or the published layout; ``ValueError`` naming ``option`` if neither."""
    require_folder(folder, option, "make it with scripts/autoregressive/extract_codes_c2i.sh")
    if (Path(folder) / "meta.json").is_file():
        return ShardedCodes(folder)
    if (Path(folder) / "plan.json").is_file():
        raise ValueError(
            f"{option}: {folder} is not complete; run extract_codes_c2i.sh again to finish it"
        )
    return PublishedCodes(folder, option)


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
