"""SIGTERM, SIGUSR1 (preemption, time limits) and Ctrl-C end a run between two steps, on all
ranks at the same one.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from types import FrameType

import torch
import torch.distributed as dist

from utils.distributed import TIMEOUT, World

GRACE = 120.0  # seconds for the current step to end
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignal:
    """Listens from its creation. In each step: ``begin_vote`` first, ``should_stop`` at its end.

    The death of torchrun's launcher counts as a signal. torchrun signals the ranks that are left
    when one has died, and those may wait for it for ever: a step that does not end within two
    minutes of the signal ends the process.
    """

    def __init__(self, world: World):
        self.received, self._is_main = False, world.is_main
        self._asked, self._ended = torch.zeros(1), threading.Event()
        self._steps, self._in_step = 0, False
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if world.size > 1 else None
        self._work: dist.Work | None = None
        self._watched, wakeup = socket.socketpair()
        wakeup.setblocking(False)
        self._wakeup = (
            wakeup  # written to by the interpreter even while the main thread waits in C++
        )
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS[:2]}
        threading.Thread(target=self._watch, daemon=True).start()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.received:
                raise KeyboardInterrupt
            if self._is_main:
                os.write(
                    2,
                    b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n",
                )
        self.received = True

    def close(self) -> None:
        """Handle signals again as before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _watch(self) -> None:
        while self._watched.recv(1)[0] not in SIGNALS:
            pass
        while not self._ended.is_set():
            before = self._steps
            if not self._ended.wait(GRACE) and self._in_step and self._steps == before:
                os.write(
                    2, b"error: the step did not end after the signal; has another rank died?\n"
                )
                os._exit(1)

    def begin_vote(self) -> None:
        """Start asking all ranks for a signal; over hosts, so that no device is waited for."""
        # before the first step Ctrl-C ends the program at once
        if signal.SIGINT not in self._before:
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._note)
        self._steps, self._in_step = self._steps + 1, True
        # its launcher was killed: this process would train on unseen, and keep others out
        orphaned = self._launcher not in (None, os.getppid())
        self._asked.fill_(float(self.received or orphaned))
        if self._group is not None:
            self._work = dist.all_reduce(self._asked, dist.ReduceOp.MAX, self._group, async_op=True)

    def should_stop(self) -> bool:
        """Return whether a rank had been signalled at ``begin_vote``: the same on all ranks."""
        if self._work is not None:
            self._work.wait()
        self._in_step = False
        if stop := bool(self._asked.item()):
            self._ended.set()
        return stop
