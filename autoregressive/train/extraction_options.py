"""Options of extraction."""

from __future__ import annotations

from argparse import Namespace

from tokenizer.config import add_tokenizer_options
from utils.options import (
    add_retired,
    make_parser,
    non_negative_float,
    non_negative_int,
    positive_int,
)

CHECKED_SHARDS = 2  # read per process though they look unchanged
BATCH = 16  # crops
CUDA_BATCH = 80  # of ten crops each, eight images


def parse_args(description: str) -> Namespace:
    """Parse the options; names and defaults are those of the published script."""
    parser = make_parser(
        description,
        "bash scripts/autoregressive/extract_codes_c2i.sh --vq-ckpt "
        "./pretrained_models/vq_ds16_c2i.pt --data-path IMAGENET/train --code-path CODES "
        "--ten-crop --crop-range 1.1 --image-size 384",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data-path", required=True, help="folder with one sub-folder of images per class"
    )
    data.add_argument(
        "--code-path", required=True, help="folder to write codes to; a rerun makes what is missing"
    )
    data.add_argument(
        "--image-size",
        type=positive_int,
        help="side of the crops, pixels (default: that of the tokenizer's training, if the file "
        "has it, else 256)",
    )
    data.add_argument(
        "--ten-crop",
        action="store_true",
        help="ten crops per image: corners and centre of a larger square, each also mirrored; "
        "without it the centre crop and its mirror image",
    )
    data.add_argument(
        "--crop-range",
        type=non_negative_float,
        default=1.1,
        help="side of the square of --ten-crop, as a multiple of --image-size",
    )
    data.add_argument(
        "--no-flip", action="store_true", help="leave out the mirror images (for text or digits)"
    )
    data.add_argument("--debug", action="store_true", help="extract only the first 100 images")
    add_tokenizer_options(parser.add_argument_group("tokenizer"))
    work = parser.add_argument_group("work")
    work.add_argument(
        "--precision",
        choices=["auto", "none", "tf32", "bf16"],
        default="auto",
        help="data type of the encoder's products. auto is none (float32) on every machine, unlike "
        "in training: tf32 and bf16 are faster where a device has them, but change some codes",
    )
    work.add_argument(
        "--batch-size",
        type=positive_int,
        help=f"crops per batch of a process (default: {CUDA_BATCH} on CUDA, else {BATCH})",
    )
    work.add_argument("--shard-size", type=positive_int, default=1024, help="images per shard file")
    work.add_argument(
        "--strict",
        action="store_true",
        help="stop at an unreadable image instead of leaving it out",
    )
    work.add_argument(
        "--retry-skipped",
        action="store_true",
        help="make shards again that lack images because they were unreadable",
    )
    work.add_argument(
        "--verify",
        action="store_true",
        help="read all shards that are there already, rather than those whose size or time has "
        f"changed and {CHECKED_SHARDS} others per process",
    )
    work.add_argument(
        "--num-workers",
        type=non_negative_int,
        default=24,
        help="processes that read images, at most the share of cores of a rank",
    )
    add_retired(
        parser,
        {
            "--dataset": (True, "any folder of class folders is read the same way"),
            "--global-seed": (True, "extraction draws nothing at random"),
        },
    )
    return parser.parse_args()
