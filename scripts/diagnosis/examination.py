"""One examination of a machine: describe it, run all checks, write the report."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from autoregressive.decoding.cpu.build import cache_folder
from scripts.benchmarks.common import ALLOCATOR
from scripts.diagnosis import machine
from scripts.diagnosis.check import (
    BROKEN,
    LEFT_OUT,
    ROOT,
    Check,
    Context,
    Result,
    call_apart,
    run_apart,
)
from scripts.diagnosis.checks import list_checks
from scripts.diagnosis.report import Rows, as_text, title, write_report
from utils.files import prepare_folder
from utils.performance import usable_cores

QUICK_MINUTES, FULL_MINUTES = 1.85, 8.5  # importing and reporting come on top
DEFAULT_OUTPUT = "results/doctor"
QUICK_N, FULL_N = 16, 4  # tokens predicted at once


def report_prefix(output: str) -> Path:
    """Return the path of the report without its suffix: ``doctor`` in ``output`` if a folder."""
    path = Path(output)
    if path.is_dir() or output.endswith("/"):
        return path / "doctor"
    return path.with_suffix("") if path.suffix in (".md", ".json") else path


def prepare_environment() -> None:
    """Set what scripts/launch.sh sets for training and sampling on a machine without a GPU."""
    if shutil.which("nvidia-smi") is not None:
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
    for name, value in ALLOCATOR.items():
        os.environ.setdefault(name, value)


def run_checks(checks: list[Check], context: Context, deadline: float) -> Rows:
    """Run ``checks`` in order, each in a process of its own, and print the status of each.

    deadline: of ``time.monotonic``; checks that do not end before it are cut short or left out.
    """
    rows, earlier = [], {}
    for number, check in enumerate(checks, 1):
        with tempfile.TemporaryDirectory(prefix="par-doctor-", ignore_cleanup_errors=True) as work:
            now = replace(context, work=Path(work), earlier=earlier)
            if check.thorough and context.options.quick:
                result = Result(LEFT_OUT, "left out by --quick")
            else:
                result = run_apart(check, now, deadline - time.monotonic())
        rows.append((check, result))
        earlier[check.name] = result.figures
        counted, seconds = f"[{number:2}/{len(checks)}]", f"{result.seconds:5.1f} s"
        print(f"{counted} {seconds}  {result.status:8} {title(check)}", flush=True)
    return rows


def examine(options: Namespace) -> bool:
    """Examine this machine as ``options`` say, print and write the report; return if all is well.

    Nothing is well if a check is broken; what is slow does not count.
    """
    started = time.monotonic()
    prefix = report_prefix(options.output or DEFAULT_OUTPUT)
    prepare_folder(prefix.parent, "--output")
    options.ar_token_num = options.ar_token_num or (QUICK_N if options.quick else FULL_N)
    minutes = options.minutes or (QUICK_MINUTES if options.quick else FULL_MINUTES)
    places = {"the report": prefix.parent, "temporary files": Path(tempfile.gettempdir())}
    options.places = places | {"kernels": cache_folder()}
    environment = machine.describe_environment()
    prepare_environment()

    facts = call_apart(machine.describe_machine, (options.places,), 60)
    facts["Environment"] = environment
    devices = call_apart(machine.devices, (), 60)
    for name, text in facts.items():
        print(f"{name:17} {text}", flush=True)
    context = Context(options, ROOT / "tests" / "golden", prefix.parent)
    rows = run_checks(list_checks(options, devices), context, started + 60 * minutes)

    seconds = round(time.monotonic() - started)
    kind = "quick" if options.quick else "full"
    heading = (
        f"{datetime.now():%Y-%m-%d %H:%M}, {kind} examination in {seconds} s, speed of "
        f"{options.gpt_model} at n = {options.ar_token_num}: `{' '.join(sys.argv)}`"
    )
    paths = write_report(prefix, heading, facts, vars(options), rows)
    print(as_text(rows))
    print(f"\n{seconds} s; this report is also in {' and '.join(map(str, paths))}")
    return all(result.status != BROKEN for _, result in rows)
