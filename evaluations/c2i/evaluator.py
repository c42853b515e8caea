"""FID, sFID, Inception Score, Precision and Recall of generated images against a reference set.

REF and each SAMPLES: an .npz with images (arr_0, uint8 N x H x W x 3), stored statistics (mu, sigma
and mu_s, sigma_s), or both; or a folder of images. The metrics go to the screen, to a .txt and to a
.metrics.json beside the samples. Under torchrun the images are shared among the processes.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from evaluations.c2i.options import parse_args
from utils.options import answer_early, run_main

if __name__ == "__main__":
    answer_early(parse_args, __doc__)

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
from evaluations.c2i.metrics import (
    class_accuracy,
    frechet_distance,
    inception_score,
    precision_recall,
    require_labels,
)
from evaluations.c2i.outputs import (
    beside_others,
    check_outputs,
    evaluation_settings,
    output_paths,
)
from evaluations.c2i.report import (
    OWN_NAMES,
    as_text,
    compare_with_preset,
    describe_distances,
    markdown,
    settings_of,
    warnings_after,
    warnings_before,
)
from utils.distributed import World, init_distributed
from utils.environment import write_options
from utils.files import atomic_path, require_file, sha256_file
from utils.lock import hold
from utils.logger import progress
from utils.quality import SSIM_WINDOW

PRETRAINED_MODELS = Path(__file__).resolve().parents[2] / "pretrained_models"
NEIGHBOURS = 3


@dataclass(frozen=True)
class Inputs:
    """The networks and the measured reference that every set of samples is evaluated with."""

    args: Namespace
    world: World
    network: FeatureNetwork | None
    dino: FeatureNetwork | None
    reference: ImageSet
    measured_reference: MeasuredSet
    dino_reference: MeasuredSet


def main() -> None:
    """Read options and files, extract features, print and write the metrics."""
    args = parse_args(__doc__)
    world = choose_world(args.device)
    if args.download and not args.inception_weights and world.is_main:
        from evaluations.c2i.inception import download_weights  # takes a second, as below

        download_weights(PRETRAINED_MODELS)
    world.barrier()

    if args.self_check:
        if world.is_main:
            from evaluations.c2i.self_check import self_check

            self_check(args.inception_weights, PRETRAINED_MODELS, args.allow_unknown_weights)
        if args.reference is None:
            return
    if args.reference is None or not args.samples:
        raise ValueError("REF and SAMPLES are required (see --help)")

    reference = open_images(args.reference, "REF")
    sets = [open_images(path, "SAMPLES") for path in args.samples]
    outputs = [output_paths(samples, args) for samples in sets]
    check_outputs([path for pair in outputs for path in pair], args)
    for _, output in outputs:
        hold(Path(f"{output}.lock"), world, str(output))
    for samples in sets:
        check_options(reference, samples, args)

    # reference images are needed for Precision and Recall, and for statistics that are not stored
    read_samples = any(samples.count for samples in sets)
    stored = reference.pool is not None and reference.spatial is not None
    read_reference = reference.count > 0 and (read_samples or not stored)
    network, network_file, own = None, None, None
    if read_samples or read_reference:
        network, network_file, own = load_network(args, world)
    for samples in sets:
        check_files(reference, samples, network, args, world)
    if args.compile and network is not None:
        network.compile()
    dino = None
    if args.dinov2:
        dino = load_dinov2(require_file(args.dinov2, "--dinov2")).to(world.device)

    say(world, "computing reference batch activations...")
    cache, batch = not args.no_cache, args.batch_size
    sha256 = network_file["sha256"] if network_file else ""
    needed = network if read_reference else None
    measured = measure_reference(reference, needed, sha256, cache, batch, world)
    say(world, "computing/reading reference batch statistics...")
    sha256 = sha256_file(args.dinov2) if dino else ""
    images = reference.without_statistics()
    dino_measured = measure_reference(images, dino, sha256, cache, batch, world)

    inputs = Inputs(args, world, network, dino, reference, measured, dino_measured)
    results = []
    settings = evaluation_settings(args, reference, network_file)
    for samples, paths in zip(sets, outputs, strict=True):
        result = evaluate(inputs, samples, own)
        if result is None:
            continue
        result["evaluation"] = settings
        results.append(result)
        text, output = beside_others(*paths, settings, args)
        facts = {"reference_images": reference.count, "network": network_file}
        write_options(output, args, **result, **facts)  # first: it says that the text is ours
        write_text(result, text)
        if not args.feature_network:
            for line in compare_with_preset(result, reference.path):
                print(line)
        name = samples.path.name
        if args.self_check:
            from evaluations.c2i.self_check import compare_with_published

            if table := compare_with_published(name, result["metrics"]):
                print(table)
    if args.markdown and world.is_main:
        with atomic_path(args.markdown) as temporary:
            temporary.write_text(markdown(results))
        print(f"writing to {args.markdown}")


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


def load_network(
    args: Namespace, world: World
) -> tuple[FeatureNetwork, dict[str, str], dict[str, Any] | None]:
    """Return the feature network on its device, path and hash of its file, and, of a network of
    one's own, what its file says of it.
    """
    own = None
    if args.feature_network:
        path = require_file(args.feature_network, "--feature-network")
        network, own = load_classifier(path, "--feature-network")
    else:
        from evaluations.c2i.inception import find_weights, load_inception

        path = find_weights(args.inception_weights, PRETRAINED_MODELS, args.allow_unknown_weights)
        network = load_inception(path)
    say(world, f"feature network: {path} on {world.device}")
    return network.to(world.device), {"path": str(path), "sha256": sha256_file(path)}, own


def check_options(reference: ImageSet, samples: ImageSet, args: Namespace) -> None:
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
    args: Namespace,
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


def evaluate(
    inputs: Inputs, samples: ImageSet, own: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Return all metrics of one sample set and the settings behind them; None on ranks above 0.

    own: see ``load_network``.
    """
    args, world = inputs.args, inputs.world
    warnings = warnings_before(inputs.reference, samples, own)
    for line in warnings if world.is_main else []:
        print(line, file=sys.stderr)

    say(world, "computing sample batch activations...")
    network = inputs.network if samples.count else None
    measured = measure_set(samples, network, "samples", args.batch_size, world)
    say(world, "computing/reading sample batch statistics...")
    dino = inputs.dino if samples.count else None
    images = samples.without_statistics()
    dino_measured = measure_set(images, dino, "DINOv2", args.batch_size, world)
    if not world.is_main:
        return None

    late_warnings = []
    if measured.features is not None:
        late_warnings = warnings_after(samples, measured.features)
    for line in late_warnings:
        print(line, file=sys.stderr)
    say(world, "Computing evaluations...")
    metrics, details = compute_metrics(inputs, samples, measured)
    if dino is not None:
        statistics = (*dino_measured.pool, *inputs.dino_reference.pool)
        metrics["fd_dinov2"] = frechet_distance(*statistics, args.frechet)
    if own is not None:
        metrics = {OWN_NAMES.get(name, name): value for name, value in metrics.items()}
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
        labels = inputs.reference.labels
        by_class = class_frechet(ref.features.pool, labels, features.pool, samples.labels)
        if not by_class:
            raise ValueError("--class-fid: no class has two images in REF and in SAMPLES")
        metrics["class_fid"] = float(np.mean(list(by_class.values())))
        details["fid_of_class"] = by_class
    if args.paired:
        sets = (inputs.reference, samples)
        batches = zip(*(images.batches(args.batch_size) for images in sets), strict=True)
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
