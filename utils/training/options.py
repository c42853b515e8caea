"""Options that both trainers have."""

from __future__ import annotations

from argparse import ArgumentParser, _ArgumentGroup
from collections.abc import Iterable

from utils.options import amount, count, fraction, positive_int
from utils.precision import AUTO_HELP


def add_optimizer_options(parser: ArgumentParser) -> None:
    """Options of the update itself, the same for every trainer."""
    group = parser.add_argument_group("optimizer")
    group.add_argument("--weight-decay", type=amount, default=0.05, help="AdamW, matrices and convolutions only")
    group.add_argument("--beta1", type=fraction, default=0.9, help="AdamW")
    group.add_argument("--beta2", type=fraction, default=0.95, help="AdamW")
    group.add_argument("--max-grad-norm", type=amount, default=1.0, help="clip gradients to this norm; 0: never")
    group.add_argument("--gradient-accumulation-steps", type=positive_int, default=1, help="micro-batches a step")
    group.add_argument("--ema", action="store_true", help="keep a moving average of the weights as well")
    group.add_argument("--ema-decay", type=fraction, default=0.9999, help="of --ema")
    group.add_argument(
        "--max-loss-spike",
        type=amount,
        default=1.0,
        help="skip a step whose loss is this far above its running mean, as if it were not a number; 0: never",
    )
    group.add_argument(
        "--max-skipped-steps",
        type=positive_int,
        default=20,
        help="stop when a log line finds so many skipped in a row",
    )
    group.add_argument("--global-seed", type=count, default=0, help="weights, data order, crops, dropout")


def add_precision_option(group: _ArgumentGroup, choices: Iterable[str]) -> None:
    """``--mixed-precision``, with ``auto`` before ``choices``, keys of ``AUTOCAST_DTYPE``."""
    group.add_argument(
        "--mixed-precision",
        choices=["auto", *choices],
        default="auto",
        help=f"type of matrix products and convolutions; weights stay float32. {AUTO_HELP}; published runs are in bf16",
    )


def add_output_options(parser: ArgumentParser, results_dir: str) -> None:
    """Options of logs and checkpoints, the same for every trainer."""
    group = parser.add_argument_group("output")
    group.add_argument("--cloud-save-path", required=True, help="durable folder for checkpoints")
    group.add_argument("--no-local-save", action="store_true", help="write to --cloud-save-path only")
    group.add_argument("--results-dir", default=results_dir, help="local folder for logs and checkpoints")
    group.add_argument("--log-every", type=positive_int, default=100, help="steps")
    group.add_argument("--ckpt-every", type=positive_int, default=5000, help="steps between checkpoints to resume from")
    group.add_argument("--keep-last", type=positive_int, default=3, help="newest checkpoints that are kept")
    group.add_argument("--keep-every", type=count, default=50000, help="keep those of its multiples too; 0: none")
    group.add_argument("--wandb-project", help="log to this Weights & Biases project as well (needs wandb)")
    group.add_argument("--no-wandb", action="store_true", help="never, whatever --wandb-project says")
    group.add_argument("--dry-run", action="store_true", help="build all, take two steps, say what to expect; no files")


def split_batch(global_batch: int, world_size: int, accumulation: int) -> int:
    """Items of one process's micro-batch; ``ValueError`` if the global batch does not split evenly."""
    if global_batch % (world_size * accumulation):
        raise ValueError(
            f"--global-batch-size {global_batch} does not split over {world_size} processes x "
            f"{accumulation} accumulation steps; take a multiple of {world_size * accumulation}"
        )
    return global_batch // (world_size * accumulation)
