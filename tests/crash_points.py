"""Kill a command right before its k-th file operation, run it again, compare what it leaves.

    python -m tests.crash_points WORK STAGE... [--points N] [--ranks N]

WORK: an empty folder for data and results. Without ``--points`` every operation is tried. An
operation is each creation, write, rename, link, truncation and deletion of a file below the
stage's folder. The processes are forks of this one, which has imported everything and computed
nothing, so a run takes a fraction of a second. With ``--ranks 2`` both processes are killed, at
the k-th operation of both together. What C++ and Rust write (``torch.save``, ``save_file``) is
one creation here: their targets are temporary names.
"""

from __future__ import annotations

import argparse
import builtins
import hashlib
import io
import os
import pathlib
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

COUNTED = ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
TIMEOUT = 120.0


@dataclass
class Stage:
    """A command: its ``main``, its options for an output folder, and how to prepare that folder."""

    main: Callable[[], None]
    words: Callable[[Path], tuple[object, ...]]
    prepare: Callable[[Path], None] = lambda _: None


class Counter:
    """Counts file operations below ``root`` in all processes; kills their group before one."""

    def __init__(self, root: Path, ledger: Path, kill_at: int | None):
        self.root, self.kill_at = str(root), kill_at
        self.ledger = os.open(ledger, os.O_RDWR | os.O_CREAT | os.O_APPEND)

    def count(self, what: str, path: object) -> None:
        """Count an operation about to be done; ``path``: of its file."""
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        name = os.path.abspath(os.fsdecode(path))
        if not name.startswith(self.root) or name.endswith(".lock"):
            return
        os.write(self.ledger, b"%-150s\n" % f"{what} {name[len(self.root) :]}"[:150].encode())
        if os.lseek(self.ledger, 0, os.SEEK_CUR) // 151 == self.kill_at:
            os.killpg(0, signal.SIGKILL)
            time.sleep(60)

    def watch(self) -> None:
        """Count from now on, in this process."""

        def hook(event: str, args: tuple[Any, ...]) -> None:
            if event == "open":
                path, _, flags = args
                if isinstance(flags, int) and flags & (os.O_CREAT | os.O_TRUNC):
                    self.count("open", path)
            elif event in COUNTED and not isinstance(args[0], int):
                folder = args[1] if event in ("os.remove", "os.rmdir") else -1
                folder = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else ""
                self.count(event, os.path.join(folder, os.fsdecode(args[0])))

        sys.addaudithook(hook)
        counter, real = self, io.open

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                counter.count("write", self.name)
                return super().write(data)

        def counted(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any):
            text = os.fspath(file) if isinstance(file, (str, os.PathLike)) else ""
            ours = text.startswith(counter.root) and set(mode) & set("wax+")
            if not ours or named.get("opener"):
                return real(file, mode, buffering, *rest, **named)
            raw = Raw(text, mode.replace("b", ""))
            buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding="utf-8")

        io.open = builtins.open = counted
        if sys.version_info < (3, 11):  # pathlib has its own reference there
            pathlib._NormalAccessor.open = staticmethod(counted)
        for name in ("write", "pwrite"):  # by descriptor
            setattr(os, name, partial(self._write, getattr(os, name)))

    def _write(self, real: Callable[..., int], file: int, *rest: Any) -> int:
        self.count("write", os.readlink(f"/proc/self/fd/{file}"))
        return real(file, *rest)


