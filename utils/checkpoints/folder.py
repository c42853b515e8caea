"""Training checkpoints: folders of safetensors files, written in the background.

Every rank writes what it holds; any number of ranks, sharded or not, reads it back. A folder
holds one ``.safetensors`` file per rank and ``meta.json``: step, config, run, sizes and SHA-256 of
the files. Nothing in it can run code. Folders of earlier versions (``.distcp``) are read by
``old_folder.py``.
"""

from __future__ import annotations

import re
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils.checkpoints.shard import SUFFIX, Rows, check_shapes, read_shard, write_shard
from utils.files import sha256_file
from utils.records import read_sealed, write_sealed

if TYPE_CHECKING:  # half a second, which only saving and loading are to take
    from torch.distributed.tensor import DTensor

CHECKPOINT_NAME = re.compile(r"\d{7,}")


@dataclass(frozen=True)
class _Stored:
    """A tensor of a folder: ``parts`` are its rows in order, without gaps or overlaps, each behind
    the number of its file.
    """

    shape: torch.Size
    dtype: torch.dtype
    parts: list[tuple[int, Rows]]


def is_old(folder: Path) -> bool:
    """Return whether ``folder`` has the format of earlier versions."""
    return (folder / ".metadata").exists() or any(folder.glob("*.distcp"))


def save_sharded(
    folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None
) -> Future[dict[str, Any]]:
    """Copy ``tensors``, write them in the background; the future ends when all ranks have written
    and gives what ``meta.json`` must hold of their files.

    All ranks call it with the same names; tensors that several of them hold are dealt out, each to
    be copied and written by one. ``group``: for the talk of the background threads, away from that
    of training; None without one.
    """
    from torch.distributed.tensor import DTensor

    rank, size = (dist.get_rank(), dist.get_world_size()) if group is not None else (0, 1)
    parts = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        if isinstance(tensor, DTensor):
            replica, replicas = _replica(tensor)
            if i % replicas == replica:
                start = _first_row(tensor)
                parts[name] = Rows(_copy(tensor.to_local()), start, tensor.shape[0])
        elif i % size == rank:
            parts[name] = Rows.whole(_copy(tensor))

    path = folder / f"{rank:05d}-of-{size:05d}{SUFFIX}"
    writer = ThreadPoolExecutor(1)
    future = writer.submit(_write, path, parts, group)
    writer.shutdown(wait=False)
    return future


