"""FID, sFID, Inception Score, Precision and Recall of generated images against a reference set.

REF and each SAMPLES: an .npz with images (arr_0, uint8 N x H x W x 3), stored statistics (mu, sigma
and mu_s, sigma_s), or both; or a folder of images. The metrics go to the screen, to a .txt and to a
.metrics.json beside the samples. Under torchrun the images are shared among the processes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from evaluations.c2i.classifier import load_classifier
from evaluations.c2i.extra_metrics import (
    class_frechet,
    frechet_interval,
    kernel_distance,
    load_dinov2,
    paired_quality,
)
from evaluations.c2i.features import (
    FeatureNetwork,
    Features,
    MeasuredSet,
    measure_reference,
    measure_set,
)
from evaluations.c2i.image_sets import ImageSet, open_images
from evaluations.c2i.inception import download_weights, find_weights, load_inception
from evaluations.c2i.metrics import (
    class_accuracy,
    frechet_distance,
    inception_score,
    precision_recall,
    require_labels,
)
from evaluations.c2i.report import (
    as_text,
    describe_distances,
    markdown,
    settings_of,
    warnings_after,
    warnings_before,
)
from evaluations.c2i.self_check import compare_with_published, self_check
from utils.distributed import World, init_distributed
from utils.files import atomic_path, prepare_folder, require_file, sha256_file
from utils.logger import progress
from utils.options import make_parser, positive_int, run_main, write_options
from utils.quality import SSIM_WINDOW

PRETRAINED_MODELS = Path(__file__).resolve().parents[2] / "pretrained_models"
NEIGHBOURS = 3


@dataclass(frozen=True)
class Inputs:
    """The networks and the measured reference that every set of samples is evaluated with."""

    args: argparse.Namespace
    world: World
    network: FeatureNetwork | None
    dino: FeatureNetwork | None
    reference: ImageSet
    measured_reference: MeasuredSet
    dino_reference: MeasuredSet


def main() -> None:
    """Read options and files, extract features, print and write the metrics."""
    args = parse_args()
    world = choose_world(args.device)
    if args.download and not args.inception_weights and world.is_main:
        download_weights(PRETRAINED_MODELS)
    world.barrier()

    if args.self_check:
        if world.is_main:
            self_check(args.inception_weights, PRETRAINED_MODELS, args.allow_unknown_weights)
        if args.reference is None:
            return
    if args.reference is None or not args.samples:
        raise ValueError("REF and SAMPLES are required (see --help)")

    reference = open_images(args.reference, "REF")
    sets = [open_images(path, "SAMPLES") for path in args.samples]
    outputs = [output_paths(samples, args) for samples in sets]
    check_outputs([path for pair in outputs for path in pair], args)
    for samples in sets:
        check_options(reference, samples, args)

    # reference images are needed for Precision and Recall, and for statistics that are not stored
    read_samples = any(samples.count for samples in sets)
    stored = reference.pool is not None and reference.spatial is not None
    read_reference = reference.count > 0 and (read_samples or not stored)
    network, network_file = (
        load_network(args, world) if read_samples or read_reference else (None, None)
    )
    for samples in sets:
        check_files(reference, samples, network, args, world)
    if args.compile and network is not None:
        network.compile()
    dino = (
        load_dinov2(require_file(args.dinov2, "--dinov2")).to(world.device) if args.dinov2 else None
    )

    say(world, "computing reference batch activations...")
    cache, batch = not args.no_cache, args.batch_size
    sha256 = network_file["sha256"] if network_file else ""
    measured = measure_reference(
        reference, network if read_reference else None, sha256, cache, batch, world
    )
    say(world, "computing/reading reference batch statistics...")
    sha256 = sha256_file(args.dinov2) if dino else ""
    dino_measured = measure_reference(
        reference.without_statistics(), dino, sha256, cache, batch, world
    )

    inputs = Inputs(args, world, network, dino, reference, measured, dino_measured)
    results = []
    for samples, (text, output) in zip(sets, outputs, strict=True):
        result = evaluate(inputs, samples)
        if result is None:
            continue
        results.append(result)
        write_text(result, text)
        if args.self_check and (
            table := compare_with_published(samples.path.name, result["metrics"])
        ):
            print(table)
        write_options(
            output, args, **result, reference_images=reference.count, network=network_file
        )
    if args.markdown and world.is_main:
        with atomic_path(args.markdown) as temporary:
            temporary.write_text(markdown(results))
        print(f"writing to {args.markdown}")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(
        __doc__,
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
    text = "weights of the 2015 Inception, .pb or .pth (default: a published file in pretrained_models/)"
    group.add_argument("--inception-weights", metavar="FILE", help=text)
    text = "accept Inception weights whose size or sha256 is not a published one"
    group.add_argument("--allow-unknown-weights", action="store_true", help=text)
    text = "download the Inception weights to pretrained_models/ if they are missing"
    group.add_argument("--download", action="store_true", help=text)
    text = "file of a small classifier (scripts/quickstart/train_classifier.py) to use instead of Inception"
    group.add_argument("--feature-network", metavar="FILE", help=text)
    text = "check weights, resize, network and formulas against stored values; makes REF and SAMPLES optional"
    group.add_argument("--self-check", action="store_true", help=text)

    group = parser.add_argument_group("Numerics")
    text = "compute Precision and Recall with float32 distances instead of the published float16"
    group.add_argument("--exact-distances", action="store_true", help=text)
    text = "how FID takes its matrix square root: from eigenvalues, or by scipy as published (slower, equal to 1e-9)"
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
    text = "compute PSNR and SSIM between image i of SAMPLES and image i of REF, for tokenizers (FID is then rFID)"
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
    text = "JSON file for metrics, options and environment (default: SAMPLES.metrics.json)"
    group.add_argument("--output", metavar="JSON", help=text)
    text = "write the metrics as a Markdown table to this file, one row per SAMPLES"
    group.add_argument("--markdown", metavar="FILE", help=text)
    return parser.parse_args()


def output_paths(samples: ImageSet, args: argparse.Namespace) -> tuple[Path, Path]:
    """Return ``x.txt`` and ``x.metrics.json``, beside ``x.npz`` or the folder ``x``.

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
    text = base.with_name(f"{base.name}.txt")
    output = Path(args.output or base.with_name(f"{base.name}.metrics.json"))
    for path, option in ((output, "--output"), (Path(args.markdown or output), "--markdown")):
        prepare_folder(path.parent, option)
        if path.is_dir():
            raise ValueError(f"{option}: {path} is a folder; give the name of a file")
    return text, output


