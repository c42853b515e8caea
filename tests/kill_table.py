"""What processes and disks do to a run, stage by stage, in two processes: a Markdown table.

    python -m tests.kill_table WORK [STAGE ...] [--kills N] [--seed S]

WORK: an empty folder. Each stage runs on tiny data, is disturbed, and the same command is run
again. What it leaves must be what two undisturbed runs have in common, with no file more or less.
The faults: SIGKILL of all processes at random moments, the command twice at once, its launcher
killed while the ranks live on, one rank killed, a disk that is full, a disk that cannot be written
to. The disks are small tmpfs mounts, which take root.

Launcher, rendezvous and gloo are the real ones. What torchrun starts is not a new Python but a fork
of this one, which has imported everything: a run takes a second instead of ten. Export and
conversion have one run.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import crash_points
from tests.crash_points import Stage, contents
from tests.forks import HANDLED, Fork, adopt_orphans, descendants, kill_all

ALONE = ("export", "hub", "convert")  # have one process
PAGE = 4096  # bytes: what tmpfs takes for a file at least


def launch(stage: Stage, words: list[str], ranks: int, work: Path) -> None:
    """Run the stage under torchrun as launch.sh does, or in this run if it has one rank."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    from utils import launcher
    from utils.options import run_main

    sys.argv = ["command", *words]
    if ranks == 1:
        return run_main(stage.main)

    def rank(env: dict[str, str]) -> None:
        os.environ.update(env)
        (work / f"rank-{env['RANK']}").write_text(str(os.getpid()))
        sys.argv = ["command", *words]
        run_main(stage.main)

    def popen(args: object, env: dict[str, str], **_: Any) -> Fork:
        return Fork(lambda: rank(env))

    subprocess_handler.Popen = popen
    os.environ |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PET_SHUTDOWN_TIMEOUT": "600"}
    os.environ["PET_SIGNALS_TO_HANDLE"] = ",".join(number.name for number in HANDLED)
    torchrun = ["--nnodes", "1", "--nproc_per_node", str(ranks), "--standalone", "stage.py"]
    sys.argv = ["torchrun", *torchrun, *words]
    return launcher.main()


@dataclass
class Result:
    """What came of a fault: runs disturbed, reruns compared, what differed, what was said."""

    tried: int
    compared: int
    wrong: list[str]
    said: str = ""


