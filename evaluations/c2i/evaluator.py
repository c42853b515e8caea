"""FID, sFID, Inception Score, Precision and Recall of generated images against a reference set.

REF and each SAMPLES: an .npz with images (arr_0, uint8 N x H x W x 3), stored statistics (mu, sigma and mu_s,
sigma_s), or both; or a folder of images. Numbers out: to the screen, to a .txt and to a .metrics.json beside the
samples. Under torchrun the images are shared among the processes.
"""

from __future__ import annotations

import argparse
import sys
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
from evaluations.c2i.features import FeatureNetwork, Features
from evaluations.c2i.image_archive import ImageSet, open_images
from evaluations.c2i.inception import download_weights, find_weights, load_inception
from evaluations.c2i.measured_set import MeasuredSet, measure_reference, measure_set, reference_hashes
from evaluations.c2i.metrics import (
    PrecisionRecall,
    class_accuracy,
    frechet_distance,
    inception_score,
    precision_recall,
    require_labels,
)
from evaluations.c2i.report import markdown, settings_of, text_lines, warnings_after, warnings_before
from evaluations.c2i.self_check import compare_with_published, self_check
from utils.distributed import World, init_distributed
from utils.files import atomic_path, prepare_folder, require_file, sha256_file
from utils.logger import progress
from utils.options import make_parser, positive_int, run_main, write_options
from utils.quality import SSIM_WINDOW

PRETRAINED_MODELS = Path(__file__).resolve().parents[2] / "pretrained_models"
NEIGHBOURS = 3


