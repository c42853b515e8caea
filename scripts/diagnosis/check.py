"""What a check is, and how one is run: in a process of its own, for a limited time.

A check is a function of a ``Context`` that returns a ``Result``. A crash in our kernels, a CUDA
error (which makes a process unusable) or a hang ends that one check and no other.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

OK, SLOW, BROKEN, NOT_HERE, LEFT_OUT = "ok", "slow", "broken", "not here", "left out"
STATUSES = (OK, SLOW, BROKEN, NOT_HERE, LEFT_OUT)
LEAST_SECONDS = 3.0  # a check is not begun with less time left
LOG_LINES = 40
MORE_TIME = "run it without --quick or with more --minutes"
GRACE = 5.0  # seconds for a process to end after it has sent its result


class NotHere(Exception):
    """Raised by a check of what this machine does not have; the message says what that is."""


@dataclass(frozen=True)
class Result:
    """Outcome of one check: one line for the table, and the numbers in it."""

    status: str
    detail: str
    advice: str = ""  # one sentence on what to do; empty: that of the check
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    log: str = ""  # last lines of what a broken check printed


@dataclass(frozen=True)
class Context:
    """What a check may read."""

    options: Namespace
    golden: Path  # folder of the golden files
    work: Path  # a folder of the check's own, deleted afterwards
    device: str = "cpu"  # as torch.device takes it
    earlier: dict[str, dict[str, float]] = field(default_factory=dict)  # figures, by name of check


@dataclass(frozen=True)
class Check:
    """One line of the table; checks.py lists them."""

    group: str
    name: str
    function: Callable[[Context], Result]
    advice: str  # what to do where the function does not say: it raised, crashed or ran out of time
    device: str = "cpu"
    limit: float = 60.0  # seconds
    late: str = BROKEN  # status after ``limit`` seconds
    thorough: bool = False  # left out by --quick


def reason_of(error: BaseException) -> str:
    """Return an exception as one line, without its type if it is a ``ValueError`` of ours."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else ""
    if isinstance(error, ValueError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def short(error: float) -> str:
    """Return a small number as text."""
    return f"{error:.1e}" if error else "0"


def run_here(check: Check, context: Context) -> Result:
    """Return the result of ``check``, run in this process; an exception makes it ``broken``."""
    try:
        result = check.function(replace(context, device=check.device))
    except NotHere as lacking:
        return Result(NOT_HERE, str(lacking))
    except (Exception, SystemExit) as error:
        traceback.print_exc()  # to the log
        return Result(BROKEN, reason_of(error), check.advice)
    if result.status in (SLOW, BROKEN) and not result.advice:
        return replace(result, advice=check.advice)
    return result


def run_apart(check: Check, context: Context, seconds_left: float) -> Result:
    """Return the result of ``check`` from a process of its own, killed after its limit."""
    if seconds_left < LEAST_SECONDS:
        return Result(LEFT_OUT, "no time was left for it", MORE_TIME)
    started = time.perf_counter()
    try:
        outcome = call_apart(_run_quietly, (check, context), min(check.limit, seconds_left))
    except TimeoutError as error:
        outcome = Result(check.late, str(error), check.advice)
        if seconds_left < check.limit:
            outcome = Result(LEFT_OUT, f"{error}, which was all that was left", MORE_TIME)
    except ChildProcessError as error:
        outcome = Result(BROKEN, str(error), check.advice)
    log = context.work / "log.txt"
    if outcome.status == BROKEN and log.exists():
        lines = log.read_text(errors="replace").splitlines()
        outcome = replace(outcome, log="\n".join(lines[-LOG_LINES:]))
    return replace(outcome, seconds=round(time.perf_counter() - started, 2))


def call_apart(function: Callable[..., Any], arguments: tuple, limit: float) -> Any:
    """Return ``function(*arguments)`` from a new process, which is killed after ``limit`` seconds.

    Raises ``TimeoutError`` then, and ``ChildProcessError`` if the process died without a result. On
    Linux the new process is forked off one that has imported everything and computed nothing: it
    starts at once and shares no state of torch or CUDA with others.
    """
    processes = multiprocessing.get_context("spawn")
    if sys.platform == "linux":
        start_fork_server()
        processes = multiprocessing.get_context("forkserver")
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            raise TimeoutError(f"did not end within {limit:.0f} s")
        result = receiver.recv()
        process.join(GRACE)
        return result
    except EOFError:
        process.join(GRACE)
        code = process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        raise ChildProcessError(f"its process died ({how})") from None
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # it and all it has started
        process.kill()
        process.join()
        receiver.close()


def start_fork_server() -> None:
    """Start the process that others are forked off, unless it runs already."""
    multiprocessing.set_forkserver_preload(["scripts.diagnosis.checks"])
    before = os.environ.get("PYTHONPATH")
    # up to Python 3.12 it takes the path of modules from nowhere else
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([before] if before else [])])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _send(sender: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    os.setsid()
    sender.send(function(*arguments))


def _run_quietly(check: Check, context: Context) -> Result:
    """Run ``check`` with its output in a file, and its GPUs hidden if it is about the CPU."""
    if check.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    log = os.open(context.work / "log.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    return run_here(check, context)
