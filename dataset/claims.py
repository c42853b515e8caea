"""Assigns shards of cached codes to processes by locks on a shared disk."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path

from dataset.shards import shard_path
from utils.files import remove_temporary
from utils.lock import NO_LOCKS


class Claims:
    """The shards that this process has claimed; leaving the context releases them.

    A claim is a lock on one byte of ``claims.lock``, which the kernel frees when its process ends,
    however it ends; a server of network disks frees those of a machine that it has lost. A process
    that hangs keeps its claims. Where a disk has no locks, or only within one machine, several
    processes may make a shard: all write the same bytes, atomically.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.exclude = True  # False once the disk turns out to have no locks
        # opened once: closing any other descriptor of the file would free the process's locks;
        # never deleted: who opens it next must find the locks that there are
        self._file = os.open(self.folder / "claims.lock", os.O_RDWR | os.O_CREAT, 0o666)

    def take(self, shard: int) -> bool:
        """Claim ``shard``; False if it exists already or another process holds it."""
        finished = shard_path(self.folder, shard)
        if finished.exists() or not self._lock(shard):
            return False
        if finished.exists():  # after our last look, before our claim
            self.release(shard)
            return False
        return True

    def _lock(self, shard: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, shard)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            if error.errno not in NO_LOCKS:
                raise
            self.exclude = False
        return True

    def release(self, shard: int) -> None:
        """Give up a claim."""
        with suppress(OSError):  # a disk without locks
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, shard)

    def sweep(self) -> None:
        """Delete what killed processes left: temporary files of shards that nobody holds.

        Where a disk has no locks, those of writers on other machines go too: only when all shards
        exist, or by a single writer.
        """
        for leftover in (self.folder / "shards").glob("*.npz.tmp-*"):
            shard = int(leftover.name.partition(".")[0])
            if self._lock(shard):
                remove_temporary(shard_path(self.folder, shard))
                self.release(shard)

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
