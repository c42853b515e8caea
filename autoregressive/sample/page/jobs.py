"""Jobs of the demo page: one queue, one worker, and what each job tells while it goes on."""

from __future__ import annotations

import queue
import secrets
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

WAITING = 16  # jobs at most
KEPT_BYTES = 256 << 20  # of finished jobs whose files and events can still be fetched
Event = dict[str, Any]


class Cancelled(Exception):
    """Nobody waits for the job any more."""


@dataclass
class Job:
    """Something to compute for one visitor, who alone knows its name.

    ``work(job)`` runs once, in the worker's thread; it calls ``tell`` and fills ``files``.
    """

    work: Callable[[Job], None]
    name: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)  # name -> type, content
    events: list[Event] = field(default_factory=list)
    finished: bool = False
    cancelled: bool = False  # whoever watched it has left: it ends at its next event
    changed: threading.Condition = field(default_factory=threading.Condition)

    def tell(self, kind: str, **facts: Any) -> None:
        """Add an event for those who watch; ``Cancelled`` if they have left."""
        if self.cancelled:
            raise Cancelled
        with self.changed:
            self.events.append({"event": kind, **facts})
            self.changed.notify_all()

    def watch(self) -> Iterator[Event]:
        """Yield all events, those to come as well, until the job is finished."""
        seen, finished = 0, False
        while not finished:
            with self.changed:
                if len(self.events) == seen and not self.finished:
                    self.changed.wait(timeout=15)
                events, finished = self.events[seen:], self.finished
            seen += len(events)
            yield from events or [{"event": "waiting"}]  # shows who has left

    def size(self) -> int:
        """Return about how many bytes it keeps."""
        texts = (value for event in self.events for value in event.values())
        strips = sum(len(text) for text in texts if isinstance(text, str))
        return strips + sum(len(content) for _, content in self.files.values())

    def run(self) -> None:
        """Do the work; an error is its last event."""
        with suppress(Cancelled):
            try:
                self.work(self)
            except ValueError as error:
                self.tell("error", message=str(error))
            except Cancelled:
                self.files.clear()
            except Exception as error:
                traceback.print_exc()
                self.tell("error", message=f"{type(error).__name__}: {error}")
        with self.changed:
            self.finished = True
            self.changed.notify_all()


class Jobs:
    """The queue: jobs run one after another, so that visitors' images and times do not mix."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Job] = queue.Queue(WAITING)
        self._known: OrderedDict[str, Job] = OrderedDict()
        self._lock = threading.Lock()
        self._closing, self._running = False, False
        self._worker = threading.Thread(target=self._work, daemon=True)
        self._worker.start()

    def add(self, job: Job) -> Job:
        """Put a job at the end of the queue; ``ValueError`` if that is full."""
        ahead = self._queue.qsize() + self._running
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            raise ValueError(f"{WAITING} jobs are waiting already; try again in a while") from None
        job.tell("queued", ahead=ahead)
        with self._lock:
            self._known[job.name] = job
            kept = 0
            for name, old in reversed(list(self._known.items())):  # the newest first
                kept += old.size()
                if old.finished and (kept > KEPT_BYTES or old.cancelled):
                    del self._known[name]
        return job

    def close(self) -> None:
        """Cancel all jobs, and wait for the one that runs to end."""
        with self._lock:
            for job in self._known.values():
                job.cancelled = True
        self._closing = True
        with suppress(queue.Full):  # something for a worker that waits
            self._queue.put_nowait(Job(lambda job: None))
        self._worker.join(10)

    def find(self, name: str) -> Job | None:
        """Return the job of this name, None if there is none any more."""
        with self._lock:
            return self._known.get(name)

    def _work(self) -> None:
        while not self._closing:
            job = self._queue.get()
            self._running = True
            job.run()
            self._running = False
