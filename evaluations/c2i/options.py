"""Options of the evaluator, and the paths that it writes to."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from evaluations.c2i.image_sets import ImageSet
from utils.files import prepare_folder
from utils.npz import short_hash
from utils.options import make_parser, positive_int


def parse_args(description: str) -> Namespace:
    """Parse the command line."""
    parser = make_parser(
        description,
        "python3 evaluations/c2i/evaluator.py VIRTUAL_imagenet256_labeled.npz samples/samples.npz",
        arguments="REF SAMPLES...",
    )
    parser.add_argument(
        "reference", metavar="REF", nargs="?", help="reference: .npz or folder of images"
    )
    parser.add_argument(
        "samples", metavar="SAMPLES", nargs="*", help="one or more sets of samples: .npz or folder"
    )

    group = parser.add_argument_group("Feature network")
    text = (
        "weights of the 2015 Inception, .pb or .pth "
        "(default: a published file in pretrained_models/)"
    )
    group.add_argument("--inception-weights", metavar="FILE", help=text)
    text = "accept Inception weights whose size or sha256 is not a published one"
    group.add_argument("--allow-unknown-weights", action="store_true", help=text)
    text = "download the Inception weights to pretrained_models/ if they are missing"
    group.add_argument("--download", action="store_true", help=text)
    text = (
        "file of a small classifier (scripts/quickstart/train_classifier.py) "
        "to use instead of Inception"
    )
    group.add_argument("--feature-network", metavar="FILE", help=text)
    text = (
        "check weights, resize, network and formulas against stored values; "
        "makes REF and SAMPLES optional"
    )
    group.add_argument("--self-check", action="store_true", help=text)

    group = parser.add_argument_group("Numerics")
    text = "compute Precision and Recall with float32 distances instead of the published float16"
    group.add_argument("--exact-distances", action="store_true", help=text)
    text = (
        "how FID takes its matrix square root: from eigenvalues, or by scipy as published "
        "(slower, equal to 1e-9)"
    )
    group.add_argument("--frechet", choices=["symmetric", "sqrtm"], default="symmetric", help=text)

    group = parser.add_argument_group("Additional metrics")
    group.add_argument(
        "--kid",
        action="store_true",
        help="compute KID: mean and standard deviation over 100 subsets",
    )
    text = "compute FD-DINOv2 with this file of timm's DINOv2 ViT-L/14 weights"
    group.add_argument("--dinov2", metavar="FILE", help=text)
    group.add_argument(
        "--class-fid",
        action="store_true",
        help="compute FID within each class; both sets need labels",
    )
    text = "compute a 95%% interval of FID from this many bootstrap resamplings of the samples"
    group.add_argument("--bootstrap", type=positive_int, metavar="DRAWS", help=text)
    text = (
        "compute PSNR and SSIM between image i of SAMPLES and image i of REF, for tokenizers "
        "(FID is then rFID)"
    )
    group.add_argument("--paired", action="store_true", help=text)

    group = parser.add_argument_group("Execution")
    group.add_argument(
        "--batch-size", type=positive_int, default=64, help="images per forward pass"
    )
    text = "compile the feature network with torch.compile; pays off from about 10,000 images"
    group.add_argument("--compile", action="store_true", help=text)
    group.add_argument(
        "--device",
        help="device to run on: cpu, cuda, cuda:1 or mps (default: the fastest available)",
    )
    text = "do not cache the features of the reference in a file beside it"
    group.add_argument("--no-cache", action="store_true", help=text)

    group = parser.add_argument_group("Output")
    text = "JSON file for metrics, options and environment, with a .txt of the metrics beside it "
    text += "(default: SAMPLES.metrics.json)"
    group.add_argument("--output", metavar="JSON", help=text)
    text = "write the metrics as a Markdown table to this file, one row per SAMPLES"
    group.add_argument("--markdown", metavar="FILE", help=text)
    return parser.parse_args()


def output_paths(samples: ImageSet, args: Namespace) -> tuple[Path, Path]:
    """Return ``x.txt`` and ``x.metrics.json``, beside ``x.npz`` or the folder ``x``, or those that
    ``--output`` names: the text goes where its settings are.

    Raises ``ValueError`` for a file without the ending .npz, whose text could replace the file
    itself, and for paths that cannot be written.
    """
    if not samples.path.is_dir() and samples.path.suffix != ".npz":
        raise ValueError(
            f"SAMPLES: the name of {samples.path} does not end in .npz, which the "
            "name of the .txt needs"
        )
    if args.output and len(args.samples) > 1:
        raise ValueError("--output names one file; leave it out if there are several SAMPLES")
    base = samples.path.resolve() if samples.path.is_dir() else samples.path.with_suffix("")
    output = Path(args.output or base.with_name(f"{base.name}.metrics.json"))
    text = output.with_name(f"{output.stem.removesuffix('.metrics')}.txt")
    for path, option in ((output, "--output"), (Path(args.markdown or output), "--markdown")):
        prepare_folder(path.parent, option)
        if path.is_dir():
            raise ValueError(f"{option}: {path} is a folder; give the name of a file")
    return text, output


def check_outputs(outputs: list[Path], args: Namespace) -> None:
    """Raise ``ValueError`` if an output is also an input, or if two outputs have one path."""
    networks = (args.inception_weights, args.feature_network, args.dinov2)
    taken = {Path(p).resolve() for p in (args.reference, *args.samples, *networks) if p}
    # what the sampler wrote of its options
    taken |= {path.with_name(f"{path.name.removesuffix('.npz')}.json") for path in taken}
    for path in outputs if args.output else ():
        if path.suffix == ".txt" and path.exists() and not Path(args.output).exists():
            raise ValueError(f"--output {args.output}: {path} is of something else; rename one")
    for path in [*outputs, *([Path(args.markdown)] if args.markdown else [])]:
        if path.resolve() in taken:
            raise ValueError(
                f"{path} would be written over: it is an input or another output; give another name"
            )
        taken.add(path.resolve())


def evaluation_settings(
    args: Namespace, reference: ImageSet, network_file: dict[str, str] | None
) -> dict[str, Any]:
    """Return what the metrics depend on beside the samples."""
    return {
        "reference": str(reference.path.resolve()),
        "network": network_file and network_file["sha256"],
        "distances": "float32" if args.exact_distances else "float16",
        "square root": args.frechet,
        "torch": torch.__version__,
    }


def beside_others(
    text: Path, output: Path, settings: dict[str, Any], args: Namespace
) -> tuple[Path, Path]:
    """Return paths for a result of these ``settings``: those given, unless metrics with other
    settings stand there, which are kept; then names with a hash of the settings in them.
    """
    try:
        before = json.loads(output.read_text()).get("evaluation")
    except FileNotFoundError:
        if not text.exists():
            return text, output
        before = None  # as of the published evaluator, which writes a text alone
    except (OSError, ValueError, AttributeError, RecursionError):
        before = None
    if before == settings or args.output:
        return text, output
    token = short_hash(settings)
    print(f"note: {output if output.exists() else text} was made otherwise and is kept")
    return text.with_suffix(f".{token}.txt"), output.with_suffix(f".{token}.json")
