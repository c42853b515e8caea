"""Weights of a training checkpoint as one file (the published .pt format, or .safetensors) or as
a folder for huggingface.co.

The config and the tokenizer's hash go along, so that sampling and extraction need
no architecture options.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.options import answer_early, make_parser, run_main


def parse_args() -> Namespace:
    """Parse the command line."""
    parser = make_parser(
        __doc__,
        "python3 scripts/export_checkpoint.py --checkpoint "
        "results/GPT-XL-4x-384/checkpoints/0300000 --ema --output pretrained_models/PAR-XL-4x.pt",
    )
    parser.add_argument(
        "--checkpoint", required=True, help="folder of one checkpoint, named by its step"
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", metavar="FILE", help="file to write, .pt or .safetensors")
    text = "folder to write in the form of huggingface.co: config.json, model.safetensors and a "
    text += "model card; to upload it: hf upload OWNER/NAME FOLDER"
    target.add_argument("--hub", metavar="FOLDER", help=text)
    parser.add_argument(
        "--ema",
        action="store_true",
        help="export the moving average instead of the weights themselves",
    )
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="round the weights to bfloat16, half the bytes; not for a tokenizer, whose codes a "
        "GPT has learned from",
    )
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(parse_args)

from utils.checkpoints.folder import is_old
from utils.checkpoints.weights_file import export_checkpoint, export_to_hub_form
from utils.distributed import init_distributed
from utils.files import prepare_folder, require_folder
from utils.lock import hold


def main() -> None:
    """Read the folder, write the file or the folder."""
    args = parse_args()
    checkpoint = require_folder(args.checkpoint, "--checkpoint")
    output = Path(args.hub or args.output)
    prepare_folder(output.parent, "--hub" if args.hub else "--output")
    hold(Path(f"{output}.lock"), init_distributed(connect=False), str(output))
    if is_old(checkpoint):
        print(f"{checkpoint} has the format of an earlier version, which holds a pickle: checked")
    if args.hub:
        export_to_hub_form(checkpoint, output, args.ema, args.bf16)
    else:
        export_checkpoint(checkpoint, output, args.ema, args.bf16)
    print(f"wrote {output}")


if __name__ == "__main__":
    run_main(main)
