"""One file of a training checkpoint: tensors, or ranges of their rows, in the safetensors format.

The format is a length, a JSON header and the bytes of the tensors; the package safetensors reads
these files too. They are written and read here so that the SHA-256 is made while writing, no copy
of the tensors is made, and the header is parsed once, where it is checked. A file is untrusted:
nothing is allocated by its header's word, and every byte belongs to exactly one tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SUFFIX = ".safetensors"
MAX_HEADER = 100_000_000  # bytes, the limit of the format
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Rows:
    """A contiguous range of a tensor's rows; of a scalar, the whole."""

    values: Tensor
    start: int  # row of the whole tensor that ``values`` begins with
    total: int  # rows of the whole tensor

    @classmethod
    def whole(cls, values: Tensor) -> Rows:
        """Return all rows of a tensor."""
        return cls(values, 0, len(values) if values.ndim else 1)

    @property
    def stop(self) -> int:
        """Return the row behind the last one."""
        return self.start + (len(self.values) if self.values.ndim else 1)


def write_shard(path: Path, parts: dict[str, Rows]) -> str:
    """Write contiguous CPU tensors to ``path`` and flush it to disk; return its SHA-256."""
    # widest elements first, so that each tensor begins at a multiple of its element's size
    names = sorted(parts, key=lambda k: (-parts[k].values.itemsize, k))
    rows = {k: (parts[k].start, parts[k].total) for k in names}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "rows": json.dumps(rows)}}
    end = 0
    for name in names:
        values = parts[name].values
        begin, end = end, end + values.nbytes
        header[name] = {
            "dtype": _NAMES[values.dtype],
            "shape": list(values.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    digest = hashlib.sha256()
    with open(path, "wb") as f:
        start = struct.pack("<Q", len(text)) + text
        f.write(start)
        digest.update(start)
        for name in names:
            block = parts[name].values.flatten().view(torch.uint8).numpy()
            f.write(block)
            digest.update(block)
        f.flush()
        os.fsync(f.fileno())
    return digest.hexdigest()


def read_shard(path: Path) -> dict[str, Rows]:
    """Map a file into memory and return its tensors, read when they are used; ``ValueError`` if
    the header is damaged or does not fit the file.
    """
    size = path.stat().st_size
    if size < 8:
        raise ValueError(f"{path.name} has {size} bytes")
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)  # (size,)
    (length,) = struct.unpack("<Q", data[:8].numpy().tobytes())
    if length > min(size - 8, MAX_HEADER):
        raise ValueError(f"{path.name} has {size} bytes, its header claims to have {length}")
    try:
        header = json.loads(data[8 : 8 + length].numpy().tobytes(), object_pairs_hook=_unique)
        rows = json.loads(header.pop("__metadata__")["rows"], object_pairs_hook=_unique)
        return _parse(data[8 + length :], header, rows)
    except Exception as error:  # a hostile header may break the reader in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path.name} has a damaged header: {reason[:200]}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the fields of a JSON object; a name that stands twice means two things."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name stands twice")
    return fields


def _parse(data: Tensor, header: dict[str, Any], rows: dict[str, Any]) -> dict[str, Rows]:
    """Return the tensors in ``data``, which they fill without gaps or overlaps."""
    if header.keys() != rows.keys():
        raise ValueError("tensors and ranges of rows have other names")
    parts, position = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = _sizes(entry["data_offsets"], name)
        shape, (start, total) = _sizes(entry["shape"], name), _sizes(rows[name], name)
        dtype = _DTYPES[entry["dtype"]]
        if begin != position or end != begin + math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} does not lie where it should")
        if start + (shape[0] if shape else 1) > total or (not shape and total != 1):
            raise ValueError(f"the rows of {name} reach out of it")
        parts[name] = Rows(data[begin:end].view(dtype).view(shape), start, total)
        position = end
    if position != len(data):
        raise ValueError(f"its tensors have {position} bytes, the file {len(data)}")
    return parts


def _sizes(values: Any, name: str) -> list[int]:
    if type(values) is not list or not all(type(n) is int and n >= 0 for n in values):
        raise ValueError(f"{name} has sizes that are not whole numbers")
    return values


def check_shapes(
    folder: Path, stored: Mapping[str, Sequence[int]], tensors: Mapping[str, Tensor]
) -> None:
    """Raise ``ValueError`` unless ``folder`` has each of ``tensors``, of its shape."""
    for name, tensor in tensors.items():
        if name not in stored:
            raise ValueError(f"{folder} lacks {name}")
        if tuple(stored[name]) != tuple(tensor.shape):
            raise ValueError(
                f"{folder}: {name} is {tuple(stored[name])}, expected {tuple(tensor.shape)}"
            )
