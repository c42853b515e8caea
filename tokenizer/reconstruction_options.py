"""Options of reconstruction."""

from __future__ import annotations

from argparse import Namespace

from tokenizer.config import add_tokenizer_options
from utils.options import add_retired, make_parser, non_negative_int, positive_int


def parse_args(description: str) -> Namespace:
    """Parse the options; names and defaults are those of the published script."""
    parser = make_parser(
        description,
        "bash scripts/tokenizer/reconstruction_vq.sh --data-path IMAGENET/val --vq-ckpt "
        "./pretrained_models/vq_ds16_c2i.pt",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data-path", required=True, help="images: folder with one sub-folder per class"
    )
    data.add_argument(
        "--image-size",
        type=positive_int,
        help="side of the centre crop, pixels (default: that of the tokenizer's training, if the "
        "file has it, else 256)",
    )
    data.add_argument(
        "--num-workers",
        type=non_negative_int,
        default=4,
        help="image-decoding processes, at most the share of cores of a rank",
    )
    data.add_argument(
        "--per-proc-batch-size", type=positive_int, default=32, help="images per forward pass"
    )
    add_tokenizer_options(parser.add_argument_group("tokenizer"))
    output = parser.add_argument_group("output")
    output.add_argument("--sample-dir", default="reconstructions", help="folder to write to")
    output.add_argument(
        "--image-size-eval",
        type=positive_int,
        help="side of the written images, pixels (default: that of the training, else 256)",
    )
    output.add_argument(
        "--vgg-weights",
        help="VGG16 weights vgg16-397923af.pth for LPIPS (default: torch.hub's copy; "
        "without one, no LPIPS)",
    )
    output.add_argument(
        "--pairs",
        type=positive_int,
        default=20,
        help="images in the picture, each above its reconstruction",
    )
    add_retired(
        parser,
        {
            "--dataset": (True, "every folder of class folders is read the same way"),
            "--global-seed": (True, "reconstruction is deterministic"),
        },
    )
    return parser.parse_args()
