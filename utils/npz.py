"""``.npz`` files: arrays read safely or mapped in place.

No file is trusted: nothing is unpickled, and the size in an array's header is compared with the
bytes in the archive before memory is allocated.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch

_HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# what zipfile raises for damaged, encrypted or foreign files
ZIP_ERRORS: tuple[type[Exception], ...] = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
)
ZIP_ERRORS += (MemoryError, EOFError, NotImplementedError, RuntimeError, OSError)
ZIP_ERRORS += (UnicodeDecodeError,)


@contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """Turn whatever ``zipfile`` raises into a ``ValueError`` of one line."""
    try:
        yield
    except ZIP_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"{path} is not a whole .npz file: {reason}") from error


@contextmanager
def open_npz(path: str | Path) -> Iterator[zipfile.ZipFile]:
    """Open an archive for ``open_member`` and ``map_member``; ``ValueError`` unless whole."""
    with _readable(path):
        archive = zipfile.ZipFile(path)
    with archive:
        yield archive


@dataclass(frozen=True)
class Member:
    """One array of an archive, with its header read and checked, its values not read yet."""

    path: str  # of the archive
    name: str
    stream: IO[bytes]
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        """Size of all values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return the next values as an array of ``shape``."""
        with _readable(self.path):
            data = bytearray(self.stream.read(math.prod(shape) * self.dtype.itemsize))
            values = np.frombuffer(data, self.dtype)
            if values.size != math.prod(shape):
                raise EOFError(f"{self.name} ends too early")
        return values.reshape(shape, order="F" if self.fortran_order else "C")


def _read_header(stream: IO[bytes], what: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, order and type of a ``.npy`` stream; ``ValueError`` if it is none, or holds
    Python objects.
    """
    try:
        version = np.lib.format.read_magic(stream)
        if version not in _HEADER_READERS:
            raise ValueError(f"written in version {version} of the format")
        shape, fortran_order, dtype = _HEADER_READERS[version](stream)
    except (ValueError, KeyError, IndexError, SyntaxError, tokenize.TokenError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{what} is not a readable array: {reason}") from error
    if any(type(side) is not int or side < 0 for side in shape):
        raise ValueError(f"{what} is not a readable array: its shape is {shape}")
    if dtype.hasobject:
        raise ValueError(f"{what} holds Python objects, which are never loaded; expected numbers")
    return shape, fortran_order, dtype


def parse_npy(data: bytes, what: str) -> np.ndarray:
    """Return the array of a whole ``.npy`` file in C order, read-only; ``ValueError`` naming
    ``what`` if its header and length disagree.
    """
    stream = io.BytesIO(data)
    shape, fortran_order, dtype = _read_header(stream, what)
    present = len(data) - stream.tell()
    if fortran_order or math.prod(shape) * dtype.itemsize != present:
        raise ValueError(f"{what} is damaged: {present} bytes for {dtype} of shape {shape}")
    return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape)


def member_names(archive: zipfile.ZipFile) -> list[str]:
    """Return the names of all arrays; ``ValueError`` if those of the directory at the end are not
    those that the arrays have, as of an array that would be missed silently.
    """
    names = archive.namelist()
    with _readable(str(archive.filename)):
        for name in names:
            archive.open(name).close()
    return [name.removesuffix(".npy") for name in names if name.endswith(".npy")]


def open_member(archive: zipfile.ZipFile, name: str) -> Member:
    """Read the header of array ``name``; check its size against the bytes in the archive.

    Raises ``ValueError`` if the array is missing, holds Python objects or is damaged.
    """
    path = str(archive.filename)
    if f"{name}.npy" not in archive.namelist():
        raise ValueError(f"{path} holds no array {name}")
    with _readable(path):
        stream = archive.open(f"{name}.npy")
        shape, fortran_order, dtype = _read_header(stream, f"{path}: {name}")
        present = archive.getinfo(f"{name}.npy").file_size - stream.tell()

    member = Member(path, name, stream, shape, fortran_order, dtype)
    if member.num_bytes != present:
        raise ValueError(
            f"{path}: {name} should have {member.num_bytes} bytes of values and has "
            f"{present}: damaged file"
        )
    return member


def map_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Map array ``name`` of an uncompressed archive into memory, without keeping the file open."""
    member, info = open_member(archive, name), archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED or member.fortran_order:
        raise ValueError(
            f"{member.path}: {name} is compressed or in Fortran order and cannot be mapped"
        )

    with _readable(member.path), open(member.path, "rb") as f:
        # the lengths of name and extra field end the zip's local header
        f.seek(info.header_offset + 26)
        start = (
            info.header_offset + 30 + sum(struct.unpack("<HH", f.read(4))) + member.stream.tell()
        )
        # numpy.memmap keeps one file descriptor per map; a set of codes has more shards than a
        # process may open files
        size = os.path.getsize(member.path)
        whole = torch.from_file(member.path, shared=False, size=size, dtype=torch.uint8).numpy()
    return np.frombuffer(whole, member.dtype, math.prod(member.shape), start).reshape(member.shape)


def combine_crc32(first: int, second: int, length: int) -> int:
    """Return the CRC-32 of two texts in a row, from the CRC-32 of each and the second's length.

    A byte more multiplies a text's CRC by x^8, modulo the polynomial over GF(2); the highest bit
    stands for 1, the next one for x.
    """
    factor, square, exponent = 1 << 31, 1 << 30, 8 * length
    while exponent:
        if exponent & 1:
            factor = _multiply(square, factor)
        square, exponent = _multiply(square, square), exponent >> 1
    return _multiply(factor, first) ^ second


def _multiply(a: int, b: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)
    return product


def short_hash(facts: object) -> str:
    """Return eight hex digits of the SHA-256 of ``facts`` as JSON: a fingerprint of a set."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]
