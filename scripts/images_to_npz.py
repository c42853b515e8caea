"""Class folders of images -> an .npz of centre crops and labels, as a reference for the evaluator."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from dataset.augmentation import center_crop
from dataset.imagenet import list_images, open_image
from utils.distributed import init_distributed
from utils.logger import progress
from utils.options import make_parser, positive_int, run
from utils.samples import pack_chunks, write_chunk


def main() -> None:
    """Crop in chunks of 1,024 images and pack them."""
    parser = make_parser(__doc__, "python3 scripts/images_to_npz.py --data-path IMAGENET/val --output val256.npz")
    parser.add_argument("--data-path", required=True, help="folder with one sub-folder of images per class")
    parser.add_argument("--image-size", type=positive_int, default=256, help="side of the crops, pixels")
    parser.add_argument("--output", required=True, help=".npz file to write")
    args = parser.parse_args()
    output, world = Path(args.output), init_distributed()
    samples = list_images(args.data_path).samples
    bar = progress(world, "cropping", len(samples), unit="images")
    chunks = []
    for first in range(0, len(samples), 1024):
        part = samples[first : first + 1024]
        pixels = np.stack([center_crop(open_image(path), args.image_size) for path, _ in part])
        chunks.append(output.with_name(f"{output.stem}.chunks") / f"{first:07d}.npz")
        write_chunk(chunks[-1], pixels, np.array([label for _, label in part], np.int64))
        bar.update(len(part))
    bar.close()
    pack_chunks(output, chunks, progress(world, "packing", len(chunks), unit="chunks"))
    shutil.rmtree(chunks[0].parent)


if __name__ == "__main__":
    run(main)
