"""The acceptance run: everything that only a GPU can show, in one command and under 9 minutes.

The tests that need a GPU, then sampling, training, the tokenizer and the evaluator, timed by the
functions of scripts/benchmarks. Each part has a process and a time of its own, and what one leaves
of it goes to the next. Each figure is kept when it is made: a part that fails or runs out of time
costs its other figures alone. The same command again measures what is missing.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from autoregressive.models import gpt
from scripts.benchmarks import codes, evaluator, sampling, training
from scripts.benchmarks.common import describe_run
from scripts.diagnosis.acceptance_records import Records, Row, hash_of_code, is_of, read_rows
from scripts.diagnosis.acceptance_tables import TABLES, as_tables
from scripts.diagnosis.check import (
    BROKEN,
    OK,
    ROOT,
    Check,
    Context,
    Result,
    call_apart,
    reason_of,
    run_apart,
)
from utils.distributed import init_distributed
from utils.files import prepare_folder

ACCEPTANCE_MINUTES = 8.5  # starting and reporting come on top
FOLDERS = {"gpu": "scripts/benchmarks/results", "rehearsal": "results/rehearsal"}
WAYS = ("compiled", "published-compiled", "published")  # of sampling; the first is ours
TRAINED = (
    "ours, compiled, flash, attention dropout",
    "ours, compiled, attention dropout",
    "ours, compiled, flex",
    "ours, compiled, flex, full",
    "ours, compiled, flex, selective",
)
N = 4  # tokens predicted at once in training
LOG = 8000  # characters of what a failure printed
MARGIN = 3.0  # seconds to write down what tests have shown
FAILURES = ("failed", "error")  # outcomes of tests
DEVICES = {True: "cuda:0", False: "cpu"}


@dataclass(frozen=True)
class Sizes:
    """What is measured: on a GPU as released models are, in a rehearsal as small as can be."""

    sampled: dict[tuple[str, int], float]  # size and n -> seconds
    batches: tuple[int, ...]
    trained: dict[str, tuple[int, float]]  # size -> images per step, seconds
    ways: tuple[str, ...]  # of training
    precision: str
    steps: int
    tokenizer: tuple[str, int, int]  # name, side of images, images
    tokenizer_precisions: tuple[str, ...]
    evaluator_batch: int
    tests: str  # what pytest runs


# the most wanted first; together with 95 s of tests and 55 of networks 500 s
GPU = Sizes(
    sampled={
        ("GPT-3B", 4): 60.0,
        ("GPT-XL", 4): 50.0,
        ("GPT-3B", 16): 35.0,
        ("GPT-XL", 16): 30.0,
        ("GPT-B", 4): 25.0,
        ("GPT-B", 16): 20.0,
    },
    batches=(1, 64, 32),
    trained={"GPT-XL": (16, 45.0), "GPT-3B": (4, 50.0), "GPT-L": (32, 35.0)},
    ways=TRAINED,
    precision="bf16",
    steps=5,
    tokenizer=("VQ-16", 384, 16),
    tokenizer_precisions=("bf16", "tf32", "none"),
    evaluator_batch=64,
    tests="test_gpu.py",
)
REHEARSAL = Sizes(
    sampled={("GPT-T", 64): 120.0},
    batches=(1,),
    trained={"GPT-T": (1, 120.0)},
    ways=("ours, compiled, attention dropout", "ours, compiled, full"),
    precision="none",
    steps=1,
    tokenizer=("VQ-4", 32, 1),
    tokenizer_precisions=("none",),
    evaluator_batch=1,
    tests="test_gpu.py",
)


@dataclass(frozen=True)
class Job:
    """What the process of a part has."""

    work: Path  # a folder of its own
    until: float  # of ``time.monotonic``, which is the same in all processes: it is ended then


@dataclass(frozen=True)
class Part:
    """Cases that one process measures, the most wanted first."""

    name: str
    table: str  # the JSON of its rows is gpu-``table``.json
    cases: tuple[Row, ...]
    measure: Callable[[Row, Job], Row]  # a case -> its figures
    seconds: float


def list_parts(sizes: Sizes) -> list[Part]:
    """Return the parts of the run in order: tests, then by what is asked for most."""
    sampled = []
    for (size, n), seconds in sizes.sampled.items():
        shape = {"gpt_model": size, "n": n, "precision": sizes.precision}
        # ours for every batch, then one image by every way: the figures that the paper has
        pairs = [(b, WAYS[0]) for b in sizes.batches]
        pairs += [(sizes.batches[0], way) for way in WAYS[1:]]
        pairs += itertools.product(sizes.batches[1:], WAYS[1:])
        cases = tuple(shape | {"batch": batch, "way": way} for batch, way in pairs)
        sampled.append(Part(f"Sampling, {size}, n = {n}", "sampling", cases, sample, seconds))
    trained = []
    for size, (batch, seconds) in sizes.trained.items():
        shape = {"gpt_model": size, "batch": batch, "precision": sizes.precision}
        cases = tuple(shape | {"way": way, "steps": sizes.steps} for way in sizes.ways)
        trained.append(Part(f"Training, {size}", "training", cases, train, seconds))
    name, side, images = sizes.tokenizer
    coded = {"network": name, "image_size": side, "images": images}
    precisions = tuple(coded | {"precision": p} for p in sizes.tokenizer_precisions)
    inception = ({"network": "Inception", "batch": sizes.evaluator_batch},)
    tests = ({"tests": sizes.tests},)
    mixed = [p for pair in itertools.zip_longest(sampled, trained) for p in pair if p is not None]
    return [
        Part("Tests on the device", "tests", tests, run_tests, 95.0),
        *mixed[:4],
        Part("Tokenizer", "networks", precisions, code, 35.0),
        Part("Evaluator", "networks", inception, evaluate, 20.0),
        *mixed[4:],
    ]


def sample(case: Row, _: Job) -> Row:
    """Time one batch sampled with guidance, without image decoding, by one way."""
    device = init_distributed().device
    attend = gpt.attend
    shape = [case[k] for k in ("gpt_model", "n", "batch", "precision", "way")]
    # a batch of the published way takes long, and once is enough after the first case
    repeats = 0 if case["way"] == "published" and case["batch"] > 1 else 1
    try:
        figures, _ = sampling.time_batches(sampling.Case(*shape, repeats), device)
    finally:
        gpt.attend = attend
    figures["MBU"], figures["MFU"] = (
        figures[k] / figures[f"ceiling {k}"] for k in ("GB/s", "TFLOP/s")
    )
    return figures


def train(case: Row, job: Job) -> Row:
    """Time training steps by one way; half the batch, and so on, where memory does not suffice."""
    shape = {k: case[k] for k in ("gpt_model", "precision", "way", "steps")}
    batch = case["batch"]
    while True:
        folder = job.work / f"{batch}"
        if not folder.exists():
            folder.mkdir()
            training.write_codes(folder, batch * (case["steps"] + 5))
        try:
            figures = training.measure(Namespace(**shape, ar_token_num=N, batch=batch), folder)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
        else:
            return figures | {"images per step": batch, "images/s": batch / figures["seconds"]}
        clear()


def code(case: Row, _: Job) -> Row:
    """Time extraction and decoding of images by the tokenizer."""
    shape = [case[k] for k in ("network", "image_size", "images", "precision")]
    return codes.network_rates(*shape, init_distributed().device)


def evaluate(case: Row, _: Job) -> Row:
    """Time the evaluator's network."""
    args = Namespace(batch_size=case["batch"], repeats=3, compile=False)
    rates = evaluator.network_figures(args, init_distributed().device)
    return {f"{way} images/s": rate for way, rate in rates.items()}


