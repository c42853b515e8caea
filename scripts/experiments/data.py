"""The two data sets of the experiments, made by the ordinary commands: digits and CIFAR-10."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

from scripts.experiments.common import ROOT, extract, run

SMALL = ROOT / "pretrained_models" / "small"


@dataclass(frozen=True)
class Data:
    """Codes and what judges samples; all images are 32x32, all grids 8x8."""

    tokenizer: Path  # of pretrained_models/small
    codes: Path  # of training images
    held_out: Path  # codes of held-out images
    reference: Path  # training images, .npz
    classifier: Path  # feature network


def add_data_options(parser: ArgumentParser) -> None:
    """Add the options that ``prepare`` reads."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", choices=["digits", "cifar10"], default="digits", help="images to learn"
    )
    group.add_argument(
        "--images", help="for --data cifar10: its training images, a folder per class of 5,000"
    )
    group.add_argument(
        "--quick",
        action="store_true",
        help="try every step on few images and with the first arms, in about a minute",
    )
    group.add_argument("--output", default="results/experiments", help="folder for everything")


def prepare(args: Namespace) -> Data:
    """Make what is not there yet in ``--output``, also what judges samples if there are any.

    ``ValueError`` without the images.
    """
    folder = Path(args.output).resolve() / (args.data + ("-quick" if args.quick else ""))
    images, crops = folder / "images", ["--crop-range", 1.1]
    train, held_out = images / "train", images / ("test" if args.data == "digits" else "held-out")
    if args.data == "digits":
        if not (held_out / "9").exists():
            run("python", "scripts/quickstart/digits.py", "--output", images)
        crops.append("--no-flip")
    elif not (held_out / "truck").exists():
        if args.images is None:
            raise ValueError("--images: --data cifar10 needs a folder of its training images")
        run(
            *("python", "scripts/small_models/split.py", "--data-path", args.images),
            *("--output", images),
        )
    if args.quick:
        for path in images.rglob("*.*g"):
            if int(path.stem) % 40:
                path.unlink()
    tokenizer = SMALL / f"{args.data}-tokenizer"
    codes = [extract(tokenizer, x, folder / f"codes-{x.name}", *crops) for x in (train, held_out)]
    reference, classifier = folder / "train.npz", folder / "classifier.pt"
    if args.samples and not reference.exists():
        run(
            *("python", "scripts/images_to_npz.py", "--data-path", train, "--image-size", 32),
            *("--output", reference),
        )
    if args.samples and not classifier.exists():
        run(
            *("python", "scripts/quickstart/train_classifier.py", "--data-path", train),
            *("--test-path", held_out, "--output", classifier, "--image-size", 32),
            *("--epochs", 1 if args.quick else 6),
        )
    return Data(tokenizer, *codes, reference, classifier)
