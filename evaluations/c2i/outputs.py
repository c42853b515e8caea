"""Where the evaluator writes: never over what it has not written."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from evaluations.c2i.image_sets import ImageSet
from utils.files import prepare_folder
from utils.npz import short_hash


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
