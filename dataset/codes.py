"""Cached code grids: shards that appear whole or not at all, and a memory-mapped reader.

A folder of codes holds ``plan.json`` (what is to be made, written first), ``shards/00000.npz`` ... and
``meta.json`` (written last: the same facts with counts and checksums). A shard is a plain uncompressed npz of

    codes   uint16 (images, crops, tokens), raster order (uint32 where the codebook has over 65,536 entries)
    labels  int64  (images,)
    index   int64  (images,) place of the image in the sorted listing of the source folder

so ``numpy.load`` reads it anywhere, and the reader maps its codes in place.
"""

from __future__ import annotations

import json
import struct
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from utils.files import atomic_path, require_folder, sha256_file, write_json


@dataclass(frozen=True)
class CodesPlan:
    """What a folder of codes is made of; a rerun must agree with it in every field."""

    classes: list[str]
    num_images: int  # files in the source listing
    source_sha256: str  # of the listing: relative paths, one a line
    image_size: int
    grid: list[int]  # height, width in codes
    crops: list[str]  # names, in order
    crop_range: float
    codebook_size: int
    tokenizer: str  # name, such as VQ-16
    tokenizer_sha256: str  # of its weights
    precision: str
    shard_size: int  # images

    @property
    def num_tokens(self) -> int:
        """Codes of one crop."""
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
        """Source indices of one shard."""
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.num_images))


def shard_path(folder: str | Path, shard: int) -> Path:
    """Where shard number ``shard`` stands."""
    return Path(folder) / "shards" / f"{shard:05d}.npz"