def check_outputs(outputs: list[Path], args: argparse.Namespace) -> None:
    """Raise ``ValueError`` if an output is also an input, or if two outputs have one path."""
    inputs = (
        args.reference,
        *args.samples,
        args.inception_weights,
        args.feature_network,
        args.dinov2,
    )
    taken = {Path(p).resolve() for p in inputs if p}
    for path in [*outputs, *([Path(args.markdown)] if args.markdown else [])]:
        if path.resolve() in taken:
            raise ValueError(
                f"{path} would be written over: it is an input or another output; give another name"
            )
        taken.add(path.resolve())


def choose_world(name: str | None) -> World:
    """Join the other processes, on the device of that name or on the fastest available."""
    world = init_distributed()
    if name is None:
        return world
    try:
        device = torch.empty(0, device=name).device
        if world.size > 1 and device.type == "cuda":
            raise ValueError(
                f"--device {name}: {world.size} processes use one GPU each; leave it out"
            )
        return World(world.rank, world.size, device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device: {name} cannot be used: {str(error).splitlines()[0]}"
        ) from error


def load_network(args: argparse.Namespace, world: World) -> tuple[FeatureNetwork, dict[str, str]]:
    """Return the feature network on its device, and the path and hash of its file."""
    if args.feature_network:
        path = require_file(args.feature_network, "--feature-network")
        network = load_classifier(path, "--feature-network")[0]
    else:
        path = find_weights(args.inception_weights, PRETRAINED_MODELS, args.allow_unknown_weights)
        network = load_inception(path)
    say(world, f"feature network: {path} on {world.device}")
    return network.to(world.device), {"path": str(path), "sha256": sha256_file(path)}


