"""Train a small image classifier, which the evaluator can use instead of Inception, on folders
of images per class.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

from evaluations.c2i.classifier import (
    ClassifierConfig,
    SmallClassifier,
    load_classifier,
    save_classifier,
)
from evaluations.c2i.features import extract_features
from evaluations.c2i.metrics import class_accuracy
from utils.distributed import World, init_distributed
from utils.files import require_folder
from utils.logger import create_logger, progress
from utils.options import make_parser, positive_int, run_main

BATCH_SIZE = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.01
MAX_DEGREES = 10.0  # augmentation: rotation
MAX_SHIFT = 0.06  # augmentation: shift as a fraction of the image's side


def main() -> None:
    """Train and write the file, unless it exists with the same options."""
    args = parse_args()
    world = init_distributed()
    logger = create_logger(world)
    train_set = open_folder(args.data_path, "--data-path", args.image_size)
    test_set = open_folder(args.test_path, "--test-path", args.image_size)
    if train_set.classes != test_set.classes:
        raise ValueError(
            f"--test-path: {args.test_path} has other classes than --data-path {args.data_path}"
        )
    options = {k: v for k, v in vars(args).items() if k != "output"}
    options |= {"train_images": len(train_set), "test_images": len(test_set)}
    if args.output.exists():
        content = load_classifier(args.output, "--output")[1]
        if content.get("options") == options:
            logger.info(f"{args.output} already exists, trained with these options: nothing to do")
            logger.info(f"test accuracy: {content['test_accuracy']:.4f}")
            return
        logger.info(f"{args.output} was trained with other options: training again")

    torch.manual_seed(args.global_seed)
    config = ClassifierConfig(args.image_size, len(train_set.classes))
    network = SmallClassifier(config).to(world.device)
    images, labels = load_images(train_set, world, "reading training images")
    train(network, images, labels, args.epochs, args.global_seed, world)
    images, labels = load_images(test_set, world, "reading test images")
    batches = images.split(BATCH_SIZE)
    features = extract_features(network.eval(), batches, len(images), BATCH_SIZE, world)
    accuracy = class_accuracy(features.probabilities, labels.numpy())
    save_classifier(
        args.output, network, train_set.classes, options=options, test_accuracy=accuracy
    )
    logger.info(f"test accuracy: {accuracy:.4f} on {len(labels)} images; wrote {args.output}")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(
        __doc__,
        "python3 scripts/quickstart/train_classifier.py --data-path digits/train --test-path "
        "digits/test --output pretrained_models/digits.pt --image-size 32",
    )
    parser.add_argument(
        "--data-path", required=True, help="training images: folder with one sub-folder per class"
    )
    parser.add_argument(
        "--test-path", required=True, help="test images: folder with the same sub-folders"
    )
    parser.add_argument("--output", type=Path, required=True, help="file of weights to write (.pt)")
    parser.add_argument(
        "--epochs", type=positive_int, default=10, help="passes over the training images"
    )
    parser.add_argument(
        "--image-size", type=positive_int, default=32, help="side of the square images, in pixels"
    )
    parser.add_argument(
        "--global-seed", type=int, default=0, help="seed of weights, data order and augmentation"
    )
    return parser.parse_args()


def open_folder(path: str, option: str, image_size: int) -> ImageFolder:
    """Open the images of a class folder as uint8 (3, S, S), classes in sorted order."""
    transform = Compose([Resize(image_size), CenterCrop(image_size), PILToTensor()])
    try:
        return ImageFolder(require_folder(path, option), transform)
    except FileNotFoundError as error:
        raise ValueError(f"{option}: {path} has no class folders: {error}") from error


def load_images(dataset: ImageFolder, world: World, description: str) -> tuple[Tensor, Tensor]:
    """Read all images as uint8 (N, S, S, 3) and their labels (N,) into memory."""
    bar = progress(world, description, len(dataset), unit="image", items=dataset)
    images = torch.stack([image for image, _ in bar])  # (N, 3, S, S)
    return images.permute(0, 2, 3, 1).contiguous(), torch.tensor(dataset.targets)


def train(
    network: SmallClassifier, images: Tensor, labels: Tensor, epochs: int, seed: int, world: World
) -> None:
    """Train with AdamW and a one-cycle learning rate on slightly rotated and shifted images."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = epochs * math.ceil(len(images) / BATCH_SIZE)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    network.train()
    bar = progress(world, "training", steps, unit="step")
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH_SIZE):
            x = images[batch].permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, S, S)
            x = rotate_and_shift(x, generator).to(world.device)  # (B, 3, S, S)
            loss = F.cross_entropy(network.logits(x), labels[batch].to(world.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            bar.update()
    bar.close()


def rotate_and_shift(x: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate and shift each of (B, 3, S, S) by random amounts; edge pixels are repeated."""
    angle, right, down = torch.rand(3, len(x), generator=generator) * 2 - 1  # (B,) each, in [-1, 1)
    angle = angle * math.radians(MAX_DEGREES)  # (B,)
    right, down = right * 2 * MAX_SHIFT, down * 2 * MAX_SHIFT  # (B,)
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([cos, -sin, right, sin, cos, down], dim=1).view(-1, 2, 3)  # (B, 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)  # (B, S, S, 2)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)  # (B, 3, S, S)


if __name__ == "__main__":
    run_main(main)
