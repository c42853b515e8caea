"""Warnings, settings of the samples, text lines and the Markdown table of the evaluator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from evaluations.c2i.features import ImageFeatures
from evaluations.c2i.image_sets import ImageSet
from evaluations.c2i.metrics import PrecisionRecall
from utils.presets import PRESETS, TOLERANCE, preset_of

PUBLISHED_SAMPLES = 50_000
PUBLISHED_REFERENCE = "VIRTUAL_imagenet256_labeled.npz"
# options of the published samplers that a preset does not name
PUBLISHED_SETTINGS = {
    "cfg_interval": -1,
    "cfg_schedule": "constant",
    "class_protocol": "random",
    "quantize": "none",
    "precision": "bf16",
}
# metrics by a network of the user's own have names of their own: only Inception's are FID and IS
OWN_NAMES = {
    "inception_score": "class_score",
    "fid": "frechet_distance",
    "fid_low": "frechet_low",
    "fid_high": "frechet_high",
    "class_fid": "class_frechet",
}
TITLES = {
    "inception_score": "Inception Score",
    "class_score": "Class score",
    "fid": "FID",
    "frechet_distance": "Frechet distance",
    "sfid": "sFID",
    "precision": "Precision",
    "recall": "Recall",
    "class_accuracy": "Class accuracy",
    "kid": "KID",
    "kid_std": "KID standard deviation",
    "fd_dinov2": "FD-DINOv2",
    "fid_low": "FID 95% low",
    "fid_high": "FID 95% high",
    "class_fid": "Mean FID per class",
    "frechet_low": "Frechet distance 95% low",
    "frechet_high": "Frechet distance 95% high",
    "class_frechet": "Mean Frechet distance per class",
    "psnr": "PSNR",
    "ssim": "SSIM",
}
SETTINGS = (
    "gpt_model",
    "ar_token_num",
    "cfg_scale",
    "cfg_schedule",
    "temperature",
    "top_k",
    "top_p",
    "num_fid_samples",
)


def warnings_before(
    reference: ImageSet, samples: ImageSet, own: dict[str, Any] | None = None
) -> list[str]:
    """Return warnings and notes that need only the files' headers and labels.

    own: what the file of a network of one's own says of it.
    """
    lines = [] if own is None else [describe_own_network(own)]
    if not samples.count:
        lines.append(f"note: {samples.path} holds statistics alone: only FID and sFID")
    elif samples.count < PUBLISHED_SAMPLES and own is None:
        lines.append(
            f"warning: {samples.count:,} sample images; published figures use "
            f"{PUBLISHED_SAMPLES:,}, and fewer raise FID"
        )
    if samples.count and not reference.count:
        lines.append(f"note: {reference.path} holds statistics alone: no Precision, no Recall")
    if samples.shape and reference.shape and samples.shape[1:] != reference.shape[1:]:
        sizes = [f"{s.shape[2]}x{s.shape[1]}" for s in (samples, reference)]
        lines.append(
            f"warning: sample images are {sizes[0]}, the reference's {sizes[1]}; "
            "published figures use one size"
        )
    labels = samples.labels
    if labels is not None and len(np.unique(labels)) > 1 and (np.diff(labels) >= 0).all():
        lines.append(
            "warning: samples are sorted by class; the Inception Score is computed per 5,000 "
            "images in file order and will be too low"
        )
    return lines


def describe_own_network(facts: dict[str, Any]) -> str:
    """Return a line on how far the features of a classifier of one's own can be trusted."""
    text = "features of your own network: Frechet distance and class score, not FID and IS, "
    text += "comparable only between runs with this file and reference"
    accuracy, classes = facts.get("test_accuracy"), len(facts.get("classes") or ())
    if not isinstance(accuracy, float) or not classes:
        return f"warning: {text}; its accuracy on held-out images is not recorded"
    if accuracy < max(0.5, 2 / classes):
        return f"warning: {text}; it reads only {accuracy:.1%} of held-out images right: too weak"
    return f"note: {text}; it reads {accuracy:.1%} of held-out images right"