def _copy(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU: training goes on changing the tensor."""
    tensor = tensor.detach()
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)


def _replica(tensor: DTensor) -> tuple[int, int]:
    """Return which of how many equal copies of its part this rank holds."""
    from torch.distributed.tensor import Replicate

    replica, replicas = 0, 1
    for dim, placement in enumerate(tensor.placements):
        if isinstance(placement, Replicate):
            n = tensor.device_mesh.size(dim)
            replica = replica * n + tensor.device_mesh.get_local_rank(dim)
            replicas *= n
    return replica, replicas


def _first_row(tensor: DTensor) -> int:
    """Return the row that this rank's part begins with; parts are cut as by ``torch.chunk``."""
    from torch.distributed.tensor import Replicate, Shard

    start, count = 0, tensor.shape[0]
    for dim, placement in enumerate(tensor.placements):
        if not isinstance(placement, Replicate):
            assert isinstance(placement, Shard) and placement.dim == 0, placement
            rows = -(-count // tensor.device_mesh.size(dim))
            first = min(rows * tensor.device_mesh.get_local_rank(dim), count)
            start, count = start + first, min(rows, count - first)
    assert count == len(tensor.to_local())
    return start


def _write(path: Path, parts: dict[str, Rows], group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Write this rank's file; return names, sizes and hashes of the files of all ranks.

    Raises ``OSError`` on all ranks if one cannot write.
    """
    error = sha256 = None
    size = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sha256 = write_shard(path, parts)
        size = path.stat().st_size
    except Exception as failure:
        error = str(failure).strip() or type(failure).__name__
    written = [(path.name, size, sha256, error)]
    if group is not None:
        written *= dist.get_world_size(group)
        dist.all_gather_object(written, (path.name, size, sha256, error), group)
    if errors := [e for *_, e in written if e]:
        raise OSError(errors[0])
    return {
        "files": {name: size for name, size, *_ in written},
        "sha256": {name: sha256 for name, _, sha256, _ in written},
    }


def write_meta(folder: Path, facts: dict[str, Any]) -> None:
    """Write ``meta.json``, which makes a checkpoint whole: ``facts`` and their own SHA-256."""
    write_sealed(folder / "meta.json", facts)


def read_meta(folder: Path) -> dict[str, Any]:
    """Return ``meta.json`` of a checkpoint folder; ``ValueError`` if a file is missing there."""
    try:
        meta = read_sealed(folder / "meta.json")
        sizes, hashes = meta.get("files"), meta.get("sha256", {})
        if not isinstance(sizes, dict) or not all(type(n) is int for n in sizes.values()):
            raise ValueError("meta.json is damaged: files is not a size per file")
        named = isinstance(hashes, dict) and hashes.keys() <= sizes.keys()
        if not named or not all(type(v) is str for v in hashes.values()):
            raise ValueError("meta.json is damaged: sha256 is not a hash per file")
    except ValueError as error:
        reason = str(error).removeprefix(f"{folder}/")
        raise ValueError(f"{folder} is not a whole checkpoint: {reason}") from error
    for name, size in sizes.items():
        path = folder / name
        if Path(name).name != name or not name.strip(".") or path.is_symlink():
            raise ValueError(f"{folder} is damaged: {name!r} is not a file of the folder")
        found = path.stat().st_size if path.is_file() else 0
        if found != size:
            raise ValueError(f"{folder} is damaged: {name} has {found} bytes, expected {size}")
    return meta


def check_bytes(folder: Path, rank: int = 0, ranks: int = 1) -> None:
    """Raise ``ValueError`` if a file's bytes are not those that were written.

    Reads every file (about a second per GB), or of several ``ranks`` each its share: those whose
    tensors it reads in ``load_sharded``. Folders of earlier versions have no hashes.
    """
    meta = read_meta(folder)
    hashes = meta.get("sha256", {})
    for name in sorted(meta["files"])[rank::ranks]:
        if name in hashes and sha256_file(folder / name) != hashes[name]:
            raise ValueError(f"{folder} is damaged: the bytes of {name} have changed")


def _read_table(folder: Path) -> dict[str, _Stored]:
    """Return the tensors of all files, mapped; ``ValueError`` unless each of them is whole."""
    found: dict[str, list[tuple[int, Rows]]] = {}
    tensors = {}
    try:
        for number, name in enumerate(sorted(read_meta(folder)["files"])):
            for key, rows in read_shard(folder / name).items():
                found.setdefault(key, []).append((number, rows))
        for key, parts in found.items():
            parts.sort(key=lambda part: (part[1].start, part[1].stop))
            values, total = parts[0][1].values, parts[0][1].total
            position = 0
            for _, part in parts:
                same = part.values.dtype == values.dtype and part.total == total
                if not same or part.values.shape[1:] != values.shape[1:]:
                    raise ValueError(f"the parts of {key} are of different tensors")
                if part.values.ndim != values.ndim or part.start != position:
                    raise ValueError(f"the parts of {key} leave gaps or overlap")
                position = part.stop
            if position != total:
                raise ValueError(f"the parts of {key} leave gaps or overlap")
            shape = torch.Size((total, *values.shape[1:]) if values.ndim else ())
            tensors[key] = _Stored(shape, values.dtype, parts)
    except (ValueError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder} is not a readable checkpoint folder: {reason}") from error
    return tensors


def read_contents(folder: str | Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Names, shapes and types of a checkpoint folder's tensors; ``ValueError`` if damaged."""
    if is_old(Path(folder)):
        # needs private parts of torch, which no other folder shall depend on
        from utils.checkpoints import old_folder

        return old_folder.read_contents(folder)
    return {k: (v.shape, v.dtype) for k, v in _read_table(Path(folder)).items()}


def load_sharded(folder: Path, tensors: dict[str, Tensor], rank: int = 0, ranks: int = 1) -> None:
    """Fill ``tensors`` in place from ``folder``; ``ValueError`` if one is missing or does not fit.

    All of several ``ranks`` call it with the same names. Of a sharded tensor each reads its part;
    any other is read once, by the ranks that check its files, and broadcast. A folder of an earlier
    version is read by every rank.
    """
    if is_old(folder):
        from utils.checkpoints import old_folder

        old_folder.load_sharded(folder, tensors)
        return
    _load(folder, _read_table(folder), tensors, rank, ranks)


def _load(
    folder: Path,
    table: dict[str, _Stored],
    tensors: dict[str, Tensor],
    rank: int = 0,
    ranks: int = 1,
) -> None:
    from torch.distributed.tensor import DTensor

    check_shapes(folder, {name: stored.shape for name, stored in table.items()}, tensors)
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            _fill_part(tensor.to_local(), _first_row(tensor), table[name])
        else:
            _fill_whole(tensor, table[name], rank, ranks)


@torch.no_grad()
def _fill_part(target: Tensor, start: int, stored: _Stored) -> None:
    """Copy to ``target``, the rows of a tensor from ``start`` on, what the parts hold of them."""
    for _, part in stored.parts:
        first, stop = max(start, part.start), min(start + len(target), part.stop)
        if first < stop:
            values = part.values[first - part.start : stop - part.start]
            target[first - start : stop - start].copy_(values)


@torch.no_grad()
def _fill_whole(target: Tensor, stored: _Stored, rank: int, ranks: int) -> None:
    """Copy all parts to ``target`` on all ranks; each is read by one of them, which sends it."""
    for number, part in stored.parts:
        reader = number % ranks
        if rank == reader:
            values = part.values.to(target)
        else:
            values = torch.empty(part.values.shape, dtype=target.dtype, device=target.device)
        if ranks > 1:
            dist.broadcast(values, reader)
        rows = target[part.start : part.stop] if target.ndim else target
        rows.copy_(values)


def read_sharded(folder: Path, prefix: str, check: bool = True) -> dict[str, Tensor]:
    """Tensors of ``folder`` named ``prefix...``, whole, on the CPU, without the prefix.

    check: whether to check the bytes of all files first, see ``check_bytes``.
    """
    if check:
        check_bytes(folder)
    if is_old(folder):
        from utils.checkpoints import old_folder

        return old_folder.read_sharded(folder, prefix)
    stored = {k: v for k, v in _read_table(folder).items() if k.startswith(prefix)}
    # its parts are as large in the files: a false size cannot ask for more memory than those have
    tensors = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in stored.items()}
    _load(folder, stored, tensors)
    return {k.removeprefix(prefix): v for k, v in tensors.items()}
