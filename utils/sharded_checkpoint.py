"""Training checkpoints: folders of tensor shards (torch.distributed.checkpoint), written in the background.

Every rank writes what it holds; any number of ranks, sharded or not, reads it back. A folder holds ``*.distcp``,
``.metadata`` (torch's) and ``meta.json`` (ours: step, config, run, sizes of the files).
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

CHECKPOINT_NAME = re.compile(r"\d{7,}")

# one process needs no process group to read and write
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


class _MetadataUnpickler(pickle.Unpickler):
    """torch keeps the table of contents as a pickle: let it name shapes, types and places, and nothing that runs."""

    def find_class(self, module: str, name: str) -> Any:
        plain = module.startswith("torch.distributed.checkpoint.") and name in {
            *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
            *("MetadataIndex", "StorageMeta", "_StorageInfo", "_MEM_FORMAT_ENCODING"),
        }
        value = getattr(torch, name, None) if module == "torch" else None
        if plain or isinstance(value, torch.dtype) or value is torch.Size:
            return super().find_class(module, name)
        if (
            module.startswith("pathlib")
            and name.endswith("Path")
            or (module, name) == ("torch.serialization", "_get_layout")
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no table of contents needs")


def read_contents(folder: str | Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Names, shapes and types of the tensors of a checkpoint folder; ``ValueError`` if it is none or damaged."""
    path = Path(folder) / ".metadata"
    try:
        with open(path, "rb") as f:
            metadata = _MetadataUnpickler(f).load()
        files = {info.relative_path for info in metadata.storage_data.values()}
        tensors = {k: (v.size, v.properties.dtype) for k, v in metadata.state_dict_metadata.items()}
    except Exception as error:  # a damaged or hostile file may break the reader in any way
        raise ValueError(f"{folder} is no readable checkpoint folder: {error}") from error
    if any(Path(name).name != name for name in files):
        raise ValueError(f"{folder} is no checkpoint folder of ours: its .metadata points out of it")
    return tensors


def save_sharded(folder: Path, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup | None) -> Future:
    """Copy ``tensors`` and write them to ``folder`` in the background; the future ends when every rank has written.

    All ranks call it with the same names; tensors that all of them hold are dealt out, each to be copied and written
    by one. ``group``: for the talk of the background threads, away from that of training; None without one.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if group is not None else (0, 1)
    mine = {k: v for i, (k, v) in enumerate(tensors.items()) if isinstance(v, DTensor) or i % size == rank}
    # torch's staging copies sharded tensors off a device, but shares what is on the CPU with the training that goes on
    staged = {k: _copy(v.detach()) for k, v in mine.items()}
    if group is not None:
        return dcp.async_save(staged, checkpoint_id=str(folder), process_group=group)
    writer = ThreadPoolExecutor(1)
    future = writer.submit(dcp.save, staged, checkpoint_id=str(folder), no_dist=True)
    writer.shutdown(wait=False)
    return future


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type == "cpu":
        return tensor.clone()
    return tensor if isinstance(tensor, DTensor) else tensor.cpu()


def load_sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill ``tensors`` in place from ``folder``, each rank its own parts and without talking to the others.

    ``ValueError`` if one is missing, does not fit or cannot be read.
    """
    stored = read_contents(folder)
    for name, tensor in tensors.items():
        if name not in stored:
            raise ValueError(f"{folder} lacks {name}")
        if stored[name][0] != tensor.shape:
            raise ValueError(f"{folder}: {name} is {tuple(stored[name][0])}, expected {tuple(tensor.shape)}")
    try:
        dcp.load(tensors, checkpoint_id=str(folder), no_dist=True)
    except Exception as error:  # a damaged file may break the reader in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise ValueError(f"{folder} cannot be read: {reason}; delete it to resume from the one before it") from error


def read_sharded(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    """All tensors of ``folder`` whose name starts with ``prefix``, whole and on the CPU, without the prefix."""
    stored = {k: v for k, v in read_contents(folder).items() if k.startswith(prefix)}
    tensors = {k: torch.empty(shape, dtype=dtype) for k, (shape, dtype) in stored.items()}
    load_sharded(folder, tensors)
    return {k.removeprefix(prefix): v for k, v in tensors.items()}


def read_meta(folder: Path) -> dict[str, Any]:
    """``meta.json`` of a checkpoint folder; ``ValueError`` if the folder is not whole, saying what is missing."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        sizes = {str(name): int(size) for name, size in meta["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder} is no whole checkpoint: meta.json is missing or damaged ({error})") from error
    for name, size in sizes.items():
        path = folder / Path(name).name
        found = path.stat().st_size if path.is_file() else 0
        if found != size:
            raise ValueError(f"{folder} is damaged: {name} has {found} bytes, expected {size}")
    return meta