def check_options(reference: ImageSet, samples: ImageSet, args: argparse.Namespace) -> None:
    """Raise ``ValueError`` for options whose images, labels or sizes the two sets do not have."""
    for option, wanted in (("--kid", args.kid), ("--dinov2", args.dinov2)):
        if wanted and not (reference.count and samples.count):
            raise ValueError(f"{option} needs the images of REF and SAMPLES, not statistics alone")
    if args.bootstrap and not samples.count:
        raise ValueError(
            f"--bootstrap needs the images of SAMPLES; {samples.path} holds statistics alone"
        )
    if args.class_fid and (reference.labels is None or samples.labels is None):
        raise ValueError(
            "--class-fid needs labels of REF and SAMPLES (an array `labels` in each .npz)"
        )
    if args.paired and (reference.shape != samples.shape or not samples.count):
        raise ValueError(
            f"--paired: REF holds {reference.shape}, SAMPLES {samples.shape}; "
            "expected the same images"
        )
    if args.paired and min(samples.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(
            f"--paired: images of {samples.path} are smaller than SSIM's window "
            f"of {SSIM_WINDOW} pixels"
        )


def check_files(
    reference: ImageSet,
    samples: ImageSet,
    network: FeatureNetwork | None,
    args: argparse.Namespace,
    world: World,
) -> None:
    """Raise ``ValueError`` for late errors, found early by the first batch of each set."""
    widths: dict[str, set[int]] = {"pool": set(), "spatial": set()}
    for images in (reference, samples):
        features = first_features(images, network, args.batch_size, world)
        for kind in widths:
            if (stored := getattr(images, kind)) is not None:
                widths[kind].add(len(stored.mu))
            if (computed := getattr(features, kind, None)) is not None:
                widths[kind].add(computed.shape[1])
    if args.feature_network and samples.labels is not None:
        require_labels(samples.labels, samples.count, features.probabilities.shape[1])
    for kind, numbers in widths.items():
        if len(numbers) > 1:
            text = " and ".join(str(n) for n in sorted(numbers))
            raise ValueError(
                f"stored statistics and network do not belong together: {kind} "
                f"features of {text} values"
            )


@torch.inference_mode()
def first_features(
    images: ImageSet, network: FeatureNetwork | None, batch_size: int, world: World
) -> Features | None:
    """Check the first batch; return its first image's features, None without images or network."""
    if network is None or not images.count:
        return None
    if images.count <= NEIGHBOURS:
        raise ValueError(
            f"{images.path} holds {images.count} images, at least {NEIGHBOURS + 1} are needed"
        )
    batch = next(images.batches(batch_size))
    peak = batch.max().item()
    if peak <= 1:  # nothing in a whole batch is brighter: values in [0, 1]
        raise ValueError(
            f"{images.path}: the first images have no value above {peak:g}, "
            "expected values in 0..255"
        )
    return network(batch[:1].to(world.device))


def evaluate(inputs: Inputs, samples: ImageSet) -> dict[str, Any] | None:
    """Return all metrics of one sample set and the settings behind them; None on ranks above 0."""
    args, world = inputs.args, inputs.world
    warnings = warnings_before(inputs.reference, samples)
    for line in warnings if world.is_main else []:
        print(line, file=sys.stderr)

    say(world, "computing sample batch activations...")
    network = inputs.network if samples.count else None
    measured = measure_set(samples, network, "samples", args.batch_size, world)
    say(world, "computing/reading sample batch statistics...")
    dino = inputs.dino if samples.count else None
    dino_measured = measure_set(
        samples.without_statistics(), dino, "DINOv2", args.batch_size, world
    )
    if not world.is_main:
        return None

    late_warnings = (
        warnings_after(samples, measured.features) if measured.features is not None else []
    )
    for line in late_warnings:
        print(line, file=sys.stderr)
    say(world, "Computing evaluations...")
    metrics, details = compute_metrics(inputs, samples, measured)
    if dino is not None:
        metrics["fd_dinov2"] = frechet_distance(
            *dino_measured.pool, *inputs.dino_reference.pool, args.frechet
        )
    return {
        "samples": str(samples.path),
        "sample_images": samples.count,
        "made_with": settings_of(samples.path),
        "metrics": metrics,
        "warnings": warnings + late_warnings,
        **details,
    }


def compute_metrics(
    inputs: Inputs, samples: ImageSet, measured: MeasuredSet
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the metrics by name, and details: the precision of distances, FID per class."""
    args, world, ref = inputs.args, inputs.world, inputs.measured_reference
    features, details = measured.features, {"distances": None}

    metrics = {"fid": frechet_distance(*measured.pool, *ref.pool, args.frechet)}
    if ref.spatial is not None and measured.spatial is not None:
        metrics["sfid"] = frechet_distance(*measured.spatial, *ref.spatial, args.frechet)
    if features is not None:
        metrics["inception_score"] = inception_score(features.probabilities)
        if args.feature_network and samples.labels is not None:
            metrics["class_accuracy"] = class_accuracy(features.probabilities, samples.labels)
    if features is not None and ref.features is not None:
        result = precision_recall(
            ref.features.pool, features.pool, NEIGHBOURS, args.exact_distances, world.device
        )
        metrics |= {"precision": result.precision, "recall": result.recall}
        details["distances"] = describe_distances(result, args.exact_distances)

    if args.kid:
        metrics["kid"], metrics["kid_std"] = kernel_distance(ref.features.pool, features.pool)
    if args.bootstrap:
        interval = frechet_interval(ref.pool, features.pool, metrics["fid"], args.bootstrap, world)
        metrics["fid_low"], metrics["fid_high"] = interval
    if args.class_fid:
        by_class = class_frechet(
            ref.features.pool, inputs.reference.labels, features.pool, samples.labels
        )
        if not by_class:
            raise ValueError("--class-fid: no class has two images in REF and in SAMPLES")
        metrics["class_fid"] = float(np.mean(list(by_class.values())))
        details["fid_of_class"] = by_class
    if args.paired:
        batches = zip(
            inputs.reference.batches(args.batch_size), samples.batches(args.batch_size), strict=True
        )
        count = -(-samples.count // args.batch_size)
        pairs = progress(world, "PSNR and SSIM", count, unit="batch", items=batches)
        metrics["psnr"], metrics["ssim"] = paired_quality(pairs, world.device)
    return metrics, details


def write_text(result: dict[str, Any], text_path: Path) -> None:
    """Print the metrics and write them to ``text_path``."""
    lines = as_text(result["metrics"])
    print(lines, end="")
    if result["distances"]:
        print(f"distances: {result['distances']}")
    print(f"writing to {text_path}")
    with atomic_path(text_path) as temporary:
        temporary.write_text(lines)


def say(world: World, line: str) -> None:
    """Print ``line`` on rank 0 and flush it."""
    if world.is_main:
        print(line, flush=True)


if __name__ == "__main__":
    run_main(main)