def warnings_after(samples: ImageSet, features: ImageFeatures) -> list[str]:
    """Return a warning about duplicate images, if there are any."""
    repeated = len(features.hashes) - len(np.unique(features.hashes))
    if not repeated:
        return []
    return [
        f"warning: {repeated:,} of {samples.count:,} images of {samples.path} are copies of others"
    ]


def settings_of(samples: Path) -> dict[str, Any] | None:
    """Return the sampler's options from the JSON beside the samples; None if unreadable."""
    try:
        base = samples.resolve() if samples.is_dir() else samples.with_suffix("")
        options = json.loads(base.with_name(f"{base.name}.json").read_text())["options"]
        return options if isinstance(options, dict) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def describe_distances(result: PrecisionRecall, exact: bool) -> str:
    """Return a description of the precision of the distances."""
    if exact:
        return "float32 (--exact-distances)"
    text = "float16, as in the TensorFlow evaluator"
    if result.float32_blocks:
        text += f"; {result.float32_blocks} of {result.blocks} blocks overflow and are float32"
    return text


def compare_with_preset(result: dict[str, Any], reference: Path) -> list[str]:
    """Return lines with the published beside the measured metrics, if a released model made the
    samples, and what about these samples commonly explains a difference.

    result: of one set of samples, by the published network.
    """
    options = result["made_with"] or {}
    name = preset_of(options)
    if name is None:
        return []
    lines, outside = [f"{name}, published beside measured:"], False
    for metric, published in PRESETS[name].published.items():
        if (measured := result["metrics"].get(metric)) is None:
            continue
        within = abs(measured - published) <= TOLERANCE[metric]
        outside |= not within
        verdict = "within" if within else "outside of"
        lines.append(
            f"  {TITLES[metric]}: {published} published, {measured:.4g} measured, {verdict} the "
            f"expected spread of {TOLERANCE[metric]}"
        )
    causes = differences_from_published(result, reference, name)
    if causes:
        lines.append(f"  not as published: {'; '.join(causes)}")
    elif outside:
        lines.append("  no setting differs; check this evaluator with --self-check, and the files")
    return lines


def differences_from_published(result: dict[str, Any], reference: Path, name: str) -> list[str]:
    """Return what differs between these samples and those of the published figures."""
    options = result["made_with"]
    published = PRESETS[name].options() | PUBLISHED_SETTINGS
    del published["gpt_ckpt"], published["vq_ckpt"]
    causes = [
        f"{option} {options[option]} instead of {value}"
        for option, value in published.items()
        if option in options and options[option] != value
    ]
    if result["sample_images"] != PUBLISHED_SAMPLES:
        causes.append(f"{result['sample_images']:,} images instead of {PUBLISHED_SAMPLES:,}")
    if reference.name != PUBLISHED_REFERENCE:
        causes.append(f"the reference is {reference.name} instead of {PUBLISHED_REFERENCE}")
    return causes


def evaluated_with(evaluation: dict[str, Any]) -> str:
    """Return the settings that make a number, in one line: reference, network, distances."""
    return ", ".join(
        f"{name} {Path(value).name if name == 'reference' else str(value)[:16]}"
        for name, value in evaluation.items()
        if value is not None
    )


def as_text(metrics: dict[str, float]) -> str:
    """Return one line ``title: value`` per metric, as the published evaluator prints them."""
    return "".join(
        f"{title}: {metrics[name]}\n" for name, title in TITLES.items() if name in metrics
    )


def markdown(results: list[dict[str, Any]]) -> str:
    """Return a table with one row per set of samples: name, number of images, metrics, settings."""
    names = [n for n in TITLES if any(n in r["metrics"] for r in results)]
    rows = [["Samples", "Images", *(TITLES[n] for n in names), "Settings", "Evaluated with"]]
    rows.append(["---"] + ["---:"] * (len(names) + 1) + ["---", "---"])
    for result in results:
        numbers = [f"{result['metrics'][n]:.4f}" if n in result["metrics"] else "" for n in names]
        options = result["made_with"] or {}
        settings = ", ".join(f"{k} {options[k]}" for k in SETTINGS if k in options)
        first = [Path(result["samples"]).name, f"{result['sample_images']:,}"]
        rows.append([*first, *numbers, settings, evaluated_with(result.get("evaluation") or {})])
    return "".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |\n" for row in rows
    )