def run_tests(case: Row, job: Job) -> Row:
    """Run the tests that need a GPU in a process of their own; each outcome is in the figures.

    Those that have ended when time is out count; ``unfinished`` is true then.
    """
    given = Path(case["tests"])
    files = sorted((ROOT / "tests").rglob(given.name)) or [given]
    log = job.work / "pytest.txt"
    words = [sys.executable, "-m", "pytest", "-o", "addopts=", "-v", "--tb=short", "-p"]
    words += ["no:cacheprovider", *map(str, files)]
    seconds, environment = job.until - time.monotonic() - MARGIN, {"PYTHONUNBUFFERED": "1"}
    with log.open("w") as output:
        to_log = dict(cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            subprocess.run(words, timeout=seconds, env=os.environ | environment, **to_log)
            ended = {}
        except subprocess.TimeoutExpired:
            ended = {"unfinished": True}
    outcomes = outcomes_of(log.read_text())
    if not outcomes:
        raise RuntimeError(f"pytest ran no test: {last_line(log)}")
    return outcomes | ended


def outcomes_of(text: str) -> Row:
    """Return the outcome of each test in what ``pytest -v`` prints, counts, and what failed."""
    lines = re.findall(r"^\S*::(\S+?(?:\[.*\])?) (PASSED|FAILED|ERROR|SKIPPED)\b", text, re.M)
    outcomes = {name: outcome.lower() for name, outcome in lines}
    counts = {k: list(outcomes.values()).count(k) for k in set(outcomes.values())}
    reasons = re.search(r"^=+ (FAILURES|ERRORS) =.*", text, re.M | re.S)
    failures = {"failures": reasons[0][-LOG:]} if reasons else {}
    return counts | {"outcomes": outcomes} | failures if outcomes else {}


def last_line(path: Path) -> str:
    return ([line for line in path.read_text().splitlines() if line.strip()] or ["no output"])[-1]


def clear() -> None:
    """Free what an earlier case has left: memory of the device, compiled code."""
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def run_cases(_: Context, part: Part, cases: list[Row], rows: Path, job: Job) -> Result:
    """Measure ``cases`` one after the other, and append a line to ``rows`` for each at once."""
    for case in cases:
        started = time.perf_counter()
        try:
            row = case | part.measure(case, job)
        except Exception as error:  # the next case may work
            row = case | {"error": reason_of(error), "log": traceback.format_exc()[-LOG:]}
        row["took"] = round(time.perf_counter() - started, 1)
        with rows.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        clear()
    return Result(OK, "")


def run_part(
    part: Part, records: Records, device: str, options: Row, until: float
) -> tuple[bool, list[str]]:
    """Run a part until ``until`` (of ``time.monotonic``), and record what it has measured.

    Returns whether nothing failed, and lines for the screen.
    """
    before = records.rows(part.table)
    missing = [case for case in part.cases if not any(is_of(row, case) for row in before)]
    if not missing:
        return True, [f"{part.name}: all measured before"]
    with tempfile.TemporaryDirectory(prefix="par-accept-", ignore_cleanup_errors=True) as work:
        rows, job = Path(work) / "rows.jsonl", Job(Path(work), until)
        measure = partial(run_cases, part=part, cases=missing, rows=rows, job=job)
        check = Check("", part.name, measure, "", device, limit=math.inf)
        context = Context(Namespace(**options), ROOT / "tests" / "golden", Path(work), device)
        result = run_apart(check, context, until - time.monotonic())
        made = read_rows(rows)
    records.add(part.table, made, options)
    measured = sum("error" not in row for row in made)
    lines = [f"{part.name}: {measured} of {len(missing)} cases in {result.seconds:.0f} s"]
    lines += [f"failed: {words_of(row)}: {row['error']}" for row in made if "error" in row]
    for row in made:
        outcomes = row.get("outcomes", {}).items()
        lines += [f"failed: {name}" for name, outcome in outcomes if outcome in FAILURES]
    if result.status != OK:
        lines.append(f"{result.status}: {result.detail}")
    failed = result.status == BROKEN or any(line.startswith("failed") for line in lines)
    return not failed, lines


def words_of(row: Row) -> str:
    """Return the case of a row in words."""
    return ", ".join(f"{v}" for k, v in row.items() if k not in ("error", "took", "log"))


def accept(options: Namespace) -> bool:
    """Run all parts, write tables; return whether nothing failed (what had no time is no failure).

    ``options.acceptance``: ``gpu`` or ``rehearsal``, as small as can be and on any device.
    """
    started = time.monotonic()
    rehearsal = options.acceptance == "rehearsal"
    folder = Path(options.output or FOLDERS[options.acceptance])
    prepare_folder(folder, "--output")
    on_gpu = call_apart(torch.cuda.is_available, (), 60)
    if not (on_gpu or rehearsal):
        raise ValueError("--acceptance gpu: torch finds no GPU; --acceptance rehearsal needs none")
    run = call_apart(describe_run, (), 60) | {"code": hash_of_code()}
    records, parts = Records(folder, run), list_parts(REHEARSAL if rehearsal else GPU)
    seconds = 60 * (options.minutes or ACCEPTANCE_MINUTES)
    machine = f"{run['device']}, commit {run['git']}"
    print(f"{machine}: {len(parts)} parts in {seconds:.0f} s", flush=True)
    fine, planned, total = True, started, sum(part.seconds for part in parts)
    for number, part in enumerate(parts, 1):
        planned += seconds * part.seconds / total  # one that ends earlier leaves time to the next
        went_well, lines = run_part(part, records, DEVICES[on_gpu], vars(options), planned)
        fine = fine and went_well
        print(f"[{number:2}/{len(parts)}] " + "\n        ".join(lines), flush=True)
    tables = as_tables({name: records.rows(name) for name in TABLES})
    page = folder / "gpu-acceptance.md"
    page.write_text(f"# Acceptance run\n\n{machine}\n\n{tables}\n")
    taken = time.monotonic() - started
    print(f"\n{tables}\n\n{taken:.0f} s; the tables are in {page}, their figures beside it")
    return fine
