"""Damage files in seeded ways, read each by what the commands read it by, judge what comes of it.

    python -m tests.fuzz WORK [--kind shard] [--cases 200] [--seed 0] [--first 0]

A case is one damaged file: flipped or random bytes, a cut, a run of zeros, an absurd size, or, with
its checksums made right again as an attacker would, a value of a wrong type or sign in its JSON or
header. It must end in a ``ValueError`` or ``OSError`` of one line that names the file, which
``run_main`` prints, or in the result of the whole file. Cases run in forks of this process with
little memory and time: one that crashes, hangs or allocates by a header's word is found too.
``tests/fuzz_kinds.py`` has the kinds of files.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

SECONDS = 30.0  # for a case
GOOD = ("error", "right", "other")
DEEP = "[" * 100_000
# of no right type, sign or size for any number, name, list or object
WRONG = (None, True, -1, 1.5, "x", "", [], {}, [None], {"x": 1}, 1 << 36, 10**30, float("nan"))
SIZES = (0xFFFFFFFF, 0x7FFFFFFF, 1 << 30, (1 << 63) - 1, 1 << 36, (1 << 64) - 1)


@dataclass
class Kind:
    """A kind of file, how it is read, and what is damaged.

    ``read`` gets a copy of the folder; ``damaged``: patterns of the files to damage; ``reseal``
    writes a wrong value under right checksums and says which, or None where that cannot be done.
    ``unsealed``: why other content than was written may be taken.
    """

    folder: Path
    read: Callable[[Path], object]
    damaged: tuple[str, ...]
    reseal: Callable[[np.random.Generator, Path], str] | None = None
    unsealed: str = ""
    memory: int = 1 << 28
    expected: str = field(init=False, default="")


def damage_bytes(rng: np.random.Generator, data: bytes) -> tuple[str, bytes]:
    """Return what was done to ``data``, and the result, which differs from it."""
    size = len(data)
    if size == 0:
        return "appended", b"\0"
    # headers and tables of contents are at the ends of a file
    place = int(rng.integers(size))
    if rng.random() < 0.5:
        place = int(rng.integers(min(size, 512)))
        place = place if rng.random() < 0.5 else size - 1 - place
    way = rng.choice(["flip", "bytes", "cut", "zeros", "size"])
    damaged = bytearray(data)
    if way == "flip":
        damaged[place] ^= 1 << int(rng.integers(8))
    elif way == "bytes":
        count = int(rng.integers(1, 65))
        damaged[place : place + count] = rng.bytes(len(damaged[place : place + count]))
    elif way == "cut":
        del damaged[place:]
    elif way == "zeros":
        count = int(rng.integers(1, 513))
        damaged[place : place + count] = bytes(len(damaged[place : place + count]))
    else:
        width, order = int(rng.choice([4, 8])), rng.choice(["little", "big"])
        number = (int(rng.choice(np.array(SIZES, object))) % (1 << 8 * width)).to_bytes(
            width, str(order)
        )
        damaged[place : place + width] = number[: max(0, size - place)]
    if damaged == data:
        damaged[place] ^= 0xFF
    return f"{way} at {place} of {size}", bytes(damaged)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value inside a JSON value; of a long list, of a few."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for i in range(0, len(value), max(1, len(value) // 3)):
            yield from places(value[i], (*path, i))


def damage_json(rng: np.random.Generator, value: Any) -> tuple[str, Any]:
    """Return what was done to a copy of a JSON value, and that copy: a field of another type, sign
    or size, or without it.
    """
    value = copy.deepcopy(value)
    found = list(places(value))
    path = found[int(rng.integers(len(found)))]
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    old = holder[path[-1]]
    wrong = [w for w in WRONG if not _fits(w, old)]
    chosen = int(rng.integers(len(wrong) + 1))
    if chosen == len(wrong):
        del holder[path[-1]]
        return f"{path} left out", value
    holder[path[-1]] = wrong[chosen]
    return f"{path} = {wrong[chosen]!r}", value


def _fits(wrong: Any, old: Any) -> bool:
    """Return whether a value may well stand in the place of ``old``."""
    if isinstance(old, float):
        return type(wrong) in (int, float) and 0 <= wrong < 1e15
    if isinstance(old, str):
        return isinstance(wrong, str)
    if isinstance(old, dict):  # of another object, all facts are left out
        return isinstance(wrong, dict)
    return wrong == old and (wrong is None or isinstance(old, list))


def digest(value: Any) -> str:
    """Return a hash of arrays, tensors and what JSON can hold."""
    hasher = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            hasher.update(f"{part.dtype} {tuple(part.shape)}".encode())
            part = part.detach().contiguous().flatten().view(torch.uint8).numpy()
        if isinstance(part, np.ndarray):
            hasher.update(f"{part.dtype} {part.shape}".encode() + part.tobytes())
        elif isinstance(part, dict):
            for key in sorted(part, key=str):
                hasher.update(f"{key}:".encode())
                add(part[key])
        elif isinstance(part, list | tuple):
            hasher.update(f"{len(part)} ".encode())
            for inner in part:
                add(inner)
        else:
            hasher.update(f"{type(part).__name__} {part!r} ".encode())

    add(value)
    return hasher.hexdigest()


def judge(kind: Kind, folder: Path) -> tuple[str, str]:
    """Read a damaged copy; return "error", "right", "other" (by design), or what is bad, and why.

    Without ``kind.expected``, the second is the hash of the result.
    """
    try:
        result = digest(kind.read(folder))
    except (ValueError, OSError) as error:
        text, cause = str(error), error
        while cause is not None:
            if isinstance(cause, MemoryError) or "allocate memory" in str(cause):
                return "allocation", text
            cause = cause.__cause__ or cause.__context__
        clear = text.strip() and "\n" not in text and len(text) < 1000 and str(folder) in text
        return ("error" if clear else "unclear"), f"{type(error).__name__}: {text}"
    except MemoryError as error:
        return "allocation", str(error)
    except BaseException as error:
        return "traceback", f"{type(error).__name__}: {error}"
    if result == kind.expected or not kind.expected:
        return "right", result
    return ("other" if kind.unsealed else "wrong"), ""


def damage(kind: Kind, rng: np.random.Generator, folder: Path) -> str:
    """Damage one file of a copy of a kind's folder; return what was done."""
    if kind.reseal is not None and rng.random() < 0.5:
        return kind.reseal(rng, folder)
    files = sorted(p for pattern in kind.damaged for p in folder.glob(pattern))
    path = files[int(rng.integers(len(files)))]
    if path.suffix == ".json" and rng.random() < 0.3:
        if rng.random() < 0.1:
            path.write_text(DEEP)
            return f"{path.name}: deep"
        what, value = damage_json(rng, json.loads(path.read_text()))
        path.write_text(json.dumps(value))
    else:
        what, data = damage_bytes(rng, path.read_bytes())
        path.write_bytes(data)
    return f"{path.name}: {what}"


