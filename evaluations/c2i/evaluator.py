"""FID, sFID, Inception Score, Precision and Recall of generated images against a reference set.

Two .npz files in: each holds images (arr_0, uint8 N x H x W x 3), stored statistics (mu, sigma and mu_s, sigma_s),
or both. Numbers out: to the screen, to a .txt and to a .metrics.json beside the samples.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from tqdm import tqdm

from evaluations.c2i.classifier import load_classifier
from evaluations.c2i.features import FeatureNetwork, Features, ImageFeatures, extract_features
from evaluations.c2i.image_archive import ImageArchive, open_archive
from evaluations.c2i.inception import find_weights, load_inception
from evaluations.c2i.metrics import (
    PrecisionRecall,
    Statistics,
    class_accuracy,
    frechet_distance,
    inception_score,
    mean_and_covariance,
    precision_recall,
    require_labels,
)
from utils.distributed import World, init_distributed
from utils.files import atomic_path, prepare_folder, require_file, sha256_file
from utils.logger import progress
from utils.options import make_parser, positive_int, run, write_options

PRETRAINED_MODELS = Path(__file__).resolve().parents[2] / "pretrained_models"
PUBLISHED_SAMPLES = 50_000
NEIGHBOURS = 3
TITLES = {
    "inception_score": "Inception Score",
    "fid": "FID",
    "sfid": "sFID",
    "precision": "Precision",
    "recall": "Recall",
    "class_accuracy": "Class accuracy",
}


class SetStatistics(NamedTuple):
    """What one file comes down to: statistics of pool and spatial features (None: there are none)."""

    pool: Statistics
    spatial: Statistics | None


def main() -> None:
    """Read options and files, extract features, print and write the numbers."""
    args = parse_args()
    reference, samples = open_archive(args.reference, "REF"), open_archive(args.samples, "SAMPLES")
    text_path = text_path_beside(samples.path)
    output = Path(args.output or samples.path.with_suffix(".metrics.json"))
    prepare_folder(output.parent, "--output")
    if output.is_dir():
        raise ValueError(f"--output: {output} is a folder; give the name of a .json file")
    world = World(0, 1, choose_device(args.device))
    use_reference, use_samples = reference_needs_images(reference, samples), samples.count > 0
    network, network_file = load_network(args, world) if use_reference or use_samples else (None, None)
    check_files(reference, samples, network, args, world)
    print_notes(reference, samples)

    print("computing reference batch activations...", flush=True)
    ref_features = features_of(reference, network, "reference", args, world) if use_reference else None
    print("computing/reading reference batch statistics...", flush=True)
    ref_statistics = statistics_of(reference, ref_features)
    print("computing sample batch activations...", flush=True)
    features = features_of(samples, network, "samples", args, world) if use_samples else None
    print("computing/reading sample batch statistics...", flush=True)
    statistics = statistics_of(samples, features)

    print("Computing evaluations...", flush=True)
    metrics = compare_statistics(ref_statistics, statistics)
    distances = None
    if features:
        metrics["inception_score"] = inception_score(features.probabilities)
        if args.feature_network and samples.labels is not None:
            metrics["class_accuracy"] = class_accuracy(features.probabilities, samples.labels)
    if features and ref_features:
        result = precision_recall(ref_features.pool, features.pool, NEIGHBOURS, args.exact_distances, world.device)
        metrics |= {"precision": result.precision, "recall": result.recall}
        distances = describe_distances(result, args.exact_distances)
    report(metrics, distances, text_path)
    counts = {"reference_images": reference.count, "sample_images": samples.count}
    write_options(output, args, metrics=metrics, **counts, distances=distances, network=network_file)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(
        __doc__, "python3 evaluations/c2i/evaluator.py VIRTUAL_imagenet256_labeled.npz samples/samples.npz"
    )
    parser.add_argument("reference", metavar="REF", help="reference .npz")
    parser.add_argument("samples", metavar="SAMPLES", help="sample .npz; the .txt is written beside it")
    parser.add_argument(
        "--inception-weights",
        metavar="FILE",
        help="weights of the 2015 Inception (else looked for in pretrained_models/)",
    )
    parser.add_argument("--allow-unknown-weights", action="store_true", help="take weights of any sha256")
    parser.add_argument(
        "--feature-network", metavar="FILE", help="classifier of train_classifier.py to use instead of Inception"
    )
    parser.add_argument(
        "--exact-distances", action="store_true", help="float32 distances for Precision and Recall, not float16"
    )
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images a forward pass")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 or mps (else the best there is)")
    parser.add_argument(
        "--output", metavar="JSON", help="numbers, options and environment (default: SAMPLES.metrics.json)"
    )
    return parser.parse_args()


def text_path_beside(samples: Path) -> Path:
    """``x.npz`` -> ``x.txt``; another name is refused, for its text could replace the file itself."""
    if samples.suffix != ".npz":
        raise ValueError(f"SAMPLES: the name of {samples} does not end in .npz, so the .txt beside it has no name")
    return samples.with_suffix(".txt")


def choose_device(name: str | None) -> torch.device:
    """The device of that name, tried out, or the best there is."""
    if name is None:
        return init_distributed().device
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name} cannot be used: {str(error).splitlines()[0]}") from error


def reference_needs_images(reference: ImageArchive, samples: ImageArchive) -> bool:
    """Whether the reference images are needed: for Precision and Recall, or for statistics that are not stored."""
    stored = reference.pool is not None and reference.spatial is not None
    return reference.count > 0 and (samples.count > 0 or not stored)


def load_network(args: argparse.Namespace, world: World) -> tuple[FeatureNetwork, dict[str, str]]:
    """The feature network on its device, and the name and hash of its file."""
    if args.feature_network:
        path = require_file(args.feature_network, "--feature-network")
        network = load_classifier(path, "--feature-network")[0]
    else:
        path = find_weights(args.inception_weights, PRETRAINED_MODELS, args.allow_unknown_weights)
        network = load_inception(path)
    print(f"features by {path} on {world.device}", flush=True)
    return network.to(world.device), {"path": str(path), "sha256": sha256_file(path)}


def check_files(
    reference: ImageArchive,
    samples: ImageArchive,
    network: FeatureNetwork | None,
    args: argparse.Namespace,
    world: World,
) -> None:
    """Find what would end in an error later on, by the first image of each file."""
    sizes: dict[str, set[int]] = {"pool": set(), "spatial": set()}
    for archive in (reference, samples):
        for kind, stored in (("pool", archive.pool), ("spatial", archive.spatial)):
            if stored is not None:
                sizes[kind].add(len(stored.mu))
        if network is None or not archive.count:
            continue
        if archive.count <= NEIGHBOURS:
            raise ValueError(f"{archive.path} holds {archive.count} images, at least {NEIGHBOURS + 1} are needed")
        first = first_features(archive, network, world)
        sizes["pool"].add(first.pool.shape[1])
        if first.spatial is not None:
            sizes["spatial"].add(first.spatial.shape[1])
        if args.feature_network and archive is samples and samples.labels is not None:
            require_labels(samples.labels, samples.count, first.probabilities.shape[1])
    for kind, found in sizes.items():
        if len(found) > 1:
            numbers = " and ".join(str(n) for n in sorted(found))
            raise ValueError(
                f"stored statistics and network do not belong together: {kind} features of {numbers} values"
            )


@torch.inference_mode()
def first_features(archive: ImageArchive, network: FeatureNetwork, world: World) -> Features:
    """Features of the first image alone."""
    return network(next(archive.batches(1)).to(world.device))


def print_notes(reference: ImageArchive, samples: ImageArchive) -> None:
    """Say what the user should know about the numbers before they come."""
    lines = []
    if not samples.count:
        lines.append(f"note: {samples.path} holds statistics alone: FID and sFID only")
    elif samples.count < PUBLISHED_SAMPLES:
        lines.append(
            f"warning: {samples.count:,} sample images; published figures take {PUBLISHED_SAMPLES:,}, "
            "and fewer give a higher FID"
        )
    if samples.count and not reference.count:
        lines.append(f"note: {reference.path} holds statistics alone: no Precision, no Recall")
    for line in lines:
        print(line, file=sys.stderr)


def features_of(
    archive: ImageArchive, network: FeatureNetwork, name: str, args: argparse.Namespace, world: World
) -> ImageFeatures:
    """Features of all images of a file, with a progress bar."""
    with progress(world, name, archive.count, unit="image") as bar:
        return extract_features(network, count_up(archive.batches(args.batch_size), bar), world.device)


def count_up(batches: Iterator[torch.Tensor], bar: tqdm) -> Iterator[torch.Tensor]:
    """The same batches; the bar moves on by their images."""
    for batch in batches:
        yield batch
        bar.update(len(batch))


def statistics_of(archive: ImageArchive, features: ImageFeatures | None) -> SetStatistics:
    """Stored statistics where the file has them, computed ones otherwise."""
    pool, spatial = archive.pool, archive.spatial
    if pool is None:
        pool = mean_and_covariance(features.pool)
    if spatial is None and features is not None and features.spatial is not None:
        spatial = mean_and_covariance(features.spatial)
    return SetStatistics(pool, spatial)


def compare_statistics(reference: SetStatistics, samples: SetStatistics) -> dict[str, float]:
    """FID, and sFID where both sets have spatial statistics."""
    metrics = {"fid": frechet_distance(*samples.pool, *reference.pool)}
    if reference.spatial is not None and samples.spatial is not None:
        metrics["sfid"] = frechet_distance(*samples.spatial, *reference.spatial)
    return metrics


def describe_distances(result: PrecisionRecall, exact: bool) -> str:
    """Which precision the distances had."""
    if exact:
        return "float32 (--exact-distances)"
    text = "float16, as in the TensorFlow evaluator"
    if result.float32_blocks:
        text += f"; {result.float32_blocks} of {result.blocks} blocks overflow and are float32"
    return text


def report(metrics: dict[str, float], distances: str | None, text_path: Path) -> None:
    """Print the numbers, write them to ``text_path``."""
    lines = [f"{title}: {metrics[name]}" for name, title in TITLES.items() if name in metrics]
    print("\n".join(lines))
    if distances:
        print(f"distances: {distances}")
    print(f"writing to {text_path}")
    with atomic_path(text_path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    run(main)
