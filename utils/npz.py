"""A set of images as one ``.npz`` of ``arr_0`` uint8 (N, H, W, 3) and ``labels`` int64 (N,), written in chunks.

Every process writes its chunks straight to where they belong in the final file, so nothing is packed or copied. A byte
per chunk beside it says which are there: written after the chunk, so that a process killed in between only makes that
chunk again. Plain writes, not a memory map: over a network disk a map writes whole pages, and with them the edges of a
neighbour's images as they were.
"""

from __future__ import annotations

import io
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.files import atomic_path

BLOCK = 1 << 24  # bytes read at a time for the checksum
_LARGE = 0xFFFFFFFF  # in a zip's field: the value stands in the zip64 extra field
_DATE = 0x21  # 1980-01-01, so that equal images are equal bytes


class SampleFile:
    """The file under construction; ``fingerprint`` keeps sets of other options or weights apart."""

    def __init__(self, npz: Path, fingerprint: str, shape: tuple[int, int, int, int], chunk: int):
        self.npz, self.fingerprint, self.shape, self.chunk = npz, fingerprint, shape, chunk
        self.partial = npz.with_name(f"{npz.name}.{fingerprint}.partial")
        self.record = npz.with_name(f"{npz.name}.{fingerprint}.done")
        self.num_chunks = -(-shape[0] // chunk)
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        self._npy_header = header.getvalue()
        self._image_bytes = shape[1] * shape[2] * shape[3]
        self._size = len(self._npy_header) + shape[0] * self._image_bytes
        self._start = len(_local_header(b"arr_0.npy", 0, 0)) + len(self._npy_header)
        self._end = self._start + shape[0] * self._image_bytes

    def create(self) -> None:
        """Make the file, or keep what an earlier run has done of it; only one process calls this."""
        if self.has_begun():
            return
        free = shutil.disk_usage(self.npz.parent).free
        if free < self._size:
            raise ValueError(
                f"{self.npz.parent} has {free / 2**30:.1f} GiB free, {self.npz.name} needs {self._size / 2**30:.1f} GiB"
            )
        with open(self.partial, "wb") as f:
            f.write(_local_header(b"arr_0.npy", 0, self._size) + self._npy_header)
            f.truncate(self._end)
        with atomic_path(self.record) as temporary:  # last, as it is what says that there is a file to go on with
            temporary.write_bytes(bytes(self.num_chunks))

    def has_begun(self) -> bool:
        """Return whether there is a file under construction to go on with."""
        if not (self.record.exists() and self.partial.exists()):
            return False
        return self.partial.stat().st_size >= self._end and self.record.stat().st_size == self.num_chunks

    def missing(self) -> list[int]:
        """Chunks that are still to be made."""
        return [i for i, done in enumerate(self.record.read_bytes()) if not done]

    def images_of(self, chunk: int) -> range:
        """Indices of the images of one chunk; the last may be shorter."""
        return range(chunk * self.chunk, min((chunk + 1) * self.chunk, self.shape[0]))

    def write(self, chunk: int, images: np.ndarray) -> None:
        """Write the images (b, H, W, 3) of one chunk."""
        assert images.shape == (len(self.images_of(chunk)), *self.shape[1:]) and images.dtype == np.uint8
        try:
            _write_at(self.partial, self._start + chunk * self.chunk * self._image_bytes, images.tobytes())
            _write_at(self.record, chunk, b"\1")
        except OSError as error:
            raise ValueError(
                f"{self.partial} cannot be written: {error.strerror}; the same command goes on from here"
            ) from error

    def finish(self, labels: np.ndarray, bar: tqdm) -> None:
        """Checksum, labels, table of contents; then the file gets its name. Only one process calls this."""
        assert not self.missing()
        crc = zlib.crc32(self._npy_header)
        with open(self.partial, "r+b") as f:
            f.seek(self._start)
            while block := f.read(min(BLOCK, self._end - f.tell())):
                crc = zlib.crc32(block, crc)
                bar.update(len(block) / self._image_bytes)
            f.seek(0)
            f.write(_local_header(b"arr_0.npy", crc, self._size))
            f.truncate(self._end)  # of what a run killed here has written behind
            f.seek(self._end)
            array = io.BytesIO()
            np.lib.format.write_array(array, labels, allow_pickle=False)
            text = array.getvalue()
            f.write(_local_header(b"labels.npy", zlib.crc32(text), len(text)) + text)
            f.write(
                _end_of_zip(
                    f.tell(),
                    [(b"arr_0.npy", crc, self._size, 0), (b"labels.npy", zlib.crc32(text), len(text), self._end)],
                )
            )
            f.flush()
            os.fsync(f.fileno())
        bar.close()
        os.replace(self.partial, self.npz)
        self.clean()

    def clean(self) -> None:
        """Remove the record of a file that has its name."""
        self.record.unlink(missing_ok=True)


def _write_at(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as f:
        f.seek(offset)
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def _local_header(name: bytes, crc: int, size: int) -> bytes:
    """What stands before a stored file of a zip, in zip64 form whatever its size (APPNOTE 4.3.7, 4.5.3)."""
    fields = (0x04034B50, 45, 0, 0, 0, _DATE, crc, _LARGE, _LARGE, len(name), 20)
    return struct.pack("<I5H3I2H", *fields) + name + struct.pack("<2H2Q", 1, 16, size, size)


def _end_of_zip(position: int, files: list[tuple[bytes, int, int, int]]) -> bytes:
    """Central directory and end records at ``position``, for files of (name, crc, size, offset) (APPNOTE 4.3.12-16)."""
    directory = b""
    for name, crc, size, offset in files:
        fields = (0x02014B50, 45, 45, 0, 0, 0, _DATE, crc, _LARGE, _LARGE, len(name), 28, 0, 0, 0, 0, _LARGE)
        directory += struct.pack("<I6H3I5H2I", *fields) + name + struct.pack("<2H3Q", 1, 24, size, size, offset)
    count = len(files)
    end64 = struct.pack("<IQ2H2I4Q", 0x06064B50, 44, 45, 45, 0, 0, count, count, len(directory), position)
    locator = struct.pack("<IIQI", 0x07064B50, 0, position + len(directory), 1)
    end = struct.pack("<I4H2IH", 0x06054B50, 0, 0, count, count, _LARGE, _LARGE, 0)
    return directory + end64 + locator + end