class Trial:
    """One stage, its reference, and ways to run it."""

    def __init__(self, name: str, stage: Stage, work: Path, seed: int):
        self.name, self.stage, self.work = name, stage, work
        self.ranks = 1 if name in ALONE else 2
        self.outputs: dict[int, Path] = {}
        self.random = random.Random(f"{seed} {name}")
        self.disk = work / "disk"
        self.folder = self.disk / "out"
        self.disk.mkdir(exist_ok=True)
        self.prepare()
        self.before = self.names()
        self.empty_pages = self.pages()

        one = self.undisturbed()
        self.full_pages = self.pages()
        time.sleep(1)  # times are recorded in seconds: what differs for them is not compared
        two = self.undisturbed()
        self.expected, self.compared = one.keys(), {k: v for k, v in one.items() if two[k] == v}

    def undisturbed(self) -> dict[str, str]:
        """Run to the end; return what it leaves, note how long it writes."""
        self.prepare()
        run = self.start()
        self.wait_until_it_writes(run)
        began = time.monotonic()
        if status := self.end(run):
            raise RuntimeError(f"{self.name}, undisturbed: {status}: {self.said(run)}")
        self.seconds = time.monotonic() - began
        return contents(self.folder)

    def prepare(self) -> None:
        """Make the folder as it is before the first run."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.stage.prepare(self.folder)

    def names(self) -> set[Path]:
        """Return all paths below the folder."""
        with suppress(OSError):  # deleted while we look
            return set(self.folder.rglob("*"))
        return set()

    def pages(self) -> int:
        """Return the pages that the folder takes on a tmpfs."""
        files = [p for p in self.names() if p.is_file()]
        return sum(-(-p.stat().st_size // PAGE) for p in files)

    def start(self) -> Fork:
        """Start the command."""
        words = [str(word) for word in self.stage.words(self.folder)]
        output = self.work / f"{self.name}-{time.monotonic_ns()}.txt"

        def action() -> None:
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            launch(self.stage, words, self.ranks, self.work)

        run = Fork(action)
        self.outputs[run.pid] = output
        return run

    def wait_until_it_writes(self, run: Fork) -> None:
        """Return once the run has made a file, or has ended."""
        while run.poll() is None and self.names() == self.before:
            time.sleep(0.01)

    def end(self, run: Fork) -> int:
        """Wait for the run, return its exit status."""
        try:
            return run.wait()
        except subprocess.TimeoutExpired:
            kill_all()
            raise RuntimeError(f"{self.name} hangs: {self.said(run)}") from None

    def said(self, run: Fork) -> str:
        """Return the last error that a run printed, and whether a traceback was among the rest."""
        text = self.outputs[run.pid].read_text()
        errors = re.findall(r"(?:error|stopped by).*", text.replace("\r", "\n"))
        causes = [line for line in errors if "another process has ended" not in line]
        last = (causes or errors or ["nothing"])[-1]
        last = last.replace(str(self.folder), "OUT").replace("|", "/")
        return last + (" **after a traceback**" if "Traceback" in text else "")

    def compare(self) -> list[str]:
        """Return how the folder differs from what an undisturbed run leaves."""
        after = contents(self.folder)
        wrong = [f"left over: {name}" for name in sorted(after.keys() - self.expected)]
        wrong += [f"missing: {name}" for name in sorted(self.expected - after.keys())]
        same = self.compared.keys() & after.keys()
        return wrong + [f"differs: {k}" for k in sorted(same) if after[k] != self.compared[k]]

    def rerun(self) -> list[str]:
        """Run the command to its end; return what is wrong then."""
        run = self.start()
        if status := self.end(run):
            return [f"the rerun ends with {status}: {self.said(run)}"]
        return self.compare()

    def sleep(self) -> None:
        """Wait for a random part of what a run takes after its first file."""
        time.sleep(self.random.uniform(0, self.seconds))


def kills(trial: Trial, count: int) -> Result:
    """Kill all processes at ``count`` random moments; every other rerun is killed too.

    ``RuntimeError`` if most runs have ended before the kill.
    """
    result, late = Result(0, 0, []), 0
    trial.prepare()
    while result.tried < count:
        if late > 4 * count:
            raise RuntimeError(f"{late} runs ended before they could be killed")
        run = trial.start()
        trial.wait_until_it_writes(run)
        trial.sleep()
        running = run.poll() is None
        kill_all()
        result.tried += running
        late += not running
        if not running or result.tried == count or trial.random.random() < 0.5:
            result.compared += 1
            result.wrong += trial.rerun()
            trial.prepare()
    return result


def twice(trial: Trial) -> Result:
    """Start the command twice at once."""
    trial.prepare()
    both = [trial.start(), trial.start()]
    statuses = [trial.end(run) for run in both]
    said = [f"exit {s}: {trial.said(p)}" for s, p in zip(statuses, both, strict=True) if s]
    wrong = trial.compare() if 0 in statuses else ["neither run ended well"]
    return Result(1, 1, wrong, "; ".join(said) or "both end well")


def launcher(trial: Trial) -> Result:
    """Kill the launcher alone; run the command again while the ranks live."""
    trial.prepare()
    run = trial.start()
    trial.wait_until_it_writes(run)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    living = len(descendants())
    wrong = trial.rerun()
    kill_all()
    return Result(1, 1, wrong, f"{living} ranks lived on")


def one_rank(trial: Trial) -> Result:
    """Kill the second rank alone."""
    trial.prepare()
    run = trial.start()
    trial.wait_until_it_writes(run)
    os.kill(int((trial.work / "rank-1").read_text()), signal.SIGKILL)
    status = trial.end(run)
    said = f"exit {status}: {trial.said(run)}"
    return Result(1, 1, trial.rerun(), said)


@contextmanager
def small_disk(folder: Path, pages: int):
    """Mount a tmpfs of so many pages; yields what remounts it with other options."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={pages * PAGE}", "tmpfs", str(folder)]
    subprocess.run(mount, check=True)

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)

    try:
        yield remount
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def disk_full(trial: Trial) -> Result:
    """Run where half of what a run writes fits, or less if that is enough; then with room."""
    room = trial.full_pages - trial.empty_pages
    for part in (2, 8, room + 1):  # the last leaves nothing
        shutil.rmtree(trial.folder, ignore_errors=True)
        with small_disk(trial.disk, trial.empty_pages + room // part) as remount:
            trial.prepare()
            run = trial.start()
            if status := trial.end(run):
                remount("size=1g")
                said = f"exit {status}: {trial.said(run)}"
                return Result(1, 1, trial.rerun(), said)
    return Result(1, 0, ["it ends well on a full disk"])


def read_only(trial: Trial) -> Result:
    """Run where nothing can be written, then where it can."""
    shutil.rmtree(trial.folder, ignore_errors=True)
    with small_disk(trial.disk, 1 << 18) as remount:
        trial.prepare()
        remount("ro")
        run = trial.start()
        status = trial.end(run)
        said = f"exit {status}: {trial.said(run)}"
        remount("rw")
        return Result(1, 1, trial.rerun(), said)


FAULTS: dict[str, Callable[[Trial], Result]] = {
    "twice at once": twice,
    "launcher killed": launcher,
    "one rank killed": one_rank,
    "disk full": disk_full,
    "read-only": read_only,
}


def try_stage(trial: Trial, count: int) -> int:
    """Print a row for each fault; return how many went wrong."""
    faults = {f"{count} kills": lambda t: kills(t, count)} if count else {}
    faults |= {k: v for k, v in FAULTS.items() if trial.ranks > 1 or v not in (launcher, one_rank)}
    failed = 0
    for fault, cause in faults.items():
        try:
            result = cause(trial)
        except RuntimeError as error:
            result = Result(1, 1, [str(error)])
        equal = "all" if not result.wrong else "**no**"
        said = "; ".join([result.said, *result.wrong[:4]]).strip("; ")
        print(f"| {trial.name} | {fault} | {result.compared} | {equal} | {said} |", flush=True)
        failed += bool(result.wrong)
    return failed


def main() -> None:
    """Try each stage and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="empty folder for data and results")
    parser.add_argument("stages", nargs="*", help="as of crash_points (default: all)")
    parser.add_argument("--kills", type=int, default=20, help="random moments per stage")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    work = args.work.absolute()
    adopt_orphans()
    print("| stage | fault | reruns | equal | last words |\n|---|---|---|---|---|", flush=True)
    stages = crash_points.stages(work, args.stages)
    trials = (Trial(name, stage, work, args.seed) for name, stage in stages.items())
    sys.exit(1 if sum(try_stage(trial, args.kills) for trial in trials) else 0)


if __name__ == "__main__":
    main()
