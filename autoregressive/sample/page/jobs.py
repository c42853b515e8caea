"""Jobs of the demo page: one queue, one worker, and what each job tells while it goes on."""

from __future__ import annotations

import queue
import secrets
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

WAITING = 16  # jobs at most
KEPT = 32  # finished jobs whose files can still be fetched
Event = dict[str, Any]


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
    changed: threading.Condition = field(default_factory=threading.Condition)

    def tell(self, kind: str, **facts: Any) -> None:
        """Add an event for those who watch."""
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
            yield from events or [{"event": "waiting"}]  # whoever has left is noticed by it

    def run(self) -> None:
        """Do the work; what goes wrong is the last event."""
        try:
            self.work(self)
        except ValueError as error:
            self.tell("error", message=str(error))
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
        threading.Thread(target=self._work, daemon=True).start()

    def add(self, job: Job) -> Job:
        """Put a job at the end of the queue; ``ValueError`` if that is full."""
        ahead = self._queue.qsize()
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            raise ValueError(f"{WAITING} jobs are waiting already; try again in a while") from None
        job.tell("queued", ahead=ahead)
        with self._lock:
            self._known[job.name] = job
            done = [name for name, old in self._known.items() if old.finished]
            for name in done[: max(0, len(self._known) - KEPT)]:
                del self._known[name]
        return job

    def find(self, name: str) -> Job | None:
        """Return the job of this name, None if there is none any more."""
        with self._lock:
            return self._known.get(name)

    def _work(self) -> None:
        while True:
            self._queue.get().run()
