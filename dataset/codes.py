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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from dataset.interface import Codes
from dataset.other_codes import PublishedCodes
from utils.files import (
    atomic_path,
    remove_ended,
    require_folder,
    sha256_file,
    temporary_path,
    write_json,
)
from utils.npz import map_member, open_member, open_npz
from utils.records import build, read_json, read_sealed, write_sealed

LARGEST_CODEBOOK, LARGEST_GRID, LARGEST_CODE = 1 << 24, 1 << 20, 1 << 10  # entries, codes, pixels


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

    def __post_init__(self) -> None:
        if len(self.grid) != 2 or not self.classes or not self.crops:
            raise ValueError("codes have a grid of two sides, classes and crops")
        if self.codebook_size > LARGEST_CODEBOOK or self.num_tokens > LARGEST_GRID:
            raise ValueError(f"a codebook of {self.codebook_size} or a grid of {self.grid} codes")
        if not max(self.grid) <= self.image_size <= LARGEST_CODE * min(self.grid):
            raise ValueError(f"images of {self.image_size} pixels have no grid of {self.grid}")

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
    if not path.exists() and any(Path(folder).glob("shards/*.npz")) and not path.exists():
        raise ValueError(
            f"--code-path: {folder} holds shards but no plan.json, so nothing says which tokenizer "
            "and crops made them; give another folder or delete it"
        )
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

    recorded = read_json(path)
    if not isinstance(recorded, dict):
        raise ValueError(f"{path} is damaged: it does not hold a JSON object")
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
    arrays = {}
    try:
        with open_npz(shard_path(folder, shard)) as archive:
            for name in ("codes", "labels", "index", "skipped", "reasons"):
                member = open_member(archive, name)
                arrays[name] = member.read(member.shape)
    except ValueError as error:
        return str(error)
    kinds = "".join(array.dtype.kind for array in arrays.values())
    if kinds != "uiiiU" or arrays["skipped"].shape != arrays["reasons"].shape:
        return f"its arrays are of types {kinds}, expected uiiiU"
    indices = np.sort(np.concatenate([arrays["index"], arrays["skipped"]]), axis=None)
    if not np.array_equal(indices, plan.shard_images(shard)):
        return "it does not hold each of its images once"
    codes, labels = arrays["codes"], arrays["labels"]
    if codes.shape != (len(arrays["index"]), len(plan.crops), plan.num_tokens):
        return f"codes of shape {codes.shape} are not those of the plan"
    if labels.shape != codes.shape[:1]:
        return f"{len(codes)} images have labels of shape {labels.shape}"
    if (largest := codes.max(initial=0)) >= plan.codebook_size:
        return f"it holds code {largest} of {plan.codebook_size}, counted from 0"
    if not _are_labels(labels, len(plan.classes)):
        return f"it holds a label outside of {len(plan.classes)} classes"
    return None


def _are_labels(labels: np.ndarray, classes: int) -> bool:
    """Return whether all labels are of one of the classes."""
    return labels.min(initial=0) >= 0 and labels.max(initial=0) < classes


def finished_damage(folder: str | Path, meta: dict, shard: int) -> str | None:
    """Return what is wrong with a finished shard, or None; also checks its hash in ``meta``."""
    if (damage := shard_damage(folder, plan_of(meta, folder), shard)) is not None:
        return damage
    if sha256_file(shard_path(folder, shard)) != meta["shards"][shard]["sha256"]:
        return "its sha256 is not the one in meta.json"
    return None


def plan_of(meta: dict, folder: str | Path) -> CodesPlan:
    """Return the plan within ``meta`` of ``folder``; ``ValueError`` if it is damaged."""
    values = {f.name: meta[f.name] for f in fields(CodesPlan) if f.name in meta}
    return build(CodesPlan, values, f"{folder}/meta.json")


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
    write_sealed(Path(folder) / "meta.json", meta)
    # left by processes killed right after their last shard
    remove_ended(Path(folder) / "shards")
    for pattern in ("*.claim", "*.lapsed-*"):
        for claim in (Path(folder) / "shards").glob(pattern):
            claim.unlink(missing_ok=True)
    return meta


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
        if not _are_labels(self.labels, self.num_classes):
            raise ValueError(f"{folder} holds labels outside of its {self.num_classes} classes")
        counts = (self.meta.get("num_coded_images"), self.meta.get("num_skipped_images"))
        if counts != (len(self.labels), plan.num_images - len(self.labels)):
            raise ValueError(f"{folder}/meta.json is damaged: it counts other images")
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
