"""One file of weights from a training checkpoint: the published .pt format, or .safetensors.

The config and the tokenizer's hash go along, so that sampling and extraction need
no architecture options.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.checkpoints.weights_file import export_checkpoint
from utils.files import require_folder
from utils.options import make_parser, run_main


def main() -> None:
    """Read the folder, write the file."""
    parser = make_parser(
        __doc__,
        "python3 scripts/export_checkpoint.py --checkpoint "
        "results/GPT-XL-4x-384/checkpoints/0300000 --ema --output pretrained_models/PAR-XL-4x.pt",
    )
    parser.add_argument(
        "--checkpoint", required=True, help="folder of one checkpoint, named by its step"
    )
    parser.add_argument("--output", required=True, help="file to write, .pt or .safetensors")
    parser.add_argument(
        "--ema",
        action="store_true",
        help="export the moving average instead of the weights themselves",
    )
    args = parser.parse_args()
    export_checkpoint(require_folder(args.checkpoint, "--checkpoint"), Path(args.output), args.ema)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_main(main)