def main() -> None:
    """Read options and files, extract features, print and write the numbers."""
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
    outputs = [output_paths(s, args) for s in sets]
    check_outputs([path for pair in outputs for path in pair], args)
    needed = any(s.count for s in sets), any(reference_needs_images(reference, s) for s in sets)
    network, network_file = load_network(args, world) if any(needed) else (None, None)
    for samples in sets:
        check_files(reference, samples, network, args, world)
    if args.compile and network is not None:
        network.compile()
    dino = load_dinov2(require_file(args.dinov2, "--dinov2")).to(world.device) if args.dinov2 else None

    say(world, "computing reference batch activations...")
    keep, batch = needed[1] and not args.no_cache, args.batch_size
    hashes = reference_hashes(reference, network_file["sha256"] if network_file else "", keep and world.is_main)
    measured = measure_reference(reference, network if needed[1] else None, hashes, keep, batch, world)
    say(world, "computing/reading reference batch statistics...")
    dino_hashes = [hashes[0], sha256_file(args.dinov2)] if dino else []
    dino_reference = (
        measure_reference(reference.without_statistics(), dino, dino_hashes, keep, batch, world) if dino else None
    )
    results = []
    for samples, (text, output) in zip(sets, outputs, strict=True):
        result = evaluate(reference, measured, samples, network, args, world)
        if dino is not None and samples.count:
            found = measure_set(samples.without_statistics(), dino, "DINOv2", batch, world)
            if world.is_main:
                result["metrics"]["fd_dinov2"] = frechet_distance(*found.pool, *dino_reference.pool, args.frechet)
        if world.is_main:
            finish(result, text)
            table = compare_with_published(samples.path.name, result["metrics"]) if args.self_check else None
            if table:
                print(table)
            write_options(output, args, **result, reference_images=reference.count, network=network_file)
        results.append(result)
    if args.markdown and world.is_main:
        with atomic_path(args.markdown) as temporary:
            temporary.write_text(markdown(results))
        print(f"writing to {args.markdown}")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(
        __doc__, "python3 evaluations/c2i/evaluator.py VIRTUAL_imagenet256_labeled.npz samples/samples.npz"
    )
    parser.add_argument("reference", metavar="REF", nargs="?", help="reference .npz or folder of images")
    parser.add_argument("samples", metavar="SAMPLES", nargs="*", help="sample .npz or folder; one or several")
    group = parser.add_argument_group("feature network")
    group.add_argument(
        "--inception-weights",
        metavar="FILE",
        help="weights of the 2015 Inception, .pb or .pth (else looked for in pretrained_models/)",
    )
    group.add_argument("--allow-unknown-weights", action="store_true", help="take weights of any size and sha256")
    group.add_argument("--download", action="store_true", help="fetch the weights once if they are not there")
    group.add_argument(
        "--feature-network", metavar="FILE", help="classifier of train_classifier.py to use instead of Inception"
    )
    group.add_argument(
        "--self-check",
        action="store_true",
        help="check weights, resize, network and formulas against stored numbers; REF and SAMPLES may be left out",
    )
    group = parser.add_argument_group("how the published numbers are computed")
    group.add_argument(
        "--exact-distances", action="store_true", help="float32 distances for Precision and Recall, not float16"
    )
    group.add_argument(
        "--frechet",
        choices=["symmetric", "sqrtm"],
        default="symmetric",
        help="trace of FID by eigenvalues, or by scipy's matrix square root as published (slower, equal to 1e-9)",
    )
    group = parser.add_argument_group("further numbers, off by default")
    group.add_argument("--kid", action="store_true", help="kernel distance, mean and deviation over 100 subsets")
    group.add_argument("--dinov2", metavar="FILE", help="FD-DINOv2, with timm's weights of its ViT-L/14")
    group.add_argument("--class-fid", action="store_true", help="FID within each class; both sets need labels")
    group.add_argument(
        "--bootstrap", type=positive_int, metavar="DRAWS", help="95%% interval of FID over resampled images"
    )
    group.add_argument(
        "--paired",
        action="store_true",
        help="PSNR and SSIM of image i of SAMPLES with image i of REF, for tokenizers (FID is then rFID)",
    )
    group = parser.add_argument_group("running")
    group.add_argument("--batch-size", type=positive_int, default=64, help="images a forward pass")
    group.add_argument(
        "--compile", action="store_true", help="torch.compile the feature network; pays from some 10,000 images on"
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1 or mps (else the best there is)")
    group.add_argument(
        "--no-cache", action="store_true", help="do not keep the reference's features in a file beside it"
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output", metavar="JSON", help="numbers, options and environment (default: SAMPLES.metrics.json)"
    )
    group.add_argument("--markdown", metavar="FILE", help="write a Markdown table, one row for each SAMPLES")
    return parser.parse_args()


def output_paths(samples: ImageSet, args: argparse.Namespace) -> tuple[Path, Path]:
    """Where text and JSON go, checked: ``x.npz`` -> ``x.txt``, ``x.metrics.json``; the same beside a folder ``x``.

    A file of another name is refused, for its text could replace the file itself.
    """
    if not samples.path.is_dir() and samples.path.suffix != ".npz":
        raise ValueError(f"SAMPLES: the name of {samples.path} does not end in .npz, so the .txt beside it has no name")
    if args.output and len(args.samples) > 1:
        raise ValueError("--output names one file; leave it out where there are several SAMPLES")
    place = samples.path.resolve() if samples.path.is_dir() else samples.path.with_suffix("")
    text = place.with_name(f"{place.name}.txt")
    output = Path(args.output or place.with_name(f"{place.name}.metrics.json"))
    for path, option in ((output, "--output"), (Path(args.markdown or output), "--markdown")):
        prepare_folder(path.parent, option)
        if path.is_dir():
            raise ValueError(f"{option}: {path} is a folder; give the name of a file")
    return text, output


def check_outputs(outputs: list[Path], args: argparse.Namespace) -> None:
    """Refuse to write over what is read, or to write two results to one place."""
    read = (args.reference, *args.samples, args.inception_weights, args.feature_network, args.dinov2)
    taken = {Path(p).resolve() for p in read if p}
    for path in [*outputs, *([Path(args.markdown)] if args.markdown else [])]:
        if path.resolve() in taken:
            raise ValueError(f"{path} would be written over: it is read or written already; give another name")
        taken.add(path.resolve())


def choose_world(name: str | None) -> World:
    """This process among its peers, on the device of that name, tried out, or on the best there is."""
    world = init_distributed()
    if name is None:
        return world
    try:
        device = torch.empty(0, device=name).device
        if world.size > 1 and device.type == "cuda":
            raise ValueError(f"--device {name}: {world.size} processes take a GPU each; leave it out")
        return World(world.rank, world.size, device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name} cannot be used: {str(error).splitlines()[0]}") from error


def reference_needs_images(reference: ImageSet, samples: ImageSet) -> bool:
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
    say(world, f"features by {path} on {world.device}")
    return network.to(world.device), {"path": str(path), "sha256": sha256_file(path)}


def check_files(
    reference: ImageSet,
    samples: ImageSet,
    network: FeatureNetwork | None,
    args: argparse.Namespace,
    world: World,
) -> None:
    """Find what would end in an error later on, by the first image of each file."""
    sizes: dict[str, set[int]] = {"pool": set(), "spatial": set()}
    for images in (reference, samples):
        for kind, stored in (("pool", images.pool), ("spatial", images.spatial)):
            if stored is not None:
                sizes[kind].add(len(stored.mu))
        if network is None or not images.count:
            continue
        if images.count <= NEIGHBOURS:
            raise ValueError(f"{images.path} holds {images.count} images, at least {NEIGHBOURS + 1} are needed")
        check_values(images, args.batch_size)
        first = first_features(images, network, world)
        sizes["pool"].add(first.pool.shape[1])
        if first.spatial is not None:
            sizes["spatial"].add(first.spatial.shape[1])
        if args.feature_network and images is samples and samples.labels is not None:
            require_labels(samples.labels, samples.count, first.probabilities.shape[1])
    for kind, found in sizes.items():
        if len(found) > 1:
            numbers = " and ".join(str(n) for n in sorted(found))
            raise ValueError(
                f"stored statistics and network do not belong together: {kind} features of {numbers} values"
            )
    for option, wanted in (("--kid", args.kid), ("--dinov2", args.dinov2)):
        if wanted and not (reference.count and samples.count):
            raise ValueError(f"{option} needs the images of REF and SAMPLES, not statistics alone")
    if args.bootstrap and not samples.count:
        raise ValueError(f"--bootstrap needs the images of SAMPLES; {samples.path} holds statistics alone")
    if args.class_fid and (reference.labels is None or samples.labels is None):
        raise ValueError("--class-fid needs labels of REF and SAMPLES (an array `labels` in each .npz)")
    if args.paired and (reference.shape != samples.shape or not samples.count):
        raise ValueError(f"--paired: REF holds {reference.shape}, SAMPLES {samples.shape}; expected the same images")
    if args.paired and samples.shape and min(samples.shape[1:3]) < SSIM_WINDOW:
        raise ValueError(f"--paired: images of {samples.path} are smaller than SSIM's window of {SSIM_WINDOW} pixels")


def check_values(images: ImageSet, batch_size: int) -> None:
    """Refuse images in [0, 1]: nothing of a whole batch is brighter."""
    peak = next(images.batches(batch_size)).max().item()
    if peak <= 1:
        raise ValueError(f"{images.path}: the first images have no value above {peak:g}, expected values in 0..255")


@torch.inference_mode()
def first_features(images: ImageSet, network: FeatureNetwork, world: World) -> Features:
    """Features of the first image alone."""
    return network(next(images.batches(1)).to(world.device))


def evaluate(
    reference: ImageSet,
    ref: MeasuredSet,
    samples: ImageSet,
    network: FeatureNetwork | None,
    args: argparse.Namespace,
    world: World,
) -> dict[str, Any]:
    """All numbers of one set of samples, and how they were come by; numbers on rank 0 only."""
    warnings = warnings_before(reference, samples)
    for line in warnings if world.is_main else []:
        print(line, file=sys.stderr)
    say(world, "computing sample batch activations...")
    measured = measure_set(samples, network if samples.count else None, "samples", args.batch_size, world)
    say(world, "computing/reading sample batch statistics...")
    result = {"samples": str(samples.path), "sample_images": samples.count, "made_with": settings_of(samples.path)}
    result |= {"metrics": {}, "distances": None, "warnings": warnings}
    if not world.is_main:
        return result
    say(world, "Computing evaluations...")
    metrics, features = result["metrics"], measured.features
    metrics["fid"] = frechet_distance(*measured.pool, *ref.pool, args.frechet)
    if ref.spatial is not None and measured.spatial is not None:
        metrics["sfid"] = frechet_distance(*measured.spatial, *ref.spatial, args.frechet)
    if features is not None:
        metrics["inception_score"] = inception_score(features.probabilities)
        if args.feature_network and samples.labels is not None:
            metrics["class_accuracy"] = class_accuracy(features.probabilities, samples.labels)
        for line in warnings_after(samples, features):
            warnings.append(line)
            print(line, file=sys.stderr)
    if features is not None and ref.features is not None:
        found = precision_recall(ref.features.pool, features.pool, NEIGHBOURS, args.exact_distances, world.device)
        metrics |= {"precision": found.precision, "recall": found.recall}
        result["distances"] = describe_distances(found, args.exact_distances)
    further_metrics(result, reference, ref, samples, measured, args, world)
    return result


def further_metrics(
    result: dict[str, Any],
    reference: ImageSet,
    ref: MeasuredSet,
    samples: ImageSet,
    measured: MeasuredSet,
    args: argparse.Namespace,
    world: World,
) -> None:
    """What the options ask for beside the published numbers, into ``result``."""
    metrics = result["metrics"]
    if args.kid:
        mean, deviation = kernel_distance(ref.features.pool, measured.features.pool)
        metrics |= {"kid": mean, "kid_std": deviation}
    if args.bootstrap:
        low, high = frechet_interval(ref.pool, measured.features.pool, metrics["fid"], args.bootstrap, world)
        metrics |= {"fid_low": low, "fid_high": high}
    if args.class_fid:
        by_class = class_frechet(ref.features.pool, reference.labels, measured.features.pool, samples.labels)
        if not by_class:
            raise ValueError("--class-fid: no class has two images in REF and in SAMPLES")
        metrics["class_fid"] = float(np.mean(list(by_class.values())))
        result["fid_of_class"] = by_class
    if args.paired:
        batches = zip(reference.batches(args.batch_size), samples.batches(args.batch_size), strict=True)
        count = -(-samples.count // args.batch_size)
        pairs = progress(world, "PSNR and SSIM", count, unit="batch", items=batches)
        metrics["psnr"], metrics["ssim"] = paired_quality(pairs, world.device)


def describe_distances(result: PrecisionRecall, exact: bool) -> str:
    """Which precision the distances had."""
    if exact:
        return "float32 (--exact-distances)"
    text = "float16, as in the TensorFlow evaluator"
    if result.float32_blocks:
        text += f"; {result.float32_blocks} of {result.blocks} blocks overflow and are float32"
    return text


def finish(result: dict[str, Any], text_path: Path) -> None:
    """Print the numbers, write them to ``text_path``."""
    lines = text_lines(result["metrics"])
    print(lines, end="")
    if result["distances"]:
        print(f"distances: {result['distances']}")
    print(f"writing to {text_path}")
    with atomic_path(text_path) as temporary:
        temporary.write_text(lines)


def say(world: World, line: str) -> None:
    """Print on rank 0, at once."""
    if world.is_main:
        print(line, flush=True)


if __name__ == "__main__":
    run_main(main)
