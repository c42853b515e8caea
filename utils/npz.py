"""``.npz`` files: arrays read safely or mapped in place, and a set of images written by many
processes.

Reading trusts no file: nothing is unpickled, and the size in an array's header is compared with the
bytes in the archive before memory is allocated.

Writing produces ``arr_0`` uint8 (N, H, W, 3) and ``labels`` int64 (N,). Every process writes its
chunks directly to their position in the final file, so nothing is packed or copied. A second file
has one byte per chunk, written after the chunk: if a process is killed in between, only that chunk
is made again. Files are written with plain writes rather than a memory map, which on a network disk
writes whole pages and could overwrite a neighbour's images.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import math
import os
import shutil
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
from tqdm import tqdm

from utils.files import atomic_path

BLOCK = 1 << 24  # bytes read at a time for the checksum
_LARGE = 0xFFFFFFFF  # in a field of a zip: the value is in the zip64 extra field
_DATE = 0x21  # 1980-01-01, so that equal images give equal files

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


@contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """Turn whatever ``zipfile`` raises into a ``ValueError`` of one line."""
    try:
        yield
    except ZIP_ERRORS as error:
        raise ValueError(
            f"{path} is not a whole .npz file: {str(error) or type(error).__name__}"
        ) from error


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


def short_hash(facts: object) -> str:
    """Return eight hex digits of the SHA-256 of ``facts`` as JSON: a fingerprint of a set."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]


class SampleFile:
    """An unfinished image set; ``fingerprint`` tells apart sets of other options or weights."""

    def __init__(self, npz: Path, fingerprint: str, shape: tuple[int, int, int, int], chunk: int):
        self.npz, self.fingerprint, self.shape, self.chunk = npz, fingerprint, shape, chunk
        self.partial = npz.with_name(f"{npz.name}.{fingerprint}.partial")
        self.record = npz.with_name(f"{npz.name}.{fingerprint}.done")
        self.num_chunks = -(-shape[0] // chunk)
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "|u1", "fortran_order": False, "shape": shape}
        )
        self._npy_header = header.getvalue()
        self._image_bytes = shape[1] * shape[2] * shape[3]
        self._size = len(self._npy_header) + shape[0] * self._image_bytes
        self._start = len(_local_header(b"arr_0.npy", 0, 0)) + len(self._npy_header)
        self._end = self._start + shape[0] * self._image_bytes

    def create(self) -> None:
        """Create the file, unless an earlier run has begun it; to be called by one process only."""
        if self.has_begun():
            return
        free = shutil.disk_usage(self.npz.parent).free
        if free < self._size:
            raise ValueError(
                f"{self.npz.parent} has {free / 2**30:.1f} GiB free, {self.npz.name} needs "
                f"{self._size / 2**30:.1f} GiB"
            )
        with open(self.partial, "wb") as f:
            f.write(_local_header(b"arr_0.npy", 0, self._size) + self._npy_header)
            f.truncate(self._end)
        with atomic_path(
            self.record
        ) as temporary:  # last: its existence marks a file that can be continued
            temporary.write_bytes(bytes(self.num_chunks))

    def has_begun(self) -> bool:
        """Return whether there is an unfinished file that can be continued."""
        if not (self.record.exists() and self.partial.exists()):
            return False
        sizes = self.partial.stat().st_size, self.record.stat().st_size
        return sizes[0] >= self._end and sizes[1] == self.num_chunks

    def missing(self) -> list[int]:
        """Return the chunks that are still to be written."""
        return [i for i, done in enumerate(self.record.read_bytes()) if not done]

    def images_of(self, chunk: int) -> range:
        """Return the indices of the images of one chunk; the last chunk may be shorter."""
        return range(chunk * self.chunk, min((chunk + 1) * self.chunk, self.shape[0]))

    def write(self, chunk: int, images: np.ndarray) -> None:
        """Write the images (b, H, W, 3) of one chunk."""
        assert (
            images.shape == (len(self.images_of(chunk)), *self.shape[1:])
            and images.dtype == np.uint8
        )
        try:
            position = self._start + chunk * self.chunk * self._image_bytes
            _write_at(self.partial, position, images.tobytes())
            _write_at(self.record, chunk, b"\1")
        except OSError as error:
            raise ValueError(
                f"{self.partial} cannot be written: {error.strerror}; the same "
                "command continues from here"
            ) from error

    def finish(self, labels: np.ndarray, bar: tqdm) -> None:
        """Add checksum, labels and directory, rename the file; to be called by one process."""
        assert not self.missing()
        crc = zlib.crc32(self._npy_header)
        with open(self.partial, "r+b") as f:
            f.seek(self._start)
            while block := f.read(min(BLOCK, self._end - f.tell())):
                crc = zlib.crc32(block, crc)
                bar.update(len(block) / self._image_bytes)
            f.seek(0)
            f.write(_local_header(b"arr_0.npy", crc, self._size))

            f.truncate(self._end)  # remove what a run killed here has appended
            f.seek(self._end)
            array = io.BytesIO()
            np.lib.format.write_array(array, labels, allow_pickle=False)
            text = array.getvalue()
            f.write(_local_header(b"labels.npy", zlib.crc32(text), len(text)) + text)
            files = [
                (b"arr_0.npy", crc, self._size, 0),
                (b"labels.npy", zlib.crc32(text), len(text), self._end),
            ]
            f.write(_end_of_zip(f.tell(), files))
            f.flush()
            os.fsync(f.fileno())
        bar.close()
        os.replace(self.partial, self.npz)
        self.clean()

    def clean(self) -> None:
        """Remove the record of chunks of a finished file."""
        self.record.unlink(missing_ok=True)


def _write_at(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as f:
        f.seek(offset)
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def _local_header(name: bytes, crc: int, size: int) -> bytes:
    """Return a stored file's header in a zip, zip64 for every size (APPNOTE 4.3.7, 4.5.3)."""
    fields = (0x04034B50, 45, 0, 0, 0, _DATE, crc, _LARGE, _LARGE, len(name), 20)
    return struct.pack("<I5H3I2H", *fields) + name + struct.pack("<2H2Q", 1, 16, size, size)


def _end_of_zip(position: int, files: list[tuple[bytes, int, int, int]]) -> bytes:
    """Return the directory at ``position`` of (name, crc, size, offset) (APPNOTE 4.3.12-16)."""
    directory = b""
    for name, crc, size, offset in files:
        fields = (0x02014B50, 45, 45, 0, 0, 0, _DATE, crc, _LARGE, _LARGE, len(name), 28)
        rest = (0, 0, 0, 0, _LARGE)
        extra = struct.pack("<2H3Q", 1, 24, size, size, offset)
        directory += struct.pack("<I6H3I5H2I", *fields, *rest) + name + extra
    count = len(files)
    end64 = struct.pack(
        "<IQ2H2I4Q", 0x06064B50, 44, 45, 45, 0, 0, count, count, len(directory), position
    )
    locator = struct.pack("<IIQI", 0x07064B50, 0, position + len(directory), 1)
    end = struct.pack("<I4H2IH", 0x06054B50, 0, 0, count, count, _LARGE, _LARGE, 0)
    return directory + end64 + locator + end
