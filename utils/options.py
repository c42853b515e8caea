"""Command lines: one style of parser, users' mistakes as one line.

Nothing here imports torch, which takes seconds: ``--help`` and a wrong option are answered before.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from utils.lock import release_all


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the layout of description and example; append each default that says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if action.required and action.option_strings:
            return f"{text} (required)"
        if action.default is None or action.default is False or "%(default)" in text:
            return text
        return super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """Says a mistake once, not once per rank."""

    def error(self, message: str) -> NoReturn:
        if is_first_to_say(message):
            super().error(message)
        sys.exit(2)


def is_first_to_say(text: str) -> bool:
    """Return whether no other rank of this run and machine has asked this of the same text.

    torchrun gives each rank a file for errors, in a folder of the run.
    """
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not place:
        return True
    said = hashlib.sha256(text.encode()).hexdigest()[:16]
    try:
        (Path(place).parents[1] / f"said-{said}").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def cause_is_said() -> bool:
    """Return whether a rank of this run and machine has said what is wrong."""
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return place is not None and any(Path(place).parents[1].glob("said-*"))


def make_parser(description: str, example: str, arguments: str = "") -> argparse.ArgumentParser:
    """Return a parser that shows defaults and an example, and accepts no abbreviations.

    arguments: the arguments that are not options, for the line of usage.
    """
    return _Parser(
        usage=f"%(prog)s {arguments} [options]" if arguments else "%(prog)s [options]",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )


def answer_early(parse: Callable[..., object], *arguments: str) -> None:
    """Parse the command line for ``--help`` and wrong options alone, which end the script here.

    A script calls this before it imports torch. Notes and the mistakes that ``run_main`` reports
    come from the same ``parse`` in ``main``, so they are left to that.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said), suppress(ValueError, OSError):
            parse(*arguments)
    except SystemExit:
        sys.stderr.write(said.getvalue())
        raise


def run_main(main: Callable[[], None]) -> None:
    """Call ``main``; a user's mistake (``ValueError``, ``OSError``) is one line, exit status 2.

    Ranks that fail alike report it once. ``PAR_DEBUG=1`` keeps the traceback.
    """
    rank, ended = os.environ.get("RANK", "0"), False
    where = "" if rank == "0" else f" on rank {rank}"
    try:
        main()
        ended = True
    except (ValueError, OSError) as error:
        if os.environ.get("PAR_DEBUG"):
            raise
        if is_first_to_say(str(error)):
            tqdm.write(f"error{where}: {error}", file=sys.stderr)  # clears an open bar first
        sys.exit(2)
    except RuntimeError as error:
        lost = re.search("gloo|Connection (closed|reset)", str(error))  # gloo gives it no type
        if os.environ.get("PAR_DEBUG") or not lost:
            raise
        if not cause_is_said():
            tqdm.write(f"error{where}: another process has ended", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        release_all(delete=ended and rank == "0")
        leave_group()


def leave_group() -> None:
    """Leave the process group, if this command has imported torch and joined one."""
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer")
    return value


def non_negative_int(text: str) -> int:
    """argparse type: an integer of at least 0; also for seeds, which must fit 63 bits."""
    value = int(text)
    if not 0 <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text} is not an integer of at least 0")
    return value


def non_negative_float(text: str) -> float:
    """argparse type: a finite number of at least 0."""
    value = float(text)
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return value


def fraction(text: str) -> float:
    """argparse type: a number in [0, 1]."""
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def resolve(option: str, written: Any, fixed: Any, source: str) -> Any:
    """Return ``fixed``, which ``source`` records; ``ValueError`` if the user wrote another."""
    if written is not None and written != fixed:
        raise ValueError(
            f"{option} {written} contradicts {source}, which says {fixed}; leave the option out"
        )
    return fixed


def add_retired(parser: argparse.ArgumentParser, options: dict[str, tuple[bool, str]]) -> None:
    """Accept options of the published scripts that have no effect any more.

    options: option -> (whether it takes a value, what took its place); using one prints that.
    """
    group = parser.add_argument_group("accepted for published command lines, without effect")
    for option, (takes_value, replacement) in options.items():
        group.add_argument(option, nargs=1 if takes_value else 0, action=_Retired, help=replacement)


class _Retired(argparse.Action):
    """Print what took an option's place; the namespace stays as it is."""

    def __init__(self, option_strings: list[str], dest: str, nargs: int, help: str):  # noqa: A002 - argparse's name
        super().__init__(
            option_strings,
            argparse.SUPPRESS,
            nargs,
            help=help,
            default=argparse.SUPPRESS,
            metavar="VALUE",
        )

    def __call__(
        self, parser: object, namespace: object, values: object, option_string: str | None = None
    ) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(f"note: {option_string} has no effect any more: {self.help}", file=sys.stderr)


def git_revision() -> str | None:
    """Return the checked-out commit, with ``+`` if files changed; None outside a repository."""
    root = Path(__file__).parent
    try:
        run = partial(subprocess.run, capture_output=True, text=True, check=True, timeout=30)
        git = ["git", "-C", root]
        commit = run([*git, "rev-parse", "HEAD"]).stdout
        changed = run([*git, "status", "--porcelain", "--untracked-files=no"]).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+" if changed.strip() else "")
