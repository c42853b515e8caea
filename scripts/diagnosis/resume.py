"""Whether the real training command resumes and shards: a tiny GPT on random codes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from autoregressive.train import train_c2i
from dataset.shards import CodesPlan, finish_codes, start_codes, write_shard
from scripts.diagnosis.check import BROKEN, OK, ROOT, Context, Result, short
from utils.checkpoints.folder import read_sharded

STEPS, RESUMED_AT, BATCH = 6, 2, 8
RUN = "GPT-T-4x-32"  # the run's folder
OPTIONS = [
    "--gpt-model",
    "GPT-T",
    "--ar-token-num",
    4,
    "--global-batch-size",
    BATCH,
    "--epochs",
    2,
    "--lr",
    1e-3,
]
OPTIONS += [
    "--warmup-epochs",
    0,
    "--ckpt-every",
    RESUMED_AT,
    "--keep-last",
    STEPS,
    "--log-every",
    1,
]
OPTIONS += ["--mixed-precision", "none", "--no-local-save", "--export", "none", "--no-compile"]
NO_DROPOUT = [
    "--dropout-p",
    0,
    "--attn-dropout-p",
    0,
    "--token-dropout-p",
    0,
    "--class-dropout-prob",
    0,
]
# largest difference of a loss: sums over shards or on a GPU are rounded in another order
ROUNDING = 1e-3


def write_codes(folder: Path) -> Path:
    """Write random codes of 24 images, three classes and an 8x8 grid to ``folder``."""
    rng, images = np.random.default_rng(0), STEPS * BATCH // 2
    plan = CodesPlan(
        classes=["a", "b", "c"],
        num_images=images,
        source_sha256="",
        image_size=32,
        grid=[8, 8],
        crops=["center"],
        crop_range=1.0,
        codebook_size=64,
        tokenizer="VQ-4",
        tokenizer_sha256="",
        precision="none",
        shard_size=images,
    )
    start_codes(folder, plan)
    codes = rng.integers(0, plan.codebook_size, (images, 1, plan.num_tokens))  # (N, 1, T)
    write_shard(folder, plan, 0, codes, rng.integers(0, 3, images), np.arange(images))
    finish_codes(folder, plan, [])
    return folder


def train(work: Path, name: str, *options: object, processes: int = 1) -> None:
    """Run the training command to its end, in this process if it is one."""
    codes = work / "codes" if (work / "codes").exists() else write_codes(work / "codes")
    words = ["--code-path", codes, "--cloud-save-path", work / name, *OPTIONS, *options]
    words = [str(ROOT / "autoregressive" / "train" / "train_c2i.py"), *map(str, words)]
    if processes > 1:
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
        ]
        subprocess.run([*launcher, *words], cwd=ROOT, check=True)
        return
    sys.argv = words
    try:
        train_c2i.main()
    finally:
        signal.set_wakeup_fd(-1)  # the run listened for signals
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def leave_checkpoint(work: Path, before: str, after: str) -> None:
    """Give run ``after`` the early checkpoint of ``before``, as if killed soon after it."""
    folders = [work / name / RUN / "checkpoints" / f"{RESUMED_AT:07d}" for name in (before, after)]
    shutil.copytree(*folders)


def equal_bits(work: Path, *names: str) -> bool:
    """Return whether two runs ended in the same weights and moments, bit for bit."""
    a, b = (read_sharded(work / name / RUN / "checkpoints" / f"{STEPS:07d}", "") for name in names)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def loss_difference(work: Path, *names: str) -> float:
    """Return the largest difference of two runs' losses at the steps after ``RESUMED_AT``."""
    curves = []
    for name in names:
        lines = map(json.loads, (work / name / RUN / "metrics.jsonl").read_text().splitlines())
        losses = {line["step"]: line["loss"] for line in lines}
        curves.append([losses[step] for step in range(RESUMED_AT + 1, STEPS + 1)])
    return float(np.abs(np.subtract(*curves)).max())


def check_resume(context: Context) -> Result:
    """Train to the end, and again from an early checkpoint, as after a kill; compare both."""
    train(context.work, "whole")
    leave_checkpoint(context.work, "whole", "resumed")
    train(context.work, "resumed")
    equal, difference = (f(context.work, "whole", "resumed") for f in (equal_bits, loss_difference))
    # on a CPU, equal bits are promised
    fine = equal or (context.device != "cpu" and difference <= ROUNDING)
    how = (
        "in the same bits"
        if equal
        else f"not in the same bits; losses differ by {short(difference)}"
    )
    detail = (
        f"a run resumed after step {RESUMED_AT} of {STEPS} ends as one that was not stopped, {how}"
    )
    return Result(OK if fine else BROKEN, detail, figures={"loss difference": difference})


def check_sharded(context: Context, processes: int = 1) -> Result:
    """Go on from an early checkpoint with sharded weights (FSDP); compare the losses."""
    train(context.work, "whole", *NO_DROPOUT)
    leave_checkpoint(context.work, "whole", "sharded")
    train(context.work, "sharded", *NO_DROPOUT, "--data-parallel", "fsdp", processes=processes)
    difference = loss_difference(context.work, "whole", "sharded")
    over = "one process" if processes == 1 else f"{processes} processes"
    detail = (
        f"FSDP over {over} goes on from an unsharded checkpoint; losses differ "
        f"by {short(difference)}"
    )
    return Result(
        OK if difference <= ROUNDING else BROKEN, detail, figures={"loss difference": difference}
    )
