"""Cached code grids on disk: shards written atomically, their plan, what makes a set complete.

A folder of codes holds ``plan.json`` (the plan of all shards, written first), ``shards/00000.npz``
... and ``meta.json`` (written last: the plan with counts and checksums). A shard is an uncompressed
npz of

    codes    uint16 (images, crops, tokens), raster order (uint32 for over 65,536 entries)
    labels   int64  (images,)
    index    int64  (images,) position of the image in the sorted listing of the source folder
    skipped  int64  (unreadable images,) position of images that were left out
    reasons  str    (unreadable images,)

so ``numpy.load`` reads it anywhere, its zip CRCs detect damage, and the reader maps its codes in
place. Processes on any number of machines share the work through the claims of
``dataset/claims.py``; what is known of shards without reading them: ``dataset/shard_records.py``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from dataset.shard_records import Record, Records, add_record
from utils.files import atomic_path, remove_ended, temporary_path, write_json
from utils.npz import ZIP_ERRORS, open_member
from utils.records import build, read_json, write_sealed

UNREADABLE: tuple[type[Exception], ...] = (*ZIP_ERRORS, ValueError)
LARGEST_CODEBOOK, LARGEST_GRID, LARGEST_CODE = 1 << 24, 1 << 20, 1 << 10  # entries, codes, pixels
CHANGED = "its sha256 is not the one that it was written with"


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


def missing_shards(folder: str | Path, plan: CodesPlan) -> list[int]:
    """Return the shards that do not exist; the folder is listed once."""
    shards = shard_path(folder, 0).parent
    names = set(os.listdir(shards)) if shards.is_dir() else set()
    return [s for s in range(plan.num_shards) if shard_path(folder, s).name not in names]


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
    archive = io.BytesIO()  # hashed here: the shard need never be read for that
    np.savez(archive, codes=codes, labels=labels, index=index, skipped=missing, reasons=reasons)
    content, path = archive.getbuffer(), shard_path(folder, shard)
    try:
        with atomic_path(path, tidy=False) as temporary:
            with open(temporary, "wb") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())  # the time of a network disk's file is its server's
                time = os.fstat(f.fileno()).st_mtime_ns
            sha256 = hashlib.sha256(content).hexdigest()
            add_record(folder, Record(shard, len(labels), sha256, len(content), time))
    except FileNotFoundError:
        if not path.exists():  # else another process has made it and cleared up, see Claims
            raise


def _examine(folder: str | Path, plan: CodesPlan, shard: int) -> str | Record:
    """Read a shard once; return its record, or what is wrong with it."""
    path, arrays = shard_path(folder, shard), {}
    try:
        time, content = path.stat().st_mtime_ns, path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            archive.filename = str(path)
            for name in ("codes", "labels", "index", "skipped", "reasons"):
                member = open_member(archive, name)
                arrays[name] = member.read(member.shape)
    except UNREADABLE as error:
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
    if not are_labels(labels, len(plan.classes)):
        return f"it holds a label outside of {len(plan.classes)} classes"
    sha256 = hashlib.sha256(content).hexdigest()
    return Record(shard, len(labels), sha256, len(content), time)


def shard_damage(
    folder: str | Path, plan: CodesPlan, shard: int, sha256: str | None = None
) -> str | None:
    """Return what is wrong with an existing shard, or None; all bytes are checked against CRCs,
    and against ``sha256`` of ``meta.json`` or a record if that is given.
    """
    found = _examine(folder, plan, shard)
    if isinstance(found, str):
        return found
    if sha256 not in (None, found.sha256):
        return CHANGED
    return None


def check_shard(
    folder: str | Path, plan: CodesPlan, shard: int, record: Record | None
) -> tuple[Record | None, str | None]:
    """Read a shard; return its record, which is kept for others, or else what is wrong with it.

    record: the one that it should have, if that is known.
    """
    found = _examine(folder, plan, shard)
    if isinstance(found, str):
        return None, found
    if record is not None:
        same = found.sha256 == record.sha256
        return (record, None) if same else (None, CHANGED)
    add_record(folder, found)
    return found, None


def are_labels(labels: np.ndarray, classes: int) -> bool:
    """Return whether all labels are of one of the classes."""
    return labels.min(initial=0) >= 0 and labels.max(initial=0) < classes


def finished_damage(folder: str | Path, meta: dict, shard: int) -> str | None:
    """Return what is wrong with a finished shard, or None; also checks its hash in ``meta``."""
    return shard_damage(folder, plan_of(meta, folder), shard, meta["shards"][shard]["sha256"])


def plan_of(meta: dict, folder: str | Path) -> CodesPlan:
    """Return the plan within ``meta`` of ``folder``; ``ValueError`` if it is damaged."""
    values = {f.name: meta[f.name] for f in fields(CodesPlan) if f.name in meta}
    return build(CodesPlan, values, f"{folder}/meta.json")


def finish_codes(folder: str | Path, plan: CodesPlan, sources: Sequence[str]) -> dict | None:
    """Write ``meta.json``, and ``skipped.json`` if images were unreadable; return the former.

    Reads no shard that is as it was recorded, and others once. Returns None and writes nothing
    while a shard is missing or damaged. ``sources``: paths in listing order, which
    ``skipped.json`` names.
    """
    if missing_shards(folder, plan):
        return None
    records, known = Records(folder), []
    for shard in range(plan.num_shards):
        record = records.find(shard, shard_path(folder, shard)) or _examine(folder, plan, shard)
        if isinstance(record, str):
            return None
        known.append(record)

    skipped = []
    for record in known:
        if record.images < len(plan.shard_images(record.shard)):
            with np.load(shard_path(folder, record.shard), allow_pickle=False) as arrays:
                rows = zip(arrays["skipped"].tolist(), arrays["reasons"].tolist(), strict=True)
                skipped += [{"index": i, "path": sources[i], "reason": r} for i, r in rows]
    report = Path(folder) / "skipped.json"
    if skipped:
        write_json(report, skipped)
    else:
        report.unlink(missing_ok=True)
    shards = [
        {
            "file": f"shards/{shard_path(folder, r.shard).name}",
            "images": r.images,
            "sha256": r.sha256,
        }
        for r in known
    ]
    counts = {"num_coded_images": sum(r.images for r in known), "num_skipped_images": len(skipped)}
    meta = {**asdict(plan), **counts, "shards": shards}
    write_sealed(Path(folder) / "meta.json", meta)
    records.join(known)
    remove_ended(Path(folder) / "shards")
    return meta
