"""Checkpoint folders of earlier versions: shards of torch.distributed.checkpoint (``*.distcp``)
and a table of contents, ``.metadata``, which is a pickle. Read only, and never unpickled by torch.
"""

from __future__ import annotations

import math
import pickle
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem

from utils.checkpoints.shard import check_shapes

# one process needs no process group to read
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


# classes that torch writes into ``.metadata``; all else in it is numbers, names and containers
_RECORDS = {
    *(
        "Metadata",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "BytesStorageMetadata",
    ),
    *("MetadataIndex", "StorageMeta", "_StorageInfo", "_MEM_FORMAT_ENCODING"),
}
_PATHS = {"Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"}


class _Record:
    """Stand-in for any object in ``.metadata``: keeps what was pickled, does nothing with it."""

    state: Any = None

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _InertUnpickler(pickle.Unpickler):
    """Reads ``.metadata`` into fresh stand-ins of torch's classes; any other class is refused."""

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self._stand_ins: dict[str, type] = {}

    def find_class(self, module: str, name: str) -> Any:
        value = vars(torch).get(name) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        if value is torch.Size:
            return tuple
        known = module.startswith("torch.distributed.checkpoint.") and name in _RECORDS
        known |= module in ("pathlib", "pathlib._local") and name in _PATHS
        if known or (module, name) == ("torch.serialization", "_get_layout"):
            return self._stand_ins.setdefault(name, type(name, (_Record,), {}))
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no table of contents needs")


def _fields(record: Any, kind: str, what: str) -> dict[str, Any]:
    if type(record).__name__ != kind or type(record.state) is not dict:
        raise ValueError(f"{what} is a {type(record).__name__}, not a {kind}")
    return record.state


def _size(value: Any, ndim: int | None = None) -> torch.Size:
    if type(value) is not tuple or not all(type(n) is int and n >= 0 for n in value):
        raise ValueError(f"{value!r} is not a tuple of sizes")
    if ndim is not None and len(value) != ndim:
        raise ValueError(f"{value} has {len(value)} dimensions, expected {ndim}")
    return torch.Size(value)


def _check_tensor(name: Any, record: Any) -> TensorStorageMetadata:
    """One tensor's entry in plain values; its chunks lie inside it and are as large together."""
    if type(name) is not str:
        raise ValueError(f"{name!r} is not a tensor's name")
    entry = _fields(record, "TensorStorageMetadata", name)
    dtype, *_ = entry["properties"].state
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} has no type")
    size, chunks = _size(entry["size"]), []
    for chunk in entry["chunks"]:
        fields = _fields(chunk, "ChunkStorageMetadata", f"a chunk of {name}")
        offsets, sizes = _size(fields["offsets"], len(size)), _size(fields["sizes"], len(size))
        if any(o + s > whole for o, s, whole in zip(offsets, sizes, size, strict=True)):
            raise ValueError(f"a chunk of {name} reaches out of it")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        raise ValueError(f"the chunks of {name} are not the whole of it")
    return TensorStorageMetadata(TensorProperties(dtype), size, chunks)


def _check_place(record: Any, name: str, sizes: dict[str, int]) -> _StorageInfo:
    """Where a chunk of these ``sizes`` lies, in plain values: inside one of the folder's files."""
    place = _fields(record, "_StorageInfo", f"the place of {name}")
    path, offset, length = (place[k] for k in ("relative_path", "offset", "length"))
    if type(path) is not str or path not in sizes:
        raise ValueError(f"{name} lies in {path!r}, which is not a file of the folder")
    if not (type(offset) is type(length) is int and 0 <= offset <= offset + length <= sizes[path]):
        raise ValueError(f"{name} lies at {offset!r}, {length!r} bytes, outside of {path}")
    return _StorageInfo(path, offset, length)


def _read_metadata(folder: Path) -> Metadata:
    """Return the checked contents in plain values; ``ValueError`` if there are none.

    Every entry is a tensor: torch would load any other entry's bytes with a full unpickler, which
    can run code.
    """
    try:
        files = [p for p in folder.iterdir() if p.is_file() and not p.is_symlink()]
        sizes = {p.name: p.stat().st_size for p in files}
        with open(folder / ".metadata", "rb") as f:
            contents = _fields(_InertUnpickler(f).load(), "Metadata", "the table of contents")
        tensors = {k: _check_tensor(k, v) for k, v in contents["state_dict_metadata"].items()}
        places = {}
        for record, place in contents["storage_data"].items():
            index = _fields(record, "MetadataIndex", "a key")
            name, offset = index["fqn"], _size(index["offset"])
            places[MetadataIndex(name, offset)] = _check_place(place, name, sizes)
        for name, tensor in tensors.items():
            for chunk in tensor.chunks:
                size = math.prod(chunk.sizes) * tensor.properties.dtype.itemsize
                if places[MetadataIndex(name, chunk.offsets)].length < size:
                    raise ValueError(f"{name} takes fewer than its {size} bytes")
    except Exception as error:  # a damaged or hostile file may break the reader in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{folder} is not a readable checkpoint folder: {reason}") from error
    return Metadata(tensors, storage_data=places)


def read_contents(folder: str | Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Names, shapes and types of a checkpoint folder's tensors; ``ValueError`` if damaged."""
    tensors = _read_metadata(Path(folder)).state_dict_metadata
    return {k: (v.size, v.properties.dtype) for k, v in tensors.items()}


class _Reader(dcp.FileSystemReader):
    """Reads by a table of contents that was checked, instead of unpickling the file's own."""

    def __init__(self, folder: Path, metadata: Metadata):
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _Planner(dcp.DefaultLoadPlanner):
    """Loads tensors, which torch reads ``weights_only``, and nothing else."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        raise ValueError(f"{read_item.storage_index.fqn} is not a tensor")


def load_sharded(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill ``tensors`` in place from ``folder``, each rank its parts, without communication.

    ``ValueError`` if one is missing, does not fit or cannot be read.
    """
    _load(folder, _read_metadata(folder), tensors)


def _load(folder: Path, metadata: Metadata, tensors: dict[str, Tensor]) -> None:
    stored = metadata.state_dict_metadata
    check_shapes(folder, {name: entry.size for name, entry in stored.items()}, tensors)
    try:
        dcp.load(
            tensors, storage_reader=_Reader(folder, metadata), planner=_Planner(), no_dist=True
        )
    except (Exception, dcp.CheckpointException) as error:  # a damaged file may break it in any way
        # torch wraps what went wrong; where it refuses to unpickle, it advises to run
        # the file's code
        cause = (
            next(iter(error.failures.values()))[0]
            if isinstance(error, dcp.CheckpointException)
            else error
        )
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[-1]
        if isinstance(cause, pickle.UnpicklingError):
            reason = "bytes in place of a tensor are not a tensor"
        raise ValueError(
            f"{folder} cannot be read: {reason}; delete it to resume from the one before it"
        ) from error


def read_sharded(folder: Path, prefix: str) -> dict[str, Tensor]:
    """Tensors of ``folder`` named ``prefix...``, whole, on the CPU, without the prefix."""
    metadata = _read_metadata(folder)
    stored = {k: v for k, v in metadata.state_dict_metadata.items() if k.startswith(prefix)}
    tensors = {k: torch.zeros(v.size, dtype=v.properties.dtype) for k, v in stored.items()}
    _load(folder, metadata, tensors)
    return {k.removeprefix(prefix): v for k, v in tensors.items()}
