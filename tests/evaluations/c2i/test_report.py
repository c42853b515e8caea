"""What the evaluator reports: warnings, settings, published figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from evaluations.c2i import report
from evaluations.c2i.image_sets import open_archive
from evaluations.c2i.report import compare_with_preset
from utils.presets import PRESETS


def result_of(metrics, **options):
    made_with = PRESETS["PAR-3B-16x"].options() | {"class_protocol": "random", "precision": "bf16"}
    return {"metrics": metrics, "sample_images": 50_000, "made_with": made_with | options}


def test_expected_beside_measured():
    reference = Path("VIRTUAL_imagenet256_labeled.npz")
    good = compare_with_preset(result_of({"fid": 2.9, "inception_score": 261.0}), reference)
    assert len(good) == 3 and "FID: 2.88 published, 2.9 measured, within" in good[1]
    bad = compare_with_preset(result_of({"fid": 3.5}, cfg_scale=4.0, precision="none"), reference)
    assert "outside of the expected spread of 0.1" in bad[1]
    assert bad[2] == (
        "  not as published: cfg_scale 4.0 instead of 1.5; precision none instead of bf16"
    )
    few = result_of({"fid": 9.0}) | {"sample_images": 1000}
    assert "1,000 images instead of 50,000; the reference is own.npz" in "\n".join(
        compare_with_preset(few, Path("own.npz"))
    )
    puzzling = compare_with_preset(result_of({"fid": 9.0}), reference)
    assert "--self-check" in puzzling[-1]
    assert compare_with_preset({"metrics": {}, "made_with": None}, reference) == []


def test_warnings_that_matter(sets, evaluate):
    images = np.load(sets / "sam.npz")["arr_0"]
    np.savez(
        sets / "sam.npz", arr_0=np.concatenate([images, images[:3]]), labels=np.arange(28) // 10
    )
    err = evaluate(sets).err
    assert "3 of 28 images of sam.npz are copies" in err
    assert "samples are sorted by class" in err
    warnings = json.loads((sets / "sam.metrics.json").read_text())["warnings"]
    assert len(warnings) == 3  # and few images
    assert "sorted" not in evaluate(sets, sam="ref.npz").err


def test_other_sizes_are_said(sets):
    reference, samples = (open_archive(sets / "ref.npz", "REF") for _ in range(2))
    assert report.warnings_before(reference, samples)[1:] == []
    np.savez(sets / "small.npz", arr_0=np.zeros((5, 4, 6, 3), np.uint8))
    small = open_archive(sets / "small.npz", "SAMPLES")
    assert "sample images are 6x4, the reference's 8x8" in " ".join(
        report.warnings_before(reference, small)
    )
