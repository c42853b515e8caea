"""What stands around a training loop: folder, resuming, signals, progress, averages, log and
curves.
"""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor

from utils.distributed import World
from utils.environment import write_options
from utils.logger import create_logger, progress
from utils.parallel import local
from utils.performance import peak_memory
from utils.training.log import ScalarLog, Window
from utils.training.run_folder import RunFolder
from utils.training.state import TrainingState, seed_step
from utils.training.stop_signal import StopSignal

T = TypeVar("T")


def prefetch(make: Callable[[int], T], steps: range, ahead: int = 2) -> Iterator[tuple[int, T]]:
    """Yield (step, make(step)) in order, made ``ahead`` steps early on a thread."""
    with ThreadPoolExecutor(1) as thread:
        pending = deque(thread.submit(make, step) for step in steps[:ahead])
        for step in steps:
            if step + ahead in steps:
                pending.append(thread.submit(make, step + ahead))
            yield step, pending.popleft().result()


class TrainingRun:
    """One run of a trainer, on every rank.

    Making it resumes ``state`` from the newest checkpoint and writes nothing; ``open`` creates
    folder, log and curves; ``with`` shows the bar and closes all of it. A loop is then::

        for step, batch in run.steps(batches):
            ...                                    # the training step itself
            run.end_step(loss=loss, ...)           # scalars to be averaged until the next log line
            if run.log_due:
                run.log(line, run.read(lr))
            with run.paused():                     # does not count as training time
                run.save_if_due(facts)
                if run.due(every):
                    ...
        run.finish(export)

    and ends by itself, within a step, on SIGTERM, SIGUSR1 and Ctrl-C.
    """

    def __init__(
        self,
        args: Namespace,
        world: World,
        name: str,
        state: TrainingState,
        fixed: dict[str, Any],
        total_steps: int,
        start: Path | None = None,
    ):
        """name: of the folder; fixed: unchangeable options; start: see ``RunFolder.resume``.

        ``args`` has the options of ``utils.training.options``.
        """
        self.args, self.world, self.state, self.total_steps = args, world, state, total_steps
        # as it comes back from a checkpoint
        self.fixed: dict[str, Any] = json.loads(json.dumps(fixed))
        self.run_folder = RunFolder.of(args, world, name)
        # nothing is resumed from while another run may write it; a new folder is made by ``open``
        if not args.dry_run and world.broadcast(self.run_folder.folder.is_dir()):
            self.run_folder.hold()
        self.first_step = self.run_folder.resume(state, self.fixed, start)
        wanted = self.first_step + 2 if args.dry_run else args.max_steps or total_steps
        self.last_step = max(self.first_step, min(wanted, total_steps))
        self.folder = None if args.dry_run else self.run_folder.folder
        self.done, self.stopping = self.first_step, False
        self._seconds = 0.0  # per step, of the last log line

    def open(self, stop: StopSignal, terms: Sequence[str], **facts: object) -> logging.Logger:
        """Create folder, log, curves; terms: names for ``end_step``; facts: for options.json."""
        self._stop = stop
        if self.folder is not None:
            self.run_folder.hold()
            self.run_folder.make()
        self.logger = create_logger(self.world, self.folder)
        self._curves = ScalarLog(self.world, self.folder, self.args.wandb_project, vars(self.args))
        if self.world.is_main and self.folder is not None:
            write_options(self.folder / "options.json", self.args, steps=self.total_steps, **facts)
        self._window = Window(terms, self.world.device)
        return self.logger

    def __enter__(self) -> TrainingRun:
        for note in self.run_folder.notes + self._curves.notes:
            self.logger.info(note)
        where = self.run_folder.folder
        resumed = f"resumed at step {self.first_step}" if self.first_step else "new run"
        self.logger.info(f"{where}: {resumed}")
        self._bar = progress(self.world, "training", self.last_step, self.first_step, "steps")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        self._curves.close()
        self._stop.close()

    def steps(self, batches: Iterable[tuple[int, T]]) -> Iterator[tuple[int, T]]:
        """Yield ``batches`` of (step, batch), seeded; ends early when a rank was signalled."""
        for step, batch in batches:
            self._stop.begin_vote()
            seed_step(self.args.global_seed, step, self.world.rank)
            yield step, batch
            if self.stopping:
                return

    def end_step(self, **terms: Tensor) -> None:
        """Count a step; its scalars, on the device, go into the averages of the next log line."""
        self.done += 1
        self.stopping = self._stop.should_stop()
        self._window.add(terms)
        self._bar.update()

    @property
    def last(self) -> bool:
        """Whether the step just done is the last one."""
        return self.stopping or self.done == self.last_step

    def due(self, every: int) -> bool:
        """Return whether what is done every ``every`` steps, and after the last one, is due now."""
        return self.done % every == 0 or self.last

    @property
    def log_due(self) -> bool:
        """Whether this step gets a log line."""
        return self.due(self.args.log_every) or self.args.dry_run

    def read(self, lr: float) -> dict[str, float]:
        """Return means, speed, memory since the last log line, and ``lr``; waits for the device."""
        figures = self._window.read(self.args.global_batch_size)
        self._seconds = figures.pop("seconds/step")
        memory = peak_memory(self.world.device) / 2**30
        return figures | {"lr": lr, "skipped": self.state.guard.skipped, "memory_gib": memory}

    def log(self, line: str, figures: dict[str, float]) -> None:
        """Log ``figures``, of ``read`` and others, formatted by ``line``, with the time left.

        Raises ``ValueError`` after too many harmful steps, see ``Guard``.
        """
        left = timedelta(seconds=round(self._seconds * (self.total_steps - self.done)))
        self.logger.info(f"step {self.done}{line.format(**figures)}, {left} left")
        self._curves.write(self.done, figures)
        for guard in self.state.guards:
            guard.check(self.done, figures["lr"], self.last)

    def log_more(self, figures: dict[str, float]) -> None:
        """Log figures that come besides the log line, such as those of a validation."""
        text = ", ".join(f"{k} {v:.4f}" for k, v in figures.items())
        self.logger.info(f"step {self.done}: {text}")
        self._curves.write(self.done, figures)

    def paused(self) -> AbstractContextManager[None]:
        """Return a context whose time does not count as training."""
        return self._window.paused()

    def save_if_due(self, facts: dict[str, Any]) -> None:
        """Save with ``facts`` every ``--ckpt-every`` steps, unless weights are in doubt."""
        if self.folder is None or not self.due(self.args.ckpt_every):
            return
        if all(guard.healthy for guard in self.state.guards):
            self.run_folder.save(self.done, self.state, facts | {"run": self.fixed})

    def finish(self, export: str) -> None:
        """Finish the last checkpoint, ``export`` its weights; log the forecast of a dry run."""
        if self.args.dry_run:
            self._forecast()
        else:
            self.run_folder.finish(self.last_step, self.stopping, export, self.logger)

    def _forecast(self) -> None:
        state, steps = self.state, self.total_steps - self.first_step
        # each parameter has a gradient as well
        held = (
            sum(local(t).nbytes for t in (*state.tensors().values(), *state.parameters())) / 2**30
        )
        peak = peak_memory(self.world.device) / 2**30
        self.logger.info(
            f"dry run: {held:.2f} GiB per process of weights, gradients, "
            f"moments{', average' if state.ema else ''}; peak {peak:.2f} GiB; {self._seconds:.3g} "
            f"s per step, {timedelta(seconds=round(steps * self._seconds))} for the {steps:,} "
            "steps to do; nothing was written"
        )
