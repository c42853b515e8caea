"""Assigns shards of cached codes to processes by claim files on a shared disk."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

from dataset.codes import shard_path
from utils.files import remove_ended, remove_temporary, temporary_path
from utils.processes import has_ended, machine


class Claims:
    """The shards that this process has claimed; leaving the context releases them.

    A claim is a file ``shards/00012.claim``, created exclusively. It lapses when its process has
    ended (detected only on the same machine) or has not renewed it for ``timeout`` seconds. If two
    processes ever make the same shard, both write the same bytes atomically.
    """

    def __init__(self, folder: str | Path, timeout: float = 900.0):
        self.folder, self.timeout = folder, timeout
        self._machine = machine()
        self._text = f"{self._machine} {os.getpid()} {uuid.uuid4().hex}"
        self._claimed: set[int] = set()

    def _path(self, shard: int) -> Path:
        return shard_path(self.folder, shard).with_suffix(".claim")

    def free(self, shard: int) -> bool:
        """Return whether ``take`` would succeed now."""
        return not self._path(shard).exists() or self._lapsed(self._path(shard))

    def take(self, shard: int) -> bool:
        """Claim ``shard``; False if a live process holds it or the shard exists already."""
        path = self._path(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._lapsed(path):
            aside = path.with_suffix(f".lapsed-{uuid.uuid4().hex[:8]}")
            try:
                os.rename(path, aside)  # of several processes that see it lapse, one succeeds
            except FileNotFoundError:
                return False
            aside.unlink()

        # linked when it is whole: a claim without a name would be waited for until it lapses
        remove_ended(path)
        aside = temporary_path(path)
        try:
            aside.write_text(self._text)
            os.link(aside, path)
        except FileExistsError:
            return False
        finally:
            aside.unlink(missing_ok=True)

        self._claimed.add(shard)
        finished = shard_path(self.folder, shard)
        if finished.exists():  # after our last look, before our claim
            self.release(shard)
            return False
        remove_temporary(finished)
        return True

    def _lapsed(self, path: Path) -> bool:
        try:
            place, _, rest = path.read_text(errors="replace").partition(" ")
            age = time.time() - path.stat().st_mtime
        except FileNotFoundError:
            return False
        pid = rest.partition(" ")[0]
        if place == self._machine and pid.isdigit() and has_ended(int(pid)):
            return True
        return age > self.timeout

    def _is_held(self, shard: int) -> bool:
        try:
            return self._path(shard).read_text(errors="replace") == self._text
        except FileNotFoundError:
            return False

    def renew(self) -> None:
        """Show that this process is alive, for all its claims."""
        for shard in self._claimed:
            if self._is_held(shard):
                os.utime(self._path(shard))

    def release(self, shard: int) -> None:
        """Give up a claim; one that another process has taken over is left alone."""
        self._claimed.discard(shard)
        if self._is_held(shard):
            self._path(shard).unlink()

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: object) -> None:
        for shard in list(self._claimed):
            self.release(shard)
