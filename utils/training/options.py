"""Options that both trainers have."""

from __future__ import annotations

from argparse import ArgumentParser, _ArgumentGroup
from collections.abc import Iterable

from utils.options import fraction, non_negative_float, non_negative_int, positive_int

AUTO_HELP = (
    "auto takes bf16 where the device computes in it (GPUs of compute capability 8.0 or newer; "
    "CPUs with AMX, AVX-512 BF16 or Arm BF16, if that is faster than float32 there), else fp16 "
    "with a loss scale on CUDA, else none, which is float32"
)
LR_SCHEDULES = ("constant", "cosine")  # of --lr-schedule


def add_optimizer_options(parser: ArgumentParser) -> None:
    """Add the options of the update itself."""
    group = parser.add_argument_group("optimizer")
    group.add_argument(
        "--weight-decay",
        type=non_negative_float,
        default=0.05,
        help="weight decay of AdamW, on matrices and convolutions only",
    )
    group.add_argument(
        "--beta1", type=fraction, default=0.9, help="AdamW's decay of the mean of gradients"
    )
    group.add_argument(
        "--beta2",
        type=fraction,
        default=0.95,
        help="AdamW's decay of the mean of squared gradients",
    )
    group.add_argument(
        "--max-grad-norm",
        type=non_negative_float,
        default=1.0,
        help="clip the gradient to this norm; 0 disables it",
    )
    group.add_argument(
        "--gradient-accumulation-steps", type=positive_int, default=1, help="micro-batches per step"
    )
    group.add_argument(
        "--ema", action="store_true", help="also keep an exponential moving average of the weights"
    )
    group.add_argument(
        "--ema-decay", type=fraction, default=0.9999, help="decay of the moving average of --ema"
    )
    group.add_argument(
        "--max-loss-spike",
        type=non_negative_float,
        default=1.0,
        help="skip a step whose loss exceeds the running mean by more than this, after 100 steps; "
        "0: skip only NaN or infinite ones",
    )
    group.add_argument(
        "--max-skipped-steps",
        type=positive_int,
        default=20,
        help="stop after this many skipped steps in a row; checked every --log-every steps",
    )
    group.add_argument(
        "--global-seed",
        type=non_negative_int,
        default=0,
        help="random seed of weights, data order, crops and dropout",
    )


def add_precision_option(group: _ArgumentGroup, choices: Iterable[str]) -> None:
    """Add ``--mixed-precision``: ``auto`` or one of ``choices``, which ``autocast`` knows."""
    group.add_argument(
        "--mixed-precision",
        choices=["auto", *choices],
        default="auto",
        help=f"data type of matrix products and convolutions; weights stay float32. {AUTO_HELP}; "
        "published runs are in bf16",
    )


def add_output_options(parser: ArgumentParser, results_dir: str) -> _ArgumentGroup:
    """Add the options of logs and checkpoints; returns their group."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--cloud-save-path",
        required=True,
        help="durable folder of checkpoints, for instance on a network disk",
    )
    group.add_argument(
        "--no-local-save",
        action="store_true",
        help="write logs and checkpoints to --cloud-save-path only",
    )
    group.add_argument(
        "--results-dir", default=results_dir, help="local folder of logs and checkpoints"
    )
    group.add_argument(
        "--max-steps",
        type=positive_int,
        help="stop after this many steps of the run; the same command without it goes on",
    )
    group.add_argument(
        "--log-every", type=positive_int, default=100, help="steps between log lines"
    )
    group.add_argument(
        "--ckpt-every", type=positive_int, default=5000, help="steps between checkpoints"
    )
    group.add_argument(
        "--keep-last", type=positive_int, default=3, help="number of newest checkpoints to keep"
    )
    group.add_argument(
        "--keep-every",
        type=non_negative_int,
        default=50000,
        help="also keep checkpoints at multiples of this many steps; 0: none",
    )
    group.add_argument(
        "--wandb-project",
        help="also log to this Weights & Biases project (needs the package wandb)",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything, take two steps, log the memory and time to expect; writes no files",
    )
    return group


def split_batch(global_batch: int, world_size: int, accumulation: int) -> int:
    """Return the items per micro-batch; ``ValueError`` if the global batch does not divide so."""
    if global_batch % (world_size * accumulation):
        raise ValueError(
            f"--global-batch-size {global_batch} does not split over {world_size} processes x "
            f"{accumulation} accumulation steps; take a multiple of {world_size * accumulation}"
        )
    return global_batch // (world_size * accumulation)