def _child(name: str, kind: Kind, seed: int, cases: range, work: Path, output: int) -> None:
    """Run cases in this fork; write a line as each begins, and one as it ends."""
    torch.set_num_threads(1)  # other threads did not survive the fork
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + kind.memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    folder = work / "case"
    for case in cases:
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), case])
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(kind.folder, folder)
        what = damage(kind, rng, folder) if kind.expected else ""
        os.write(output, json.dumps([case, what]).encode() + b"\n")
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        verdict, why = judge(kind, folder)
        if verdict == "wrong" and what.endswith("left out"):
            verdict = "other"  # as a file of an earlier version, without that fact
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(output, json.dumps([case, verdict, why[:1500]]).encode() + b"\n")


def run(name: str, kind: Kind, seed: int, cases: range, work: Path) -> list[tuple[str, str, str]]:
    """Return verdict, damage and reason of each case."""
    results: list[tuple[str, str, str]] = []
    while len(results) < len(cases):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(reading)
                _child(name, kind, seed, cases[len(results) :], work, writing)
            finally:
                os._exit(0)
        os.close(writing)
        what = None
        with open(reading) as lines:
            for line in lines:
                _, *rest = json.loads(line)
                if len(rest) == 1:
                    (what,) = rest
                else:
                    results.append((rest[0], str(what), rest[1]))
                    what = None
        _, status = os.waitpid(pid, 0)
        if what is not None or len(results) < len(cases):  # ended in the midst of a case
            number = status & 0x7F
            verdict = "hang" if number == signal.SIGALRM else "crash"
            results.append((verdict, str(what), f"status {status}"))
    return results


def try_kind(
    name: str, kind: Kind, seed: int, cases: range, work: Path
) -> tuple[Counter[str], list[str]]:
    """Return how many cases ended how, and a line for each that ended badly."""
    ((verdict, _, kind.expected),) = run(name, kind, seed, range(1), work)
    if verdict != "right":
        return Counter([verdict]), [f"{name}, undamaged: {verdict}: {kind.expected}"]
    results = run(name, kind, seed, cases, work)
    bad = [
        f"{name}, case {case}: {verdict}: {what}: {why}"
        for case, (verdict, what, why) in zip(cases, results, strict=True)
        if verdict not in GOOD
    ]
    return Counter(verdict for verdict, *_ in results), bad


def main() -> None:
    """Try the cases of each kind and print a table."""
    from tests.fuzz_kinds import make_kinds

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="empty folder for data and results")
    parser.add_argument("--kind", default="", help="kinds whose name begins so (default: all)")
    parser.add_argument("--cases", type=int, default=100, help="cases per kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0, help="of the damages")
    args = parser.parse_args()
    kinds, failed = make_kinds(args.work.absolute()), 0
    columns = ("clear error", "right result", "other, by design", "bad", "seconds")
    print(f"| kind | cases | {' | '.join(columns)} |\n|---|{'---|' * 6}", flush=True)
    for name, kind in kinds.items():
        if not name.startswith(args.kind):
            continue
        started = time.perf_counter()
        cases = range(args.first, args.first + args.cases)
        counts, bad = try_kind(name, kind, args.seed, cases, args.work.absolute())
        failed += len(bad)
        numbers = [counts.total(), *(counts[k] for k in GOOD), len(bad)]
        seconds = time.perf_counter() - started
        print(f"| {name} | {' | '.join(map(str, numbers))} | {seconds:.0f} |", flush=True)
        for line in bad:
            print(f"  {line}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