def start_codes(folder: str | Path, plan: CodesPlan) -> None:
    """Record ``plan`` in ``folder``, or check that it is the one recorded there; ``ValueError`` says what differs."""
    path = Path(folder) / "plan.json"
    if not path.exists():
        write_json(path, asdict(plan))
        return
    before, now = json.loads(path.read_text()), asdict(plan)
    differing = [k for k in now if before.get(k) != now[k]]
    if differing:
        k = differing[0]
        raise ValueError(
            f"--code-path: {folder} already holds codes made with another {', '.join(differing)} "
            f"({k}: {_short(before.get(k))} there, {_short(now[k])} now); give another folder or delete it"
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def write_shard(
    folder: str | Path, plan: CodesPlan, shard: int, codes: np.ndarray, labels: np.ndarray, index: np.ndarray
) -> None:
    """Write one shard atomically; codes (images, crops, tokens), labels and index (images,)."""
    assert codes.shape[1:] == (len(plan.crops), plan.num_tokens), codes.shape
    assert len(codes) == len(labels) == len(index)
    with atomic_path(shard_path(folder, shard)) as temporary, open(temporary, "wb") as f:
        np.savez(f, codes=codes.astype(plan.dtype), labels=labels, index=index)


def finish_codes(folder: str | Path, plan: CodesPlan) -> dict:
    """Write ``meta.json`` from the shards on disk, all of which must be there; returns it."""
    shards = []
    for shard in range(plan.num_shards):
        path = shard_path(folder, shard)
        with zipfile.ZipFile(path) as archive:
            images = _npy_in_zip(path, archive.getinfo("labels.npy")).shape[0]
        shards.append({"file": f"shards/{path.name}", "images": images, "sha256": sha256_file(path)})
    meta = {**asdict(plan), "num_coded_images": sum(s["images"] for s in shards), "shards": shards}
    write_json(Path(folder) / "meta.json", meta)
    return meta


def _npy_in_zip(path: Path, member: zipfile.ZipInfo) -> np.memmap:
    """Memory-map an uncompressed ``.npy`` member of a zip file, read-only."""
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{path}: {member.filename} is compressed; a shard is stored uncompressed")
    with open(path, "rb") as f:
        f.seek(member.header_offset + 26)  # lengths of name and extra field end the zip's local header
        f.seek(member.header_offset + 30 + sum(struct.unpack("<HH", f.read(4))))
        version = np.lib.format.read_magic(f)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, fortran_order, dtype = read_header[version](f)
        if dtype.hasobject or fortran_order:
            raise ValueError(f"{path}: {member.filename} is not a plain array")
        return np.memmap(path, dtype, "r", f.tell(), shape)


class Codes(Protocol):
    """Cached codes of a data set, random access."""

    labels: np.ndarray  # (N,) int64
    num_crops: int
    num_tokens: int
    num_classes: int
    meta: dict  # as in meta.json; empty for the published layout

    def __len__(self) -> int: ...

    def gather(self, images: np.ndarray, crops: np.ndarray) -> np.ndarray:
        """Codes (B, tokens) int64, raster order, of B (image, crop) pairs."""
        ...


class ShardedCodes:
    """The reader of our shards; see ``Codes``. Threads may share it."""

    def __init__(self, folder: str | Path):
        self.meta = json.loads((Path(folder) / "meta.json").read_text())
        self.num_crops, self.num_tokens = len(self.meta["crops"]), self.meta["grid"][0] * self.meta["grid"][1]
        self.num_classes = len(self.meta["classes"])
        self._shards, labels = [], []
        for shard in self.meta["shards"]:
            path = Path(folder) / "shards" / Path(shard["file"]).name
            codes, shard_labels = self._open(path)
            if codes.shape != (shard["images"], self.num_crops, self.num_tokens):
                raise ValueError(f"{path} holds codes of shape {codes.shape}, unlike {folder}/meta.json; extract again")
            self._shards.append(codes)
            labels.append(shard_labels)
        self.labels = np.concatenate(labels)
        self._ends = np.cumsum([len(s) for s in self._shards])

    @staticmethod
    def _open(path: Path) -> tuple[np.memmap, np.ndarray]:
        try:
            with zipfile.ZipFile(path) as archive:
                codes, labels = (_npy_in_zip(path, archive.getinfo(f"{k}.npy")) for k in ("codes", "labels"))
        except (OSError, zipfile.BadZipFile, KeyError, struct.error) as error:
            raise ValueError(f"{path} is missing or damaged ({error}); delete it and extract again") from error
        return codes, np.array(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, images: np.ndarray, crops: np.ndarray) -> np.ndarray:
        """Codes (B, tokens) int64, raster order, of B (image, crop) pairs."""
        out = np.empty((len(images), self.num_tokens), np.int64)
        shard_of = np.searchsorted(self._ends, images, side="right")
        for shard in np.unique(shard_of):
            here = np.flatnonzero(shard_of == shard)
            codes = self._shards[shard]
            out[here] = codes[images[here] - (self._ends[shard] - len(codes)), crops[here]]
        return out


class PublishedCodes:
    """The reader of the published layout, two files an image: ``*_codes/0.npy`` [1, crops, tokens] and
    ``*_labels/0.npy`` [1]; see ``Codes``."""

    def __init__(self, folder: str | Path):
        self._codes, labels = (self._only_folder(Path(folder), end) for end in ("_codes", "_labels"))
        count = sum(1 for _ in self._codes.glob("*.npy"))
        if count == 0:
            raise ValueError(f"--code-path: {self._codes} holds no .npy files")
        self.labels = np.array([self._read(labels / f"{i}.npy").item() for i in range(count)], np.int64)
        _, self.num_crops, self.num_tokens = self._read(self._codes / "0.npy").shape
        self.num_classes = int(self.labels.max()) + 1
        self.meta: dict = {}

    @staticmethod
    def _only_folder(folder: Path, end: str) -> Path:
        found = sorted(p for p in folder.glob(f"*{end}") if p.is_dir())
        if len(found) != 1:
            raise ValueError(
                f"--code-path: {folder} holds no codes: expected meta.json with shards/ (written by "
                f"extract_codes_c2i.sh when it is done) or one folder *_codes beside one *_labels"
            )
        return found[0]

    @staticmethod
    def _read(path: Path) -> np.ndarray:
        try:
            return np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} is missing or damaged: {error}") from error

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, images: np.ndarray, crops: np.ndarray) -> np.ndarray:
        """Codes (B, tokens) int64, raster order, of B (image, crop) pairs."""
        pairs = zip(images, crops, strict=True)
        return np.stack([self._read(self._codes / f"{i}.npy")[0, c] for i, c in pairs]).astype(np.int64)


def open_codes(folder: str | Path) -> Codes:
    """Open a folder of codes, ours or the published layout; ``ValueError`` if it is neither."""
    require_folder(folder, "--code-path", "make it with scripts/autoregressive/extract_codes_c2i.sh")
    if (Path(folder) / "meta.json").is_file():
        return ShardedCodes(folder)
    if (Path(folder) / "plan.json").is_file():
        raise ValueError(f"--code-path: {folder} is not complete; run extract_codes_c2i.sh again to finish it")
    return PublishedCodes(folder)
