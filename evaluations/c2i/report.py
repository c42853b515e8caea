"""What the evaluator says beside its numbers: warnings before and after, settings of the samples, a Markdown table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from evaluations.c2i.features import ImageFeatures
from evaluations.c2i.image_sets import ImageSet

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
    """What the user should know about the numbers before they come."""
    found = []
    if not samples.count:
        found.append(f"note: {samples.path} holds statistics alone: FID and sFID only")
    elif samples.count < PUBLISHED_SAMPLES:
        found.append(
            f"warning: {samples.count:,} sample images; published figures take {PUBLISHED_SAMPLES:,}, "
            "and fewer give a higher FID"
        )
    if samples.count and not reference.count:
        found.append(f"note: {reference.path} holds statistics alone: no Precision, no Recall")
    if samples.shape and reference.shape and samples.shape[1:] != reference.shape[1:]:
        sizes = [f"{s.shape[2]}x{s.shape[1]}" for s in (samples, reference)]
        found.append(f"warning: sample images are {sizes[0]}, the reference's {sizes[1]}; published figures take equal")
    labels = samples.labels
    if labels is not None and len(np.unique(labels)) > 1 and (np.diff(labels) >= 0).all():
        found.append(
            "warning: samples are sorted by class; the Inception Score is taken over runs of 5,000 in file order "
            "and comes out lower"
        )
    return found


def warnings_after(samples: ImageSet, features: ImageFeatures) -> list[str]:
    """What only the images themselves could tell."""
    repeated = len(features.hashes) - len(np.unique(features.hashes))
    if not repeated:
        return []
    return [f"warning: {repeated:,} of {samples.count:,} images of {samples.path} are copies of others"]


def settings_of(samples: Path) -> dict[str, Any] | None:
    """The options in the JSON that the sampler wrote beside the samples; None if there is none to read."""
    try:
        place = samples.resolve() if samples.is_dir() else samples.with_suffix("")
        options = json.loads(place.with_name(f"{place.name}.json").read_text())["options"]
        return options if isinstance(options, dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def text_lines(metrics: dict[str, float]) -> str:
    """The published lines, ``title: value``."""
    return "".join(f"{title}: {metrics[name]}\n" for name, title in TITLES.items() if name in metrics)


def markdown(results: list[dict[str, Any]]) -> str:
    """A table with one row per sample file: its name, images, numbers and settings."""
    names = [n for n in TITLES if any(n in r["metrics"] for r in results)]
    rows = [["Samples", "Images", *(TITLES[n] for n in names), "Settings"]]
    rows.append(["---"] + ["---:"] * (len(names) + 1) + ["---"])
    for result in results:
        numbers = [f"{result['metrics'][n]:.4f}" if n in result["metrics"] else "" for n in names]
        made = result["made_with"] or {}
        settings = ", ".join(f"{k} {made[k]}" for k in SETTINGS if k in made)
        rows.append([Path(result["samples"]).name, f"{result['sample_images']:,}", *numbers, settings])
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |\n" for row in rows)