def run(stage: Stage, folder: Path, ranks: int, ledger: Path, kill_at: int | None) -> int:
    """Run a stage in forks of this process; return 0, or the first exit status that is not."""
    ledger.unlink(missing_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children: list[int] = []
    all_there, started = os.pipe()
    for rank in range(ranks):
        if pid := os.fork():
            children.append(pid)
            os.setpgid(pid, children[0])
            continue
        os.setpgid(0, children[0] if children else 0)
        os.close(started)
        os.read(all_there, 1)  # ends once all are forked, so that all are in the group to be killed
        _child(stage, folder, rank, ranks, port, Counter(folder, ledger, kill_at))
    os.close(all_there)
    os.close(started)
    deadline = time.monotonic() + TIMEOUT
    status = 0
    for pid in children:
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.killpg(children[0], signal.SIGKILL)
            time.sleep(0.005)
        status = status or ended[1]
    return status


def _child(stage: Stage, folder: Path, rank: int, ranks: int, port: int, counter: Counter) -> None:
    """Run the command in this fork, and end it."""
    import torch

    from utils.options import run_main

    status = 1
    try:
        torch.set_num_threads(1)  # makes torch's pool anew; autograd's threads may clash over that
        output = os.open(f"{folder}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        sys.argv = ["command", *map(str, stage.words(folder))]
        counter.watch()
        run_main(stage.main)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def contents(folder: Path) -> dict[str, str]:
    """Return hashes of all files, of weights by their tensors; logs by their names alone."""
    from utils.checkpoints.weights_file import content_sha256, load_checkpoint

    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if "tensorboard" in name:
            continue
        shard = (path.parent / "meta.json").exists()  # of a checkpoint: written by us, in order
        if path.suffix in (".pt", ".safetensors") and not shard:
            found[name] = content_sha256(load_checkpoint(path, ""))
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def try_points(
    stage: Stage, work: Path, ranks: int = 1, points: int | None = None
) -> tuple[int, int, list[str]]:
    """Return the number of operations, of those tried, and what went wrong at which."""
    folder, ledger = work / "out", work / "ledger"
    references = []
    for number in range(2):  # what differs between two undisturbed runs, as a date, is not compared
        time.sleep(number)  # times are recorded in seconds: those of both runs must differ
        shutil.rmtree(folder, ignore_errors=True)
        stage.prepare(folder)
        if status := run(stage, folder, ranks, ledger, None):
            return 0, 0, [f"undisturbed: {status}: {Path(f'{folder}.txt').read_text()[-2000:]}"]
        references.append(contents(folder))
    one, two = references
    compared = {k: v for k, v in one.items() if two.get(k) == v}
    total = ledger.stat().st_size // 151
    chosen = range(1, total + 1)
    if points is not None and points < total:
        chosen = np.unique(np.linspace(1, total, points).astype(int)).tolist()

    wrong: list[str] = []
    tried = 0
    for k in chosen:
        shutil.rmtree(folder, ignore_errors=True)
        stage.prepare(folder)
        killed = run(stage, folder, ranks, ledger, k)
        what = (ledger.read_bytes()[151 * (k - 1) :][:151]).decode().strip()
        if killed & 0x7F != signal.SIGKILL:  # operations of two ranks may become fewer
            continue
        tried += 1
        if status := run(stage, folder, ranks, ledger, None):
            text = Path(f"{folder}.txt").read_text()[-300:]
            wrong.append(f"{k} ({what}): the rerun ends with {status}: {text}")
            continue
        after = contents(folder)
        if names := sorted(after.keys() ^ one.keys()):
            wrong.append(f"{k} ({what}): left over or missing: {', '.join(names[:3])}")
        elif names := [n for n, v in compared.items() if after[n] != v]:
            wrong.append(f"{k} ({what}): differs: {', '.join(names[:3])}")
    return total, tried, wrong


NEEDS = {
    "ddp": ("codes",), "fsdp": ("codes",), "sample": ("codes", "gpt"), "export": ("codes", "gpt"),
    "hub": ("codes", "gpt"), "evaluate": ("codes", "gpt", "samples"),
}  # fmt: skip


def stages(work: Path, names: Sequence[str] = ()) -> dict[str, Stage]:
    """Write the data of the stages of ``names`` (default: all) to ``work``, by undisturbed runs;
    return the stages.
    """
    # once, instead of in every fork
    import torch
    import torchmetrics.functional.image  # noqa: F401

    from autoregressive.sample import sample_c2i_ddp
    from autoregressive.train import extract_codes_c2i, train_c2i
    from evaluations.c2i import evaluator
    from evaluations.c2i.classifier import ClassifierConfig, SmallClassifier, save_classifier
    from scripts import convert_codes, export_checkpoint
    from tests import helpers
    from tests.tokenizer.helpers import words as tokenizer_words
    from tokenizer import reconstruct_vq, train_vq

    torch.set_num_threads(1)  # a fork waits for ever for OpenMP's threads, which it does not have
    helpers.write_images_and_tokenizer(work)
    network = SmallClassifier(ClassifierConfig(image_size=24, num_classes=3))
    save_classifier(work / "classifier.pt", network, ["ape", "bee", "cat"])

    def train_words(folder: Path, *options: object) -> tuple[object, ...]:
        return (
            *helpers.train_words(work, folder / "cloud"), "--epochs", 1, "--ckpt-every", 1,
            "--keep-last", 2, "--ema", *options,
        )  # fmt: skip

    def twice(folder: Path) -> tuple[object, ...]:
        words = [w for w in train_words(folder) if w != "--no-local-save"]
        return (*words, "--results-dir", folder / "local")

    gpt = work / "gpt" / "cloud" / helpers.GPT_RUN / "checkpoints"
    samples = work / "samples"
    vq = ("--vq-ckpt", work / "vq.pt")

    def sample_words(folder: Path) -> tuple[object, ...]:
        return (
            *vq, "--gpt-ckpt", gpt / "0000003.pt", "--sample-dir", folder, "--image-size-eval", 24,
            "--num-fid-samples", 10, "--per-proc-batch-size", 4, "--precision", "none",
            "--no-compile",
        )  # fmt: skip

    def copy_samples(folder: Path) -> None:
        folder.mkdir()
        for path in samples.glob("*.npz"):
            shutil.copy(path, folder / "samples.npz")

    def write_jsonl(folder: Path) -> None:
        folder.mkdir()
        rows = "".join(f'{{"class_id": {i % 3}, "tokens": {[i] * 16}}}\n' for i in range(9))
        (folder / "old.jsonl").write_text(rows)

    made = {
        "extract": Stage(
            extract_codes_c2i.main,
            lambda f: (*helpers.extract_words(work, f), "--num-workers", 0),
        ),
        "ddp": Stage(train_c2i.main, twice),
        "fsdp": Stage(train_c2i.main, lambda f: train_words(f, "--data-parallel", "fsdp")),
        "tokenizer": Stage(
            train_vq.main, lambda f: tokenizer_words(work, f, "--ckpt-every", 1, "--ema")
        ),
        "sample": Stage(sample_c2i_ddp.main, sample_words),
        "reconstruct": Stage(
            reconstruct_vq.main,
            lambda f: (
                *vq, "--data-path", work / "images", "--sample-dir", f, "--num-workers", 0,
                "--image-size", 32, "--image-size-eval", 32, "--per-proc-batch-size", 5,
            ),
        ),
        "evaluate": Stage(
            evaluator.main,
            lambda f: (
                f / "samples.npz", f / "samples.npz", "--feature-network", work / "classifier.pt",
            ),
            copy_samples,
        ),
        "export": Stage(
            export_checkpoint.main,
            lambda f: ("--checkpoint", gpt / "0000003", "--output", f / "a.pt"),
        ),
        "hub": Stage(
            export_checkpoint.main, lambda f: ("--checkpoint", gpt / "0000003", "--hub", f / "a")
        ),
        "convert": Stage(
            convert_codes.main,
            lambda f: (
                "--code-path", f / "old.jsonl", "--output", f / "codes", "--codebook-size", 64,
                "--shard-size", 4,
            ),
            write_jsonl,
        ),
    }  # fmt: skip
    needed = {need for name in names or made for need in NEEDS.get(name, ())}
    for stage, need in (
        (made["extract"], "codes"),
        (Stage(train_c2i.main, train_words), "gpt"),
        (made["sample"], "samples"),
    ):
        if need in needed and (status := run(stage, work / need, 1, work / "ledger", None)):
            raise RuntimeError(f"{status}: {(work / f'{need}.txt').read_text()[-2000:]}")
    return {name: made[name] for name in names or made}


def main() -> None:
    """Try the points of each stage and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, help="empty folder for data and results")
    parser.add_argument("stages", nargs="*", help="stages to try (default: all)")
    parser.add_argument("--points", type=int, help="points per stage (default: every operation)")
    parser.add_argument("--ranks", type=int, default=1, help="processes")
    args = parser.parse_args()
    known = stages(args.work.absolute(), args.stages)
    print("| stage | operations | tried | wrong | seconds |\n|---|---|---|---|---|", flush=True)
    failed = 0
    for name in known:
        started = time.perf_counter()
        total, tried, wrong = try_points(known[name], args.work.absolute(), args.ranks, args.points)
        seconds = time.perf_counter() - started
        print(f"| {name} | {total} | {tried} | {len(wrong)} | {seconds:.1f} |", flush=True)
        for line in wrong:
            print(f"  {line}", flush=True)
        failed += len(wrong)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
