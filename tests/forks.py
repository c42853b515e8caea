"""Forks of this process in place of new Pythons, which take seconds to import torch."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

TIMEOUT = 600.0
PR_SET_CHILD_SUBREAPER = 36  # of prctl: orphans become our children
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


class Fork:
    """A fork that does ``action``, in a session of its own; used as a ``Popen``."""

    def __init__(self, action: Callable[[], None]):
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            for number in HANDLED:
                signal.signal(number, signal.SIG_DFL)
            status = 1
            try:
                # makes the pool anew; autograd's threads may clash over that
                torch.set_num_threads(1)
                action()
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                try:
                    sys.stdout.flush()
                finally:  # whatever fails, the fork must not go on as its parent
                    os._exit(status)

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # killed and reaped
                pid, status = self.pid, signal.SIGKILL
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status at the end."""
        deadline = time.monotonic() + (TIMEOUT if timeout is None else timeout)
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or TIMEOUT)
            time.sleep(0.005)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)


def descendants() -> list[int]:
    """Return all processes that this one and its children have started."""
    children: dict[int, list[int]] = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(place.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(place.parent.name))
    found, left = [], [os.getpid()]
    while left:
        new = children.get(left.pop(), [])
        found += new
        left += new
    return found


def kill_all() -> None:
    """SIGKILL all descendants, and those that they start meanwhile."""
    while left := descendants():
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def adopt_orphans() -> None:
    """Become the parent of descendants whose own has died (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
