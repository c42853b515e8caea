"""A set of images written to one ``.npz`` by many processes.

It holds ``arr_0`` uint8 (N, H, W, 3) and ``labels`` int64 (N,). Every process writes its chunks
directly to their position in the final file, so nothing is packed or copied. In a record of its own
it has one byte per chunk, written after the chunk: if a process is killed in between, only that
chunk is made again. Files are written with plain writes rather than a memory map, which on a
network disk writes whole pages and could overwrite a neighbour's images.
"""

from __future__ import annotations

import io
import os
import shutil
import struct
import time
import zlib
from glob import escape
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.files import atomic_path, process_name, readable_size

BLOCK = 1 << 24  # bytes read at a time for the checksum
PATIENCE = 60.0  # seconds until a network disk shows what other machines have written
_LARGE = 0xFFFFFFFF  # in a field of a zip: the value is in the zip64 extra field
_DATE = 0x21  # 1980-01-01, so that equal images give equal files


class SampleFile:
    """An unfinished image set; ``fingerprint`` tells apart sets of other options or weights."""

    def __init__(self, npz: Path, fingerprint: str, shape: tuple[int, int, int, int], chunk: int):
        self.npz, self.fingerprint, self.shape, self.chunk = npz, fingerprint, shape, chunk
        self.partial = npz.with_name(f"{npz.name}.{fingerprint}.partial")
        self.record = npz.with_name(f"{npz.name}.{fingerprint}.done")
        # no other process writes there
        self._own = self.record.with_name(f"{self.record.name}-{process_name()}")
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
                f"{self.npz.parent} has {readable_size(free)} free, {self.npz.name} needs "
                f"{readable_size(self._size)}"
            )
        self.clean()
        with open(self.partial, "wb") as f:
            f.write(_local_header(b"arr_0.npy", 0, self._size) + self._npy_header)
            f.truncate(self._end)
        # last: its existence marks a file that can be continued
        with atomic_path(self.record) as temporary:
            temporary.write_bytes(bytes(self.num_chunks))

    def has_begun(self) -> bool:
        """Return whether there is an unfinished file that can be continued."""
        if not (self.record.exists() and self.partial.exists()):
            return False
        sizes = self.partial.stat().st_size, self.record.stat().st_size
        return sizes[0] >= self._end and sizes[1] == self.num_chunks

    def missing(self) -> list[int]:
        """Return the chunks that are still to be written, by what all processes have recorded."""
        done = np.zeros(self.num_chunks, bool)
        for record in self._records():
            content = np.frombuffer(record.read_bytes(), np.uint8)
            if len(content) == self.num_chunks:  # else cut off by the end of its process
                done |= content != 0
        return np.flatnonzero(~done).tolist()

    def _records(self) -> list[Path]:
        """Return the records of all processes, of this run and of earlier ones."""
        return list(self.record.parent.glob(f"{escape(self.record.name)}*"))

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
            if not self._own.is_file() or self._own.stat().st_size != self.num_chunks:
                self._own.write_bytes(bytes(self.num_chunks))
            _write_at(self._own, chunk, b"\1")
        except OSError as error:
            raise ValueError(
                f"{self.partial} cannot be written: {error.strerror}; the same "
                "command continues from here"
            ) from error

    def finish(self, labels: np.ndarray, bar: tqdm) -> None:
        """Add checksum, labels and directory, rename the file; to be called by one process."""
        deadline = time.monotonic() + PATIENCE
        while missing := self.missing():
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{self.partial} lacks {len(missing)} of {self.num_chunks} batches, by the "
                    f"records {self.record.name}* beside it; the same command makes them"
                )
            time.sleep(1)
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
        """Remove the records of chunks; that of ``create`` first, without which none counts."""
        self.record.unlink(missing_ok=True)
        for record in self._records():
            record.unlink(missing_ok=True)


def _write_at(path: Path, offset: int, content: bytes) -> None:
    """Write to a place in a file that others write to, too, and wait for the disk.

    On a network disk neighbours may share a page. A client that has read the page, or extends what
    it writes to the whole page, would write a neighbour's old bytes back: Linux does neither for a
    descriptor that is write-only and synchronous (``nfs_want_read_modify_write`` and
    ``nfs_can_extend_write`` in its ``fs/nfs``; pNFS with block layouts apart).
    """
    file = os.open(path, os.O_WRONLY | os.O_DSYNC)
    try:
        while content:
            written = os.pwrite(file, content, offset)
            content, offset = content[written:], offset + written
    finally:
        os.close(file)


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
