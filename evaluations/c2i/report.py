"""Warnings, settings of the samples, text lines and the Markdown table of the evaluator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from evaluations.c2i.features import ImageFeatures
from evaluations.c2i.image_sets import ImageSet
from evaluations.c2i.metrics import PrecisionRecall

PUBLISHED_SAMPLES = 50_000
TITLES = {
    "inception_score": "Inception Score",
    "fid": "FID",
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


def warnings_before(reference: ImageSet, samples: ImageSet) -> list[str]:
    """Return warnings and notes that need only the files' headers and labels."""
    lines = []
    if not samples.count:
        lines.append(f"note: {samples.path} holds statistics alone: only FID and sFID")
    elif samples.count < PUBLISHED_SAMPLES:
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
    except (OSError, ValueError, KeyError, TypeError):
        return None


def describe_distances(result: PrecisionRecall, exact: bool) -> str:
    """Return a description of the precision of the distances."""
    if exact:
        return "float32 (--exact-distances)"
    text = "float16, as in the TensorFlow evaluator"
    if result.float32_blocks:
        text += f"; {result.float32_blocks} of {result.blocks} blocks overflow and are float32"
    return text


def as_text(metrics: dict[str, float]) -> str:
    """Return one line ``title: value`` per metric, as the published evaluator prints them."""
    return "".join(
        f"{title}: {metrics[name]}\n" for name, title in TITLES.items() if name in metrics
    )


def markdown(results: list[dict[str, Any]]) -> str:
    """Return a table with one row per set of samples: name, number of images, metrics, settings."""
    names = [n for n in TITLES if any(n in r["metrics"] for r in results)]
    rows = [["Samples", "Images", *(TITLES[n] for n in names), "Settings"]]
    rows.append(["---"] + ["---:"] * (len(names) + 1) + ["---"])
    for result in results:
        numbers = [f"{result['metrics'][n]:.4f}" if n in result["metrics"] else "" for n in names]
        options = result["made_with"] or {}
        settings = ", ".join(f"{k} {options[k]}" for k in SETTINGS if k in options)
        rows.append(
            [Path(result["samples"]).name, f"{result['sample_images']:,}", *numbers, settings]
        )
    return "".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |\n" for row in rows
    )
