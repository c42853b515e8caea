"""Split class folders of images into OUTPUT/train and OUTPUT/held-out: the last ones of each class.

Images are hard links where both folders are on one disk, copies elsewhere.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.options import make_parser, positive_int, run_main


def main() -> None:
    """Link or copy every image."""
    parser = make_parser(
        __doc__, "python3 scripts/small_models/split.py --data-path CIFAR10/train --output images"
    )
    parser.add_argument("--data-path", required=True, help="folder with a folder per class")
    parser.add_argument("--held-out", type=positive_int, default=500, help="last images per class")
    parser.add_argument("--output", required=True, help="folder to write to")
    args = parser.parse_args()
    classes = sorted(p for p in Path(args.data_path).iterdir() if p.is_dir())
    if not classes:
        raise ValueError(f"--data-path: {args.data_path} holds no folders of classes")
    for source in classes:
        images = sorted(p for p in source.iterdir() if p.is_file())
        if len(images) <= args.held_out:
            raise ValueError(f"--held-out {args.held_out}: {source} holds {len(images)} images")
        for i, image in enumerate(images):
            split = "train" if i < len(images) - args.held_out else "held-out"
            target = Path(args.output) / split / source.name / image.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                try:
                    os.link(image, target)
                except OSError:
                    shutil.copyfile(image, target)


if __name__ == "__main__":
    run_main(main)
