"""Which run holds a folder or a file that one run alone may write."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.processes import has_ended, machine

if TYPE_CHECKING:  # importing torch takes seconds
    from utils.distributed import World

PATIENCE = 60.0  # seconds that ranks may outlive their launcher, or rank 0
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what a disk without them answers
_held: dict[Path, int] = {}  # file descriptors


def hold(path: Path, world: World, what: str) -> None:
    """Lock file ``path`` for all processes of this run, until they end or ``release`` it.

    ``ValueError`` naming ``what`` and its holder if another run holds it; waits where that run's
    launcher or rank 0 is dead, for the rest of it to end. The kernel frees the locks of a killed
    process. A disk that has no locks holds nothing.
    """
    path = path.absolute()
    if path in _held:  # by all ranks, or by none
        return
    problem = None
    if world.is_main and (problem := _lock(path, fcntl.LOCK_EX, what)) is None:
        _record(path)
        problem = _lock(path, fcntl.LOCK_SH, what)
    if problem := world.first(problem):
        raise ValueError(problem)
    # shared by all ranks: one that outlives rank 0 goes on holding it
    if problem := world.first(None if world.is_main else _lock(path, fcntl.LOCK_SH, what)):
        raise ValueError(problem)


def release_all(delete: bool) -> None:
    """Free what this process holds; ``delete``: the files too, when the whole run has ended."""
    for path, descriptor in _held.items():
        if delete:
            path.unlink(missing_ok=True)
        os.close(descriptor)
    _held.clear()


def _lock(path: Path, kind: int, what: str) -> str | None:
    """Lock ``path``; return why that is impossible."""
    deadline = time.monotonic() + PATIENCE
    while True:
        descriptor = _held.get(path)
        if descriptor is None:
            try:  # a link would lead to a file that is then emptied
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            except OSError as error:
                return f"{what} cannot be locked: {path}: {error.strerror}"
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except OSError as error:
            holder = _read(path)
            if path not in _held:
                os.close(descriptor)
            if error.errno in NO_LOCKS:
                return None
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return f"{what} cannot be locked: {error.strerror}"
            if not _is_dying(holder) or time.monotonic() > deadline:
                return (
                    f"{what} is in use by another run: process {holder.get('process', '?')} on "
                    f"{holder.get('host', '?')}, since {holder.get('since', '?')}; wait for it "
                    "to end, or give another folder"
                )
            time.sleep(0.2)
            continue
        with suppress(FileNotFoundError):
            if path in _held or os.path.samestat(os.fstat(descriptor), os.stat(path)):
                _held[path] = descriptor
                return None
        os.close(descriptor)  # deleted by the run that held it, while we opened it


def _record(path: Path) -> None:
    """Write who holds ``path`` into it."""
    if path in _held:
        launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        holder = {"host": platform.node(), "machine": machine(), "process": os.getpid()}
        holder |= {"launcher": launcher, "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        os.ftruncate(_held[path], 0)
        os.pwrite(_held[path], json.dumps(holder).encode(), 0)


def _read(path: Path) -> dict[str, Any]:
    try:
        holder = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_dying(holder: dict[str, Any]) -> bool:
    """Return whether rank 0 of the run that holds the lock, or its launcher, is dead already."""
    if holder.get("machine") != machine():
        return not holder  # nothing written yet, or just deleted
    processes = (holder.get("process"), holder.get("launcher"))
    return any(type(p) is int and has_ended(p) for p in processes)
