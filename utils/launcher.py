"""torchrun, which leaves the last word on the screen to the processes that it starts."""

from __future__ import annotations

import logging
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

MISTAKE = 2  # exit status of a process that has said what is wrong


def main() -> None:
    """Start processes as torchrun does; exit with 2 after a user's mistake, with 128 and its number
    after a signal, else with 1. ``PAR_DEBUG=1`` keeps torchrun's own messages.
    """
    args = parse_args(None)
    if os.environ.get("PAR_DEBUG"):
        run(args)
        return
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):  # tells signals and exit statuses, twice
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        run(args)
    except ChildFailedError as error:
        if any(failure.exitcode == MISTAKE for failure in error.failures.values()):
            sys.exit(MISTAKE)
        print(f"error: {describe(error)}", file=sys.stderr)
        sys.exit(1)
    except SignalException as error:
        print(f"stopped by {error.sigval.name}", file=sys.stderr)
        sys.exit(128 + error.sigval)


def describe(error: ChildFailedError) -> str:
    """Return which process ended first, and how; one that was killed is the cause of all others."""
    killed = [
        (rank, failure)
        for rank, failure in error.failures.items()
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM  # sent by the launcher
    ]
    rank, failure = killed[0] if killed else error.get_first_failure()
    how = f"ended with exit status {failure.exitcode}, see above"
    if failure.exitcode < 0:
        how = f"was killed by {signal.Signals(-failure.exitcode).name}"
    return f"rank {rank} (process {failure.pid}) {how}; all processes of this machine were stopped"
