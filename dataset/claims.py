"""Which process makes which shard of cached codes, decided by claim files on a disk that all processes share."""

from __future__ import annotations

import os
import platform
import time
import uuid
from contextlib import suppress
from pathlib import Path

from dataset.codes import shard_path
from utils.files import remove_temporary


class Claims:
    """Which process makes which shard, by files on a disk that all of them share.

    A claim is ``shards/00012.claim``, created exclusively. It lapses when its process is gone (known on the same
    machine) or has not renewed it for ``timeout`` seconds. Should two processes ever make the same shard, both write
    the same bytes, each whole.
    """

    def __init__(self, folder: str | Path, timeout: float = 900.0):
        self.folder, self.timeout = folder, timeout
        self._machine = _machine()
        self._text = f"{self._machine} {os.getpid()} {uuid.uuid4().hex}"
        self._mine: set[int] = set()

    def _path(self, shard: int) -> Path:
        return shard_path(self.folder, shard).with_suffix(".claim")

    def free(self, shard: int) -> bool:
        """Whether ``take`` would now succeed."""
        return not self._path(shard).exists() or self._lapsed(self._path(shard))

    def take(self, shard: int) -> bool:
        """Claim ``shard`` if nobody alive has; False if somebody has, or the shard is there already."""
        path = self._path(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._lapsed(path):
            aside = path.with_suffix(f".lapsed-{uuid.uuid4().hex[:8]}")
            try:
                os.rename(path, aside)  # of several processes that see it lapse, one gets it
            except FileNotFoundError:
                return False
            aside.unlink()
        try:
            with open(path, "x") as f:
                f.write(self._text)
        except FileExistsError:
            return False
        self._mine.add(shard)
        if shard_path(self.folder, shard).exists():  # finished between our look and our claim
            self.release(shard)
            return False
        remove_temporary(shard_path(self.folder, shard))
        return True

    def _lapsed(self, path: Path) -> bool:
        try:
            machine, _, rest = path.read_text().partition(" ")
            age = time.time() - path.stat().st_mtime
        except FileNotFoundError:
            return False
        pid = rest.partition(" ")[0]
        if machine == self._machine and pid.isdigit():
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                return True
            except PermissionError:
                pass
        return age > self.timeout

    def _is_mine(self, shard: int) -> bool:
        try:
            return self._path(shard).read_text() == self._text
        except FileNotFoundError:
            return False

    def renew(self) -> None:
        """Say that this process is alive."""
        for shard in self._mine:
            if self._is_mine(shard):
                os.utime(self._path(shard))

    def release(self, shard: int) -> None:
        """Give up a claim, when the shard is there."""
        self._mine.discard(shard)
        if self._is_mine(shard):
            self._path(shard).unlink()

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: object) -> None:
        for shard in list(self._mine):
            self.release(shard)


def _machine() -> str:
    """Where a process id means something: host, boot and, on Linux, process namespace, as one word."""
    parts = [platform.node()]
    with suppress(OSError):  # not Linux
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return "/".join(parts).replace(" ", "_")
