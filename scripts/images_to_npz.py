"""Class folders of images -> an .npz of centre crops and labels, as a reference for the
evaluator.
"""

from __future__ import annotations

import sys
import uuid
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.options import answer_early, make_parser, positive_int, run_main


def parse_args() -> Namespace:
    """Parse the command line."""
    parser = make_parser(
        __doc__, "python3 scripts/images_to_npz.py --data-path IMAGENET/val --output val256.npz"
    )
    parser.add_argument(
        "--data-path", required=True, help="folder with one sub-folder of images per class"
    )
    parser.add_argument(
        "--image-size", type=positive_int, default=256, help="side of the crops, pixels"
    )
    parser.add_argument("--output", required=True, help=".npz file to write")
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(parse_args)

import numpy as np

from dataset.augmentation import center_crop
from dataset.imagenet import list_images, open_image
from utils.distributed import init_distributed
from utils.files import prepare_folder
from utils.logger import progress
from utils.samples import SampleFile


def main() -> None:
    """Crop image by image, write chunk by chunk."""
    args = parse_args()
    output, world = Path(args.output), init_distributed()
    samples = list_images(args.data_path).samples
    prepare_folder(output.parent, "--output")
    shape = (len(samples), args.image_size, args.image_size, 3)
    file = SampleFile(output, uuid.uuid4().hex[:8], shape, chunk=256)
    file.create()
    with progress(world, "cropping", len(samples), unit="images") as bar:
        for chunk in range(file.num_chunks):
            part = [samples[i][0] for i in file.images_of(chunk)]
            file.write(
                chunk, np.stack([center_crop(open_image(path), args.image_size) for path in part])
            )
            bar.update(len(part))
    labels = np.array([label for _, label in samples], np.int64)
    file.finish(labels, progress(world, "checksum", len(samples), unit="images"))


if __name__ == "__main__":
    run_main(main)
