"""Every benchmark at a tiny size: a refactoring must not break unseen what the README's figures
are measured by.
"""

import json
import re
import runpy
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models import gpt
from scripts.benchmarks import common
from tests.helpers import ROOT
from tokenizer.vq_model import VectorQuantizer

TRAINING_FIGURES = {"over published", "seconds", "first loss", "last loss", "peak GiB"}


@pytest.fixture
def measure(tmp_path, monkeypatch, capsys):
    """``measure(name, *options)``: the results that a benchmark writes, and what it prints.

    Each way runs in this process, as starting one takes longer than the way, and blocks
    are not compiled.
    """

    def run(script: str, *words: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [script, *map(str, words)])
            patch.setattr(sys, "path", [*sys.path])
            # what published ways replace is put back
            patch.setattr(gpt, "attend", gpt.attend)
            patch.setattr(gpt.Dropout, "forward", gpt.Dropout.forward)
            patch.setattr(VectorQuantizer, "search", VectorQuantizer.search)
            runpy.run_path(script, run_name="__main__")

    def run_way(script: str, environment: dict, **options: object) -> None:
        assert environment.items() <= common.ALLOCATOR.items()
        run(
            script,
            *(
                word
                for name, value in options.items()
                for word in (f"--{name.replace('_', '-')}", value)
            ),
        )

    def measured(name: str, *options: object) -> tuple[dict, str]:
        output = tmp_path / "figures.json"
        run(str(ROOT / "scripts" / "benchmarks" / f"{name}.py"), "--output", output, *options)
        report = json.loads(output.read_text())
        assert report.keys() == {"options", "results", "device", "threads", "git"}
        assert report["device"] and report["threads"] >= 1
        return report["results"], capsys.readouterr().out

    monkeypatch.setattr(common, "run_way", run_way)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *args, **named: None)
    return measured


def assert_positive(figures: dict) -> None:
    """All numbers in ``figures``, at any depth, are finite and above 0."""
    for key, value in figures.items():
        if isinstance(value, dict):
            assert_positive(value)
        elif not isinstance(value, str):
            assert np.isfinite(value) and value > 0, key


def test_allocator_settings_are_those_of_launch_sh():
    """Published ways, ours and the doctor's checks run under the settings of the commands."""
    text = (ROOT / "scripts" / "launch.sh").read_text()
    settings = dict(re.findall(r"\b(MALLOC_\w+|GLIBC_\w+|GOMP_\w+)=\$\{\1:-([^}]*)\}", text))
    assert settings == common.ALLOCATOR


@pytest.mark.slow
def test_sampling(measure):
    options = (
        "--gpt-model", "GPT-T", "--ar-token-num", 64, "--batch", 1, "--precision", "none",
        "--repeats", 1,
    )  # fmt: skip
    results, printed = measure(
        "sampling", *options, "--ways", "published", "fused", "eager", "compiled"
    )
    assert [(r["way"], r["n"], r["batch"], r["precision"]) for r in results] == [
        (way, 64, 1, "none") for way in ("published", "fused", "eager", "compiled")
    ]
    for result in results:
        logit_error = result.pop("logit error", 0.0)
        assert_positive(result)
        assert result["calls"] == 64 + 576 // 64 - 1 and logit_error < 1e-4
        assert f"{result['way']:9} {result['seconds']:7.2f} s" in printed
    assert "equal tokens" not in results[2] and results[3].get("equal tokens", 1.0) > 0.99


@pytest.mark.slow
def test_training(measure):
    options = (
        "--gpt-model", "GPT-T", "--ar-token-num", 16, "--batch", 1, "--steps", 1,
        "--precision", "none",
    )  # fmt: skip
    results, printed = measure("training", *options)
    assert list(results["none"]) == [
        "published, default malloc",
        "published",
        "ours",
        "ours, compiled",
    ]
    losses = [figures["first loss"] for figures in results["none"].values()]
    assert losses == pytest.approx([losses[0]] * 4, rel=0.05)  # dropout draws differ
    for way, figures in results["none"].items():
        assert_positive(figures)
        assert figures.keys() == TRAINING_FIGURES | {"tokens/s", "mfu", "peak TFLOP/s"}
        assert f"{way:27} {figures['seconds']:8.3f} s/step" in printed


@pytest.mark.slow
def test_tokenizer(measure):
    options = (
        "--vq-model", "VQ-4", "--image-size", 32, "--batch", 1, "--steps", 1,
        "--precision", "none",
    )  # fmt: skip
    results, printed = measure("tokenizer", *options)
    assert list(results["none"]) == [
        "published",
        "ours, before disc-start",
        "ours, from disc-start",
    ]
    for way, figures in results["none"].items():
        assert_positive(figures)
        assert figures.keys() == TRAINING_FIGURES | {"images/s"}
        assert f"{way:24} {figures['seconds']:8.3f} s/step" in printed


@pytest.mark.slow
def test_codes(measure, tmp_path):
    (tmp_path / "images" / "ape").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 44, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "ape" / "0.png")
    options = (
        "--data-path", tmp_path / "images", "--images", 1, "--image-size", 32,
        "--loaded-images", 300,
    )  # fmt: skip
    results, printed = measure("codes", *options, "--work", tmp_path)
    extraction, loading = results["extraction"], results["loading"]
    ways = ("published", "published, memory kept", "ours", "ours, bf16")
    for key in ("images/s", "peak GiB", "ratio", "codes equal"):
        assert {f"{way}: {key}" for way in ways} <= extraction.keys()
    assert (
        extraction["published, memory kept: codes equal"] == extraction["ours: codes equal"] == 1.0
    )
    assert {f"ratio, {kind}" for kind in ("cold", "warm", "disk")} <= loading.keys()
    assert_positive(results)
    assert "extraction" in printed and f"{loading['ratio, disk']:,.3f}" in printed
    assert not list(tmp_path.glob("par-codes-*"))


@pytest.mark.slow
def test_evaluator(measure):
    results, printed = measure(
        "evaluator", "--batch-size", 1, "--repeats", 1, "--features", 100, "--width", 64
    )
    assert results["images/s"].keys() == {"straightforward", "ours"}
    assert results["frechet s"].keys() == {"sqrtm", "symmetric"}
    assert results["precision s"].keys() == {"half", "float32"}
    assert_positive(results)
    assert float(re.search(r"differ by (\S+)", printed)[1]) < 1e-3


@pytest.mark.slow
def test_a_way_runs_in_a_process_of_its_own(tmp_path):
    options = dict(
        gpt_model="GPT-T", ar_token_num=64, batch=1, precision="none", way="eager", repeats=1
    )
    script = str(ROOT / "scripts" / "benchmarks" / "sampling.py")
    figures = common.figures_of(script, common.ALLOCATOR, str(tmp_path), **options)
    assert figures["decoder"] == "torch's operators in float32"
    assert_positive(figures)


def test_jacobi(measure):
    checkpoint = ROOT / "pretrained_models" / "small" / "digits-4x"
    results, printed = measure(
        "jacobi", "--gpt-ckpt", checkpoint, "--images", 3, "--batch", 1, 3, "--windows", 4,
        "--cfg-scales", 1.5,
    )  # fmt: skip
    (rows,) = results.values()
    assert [(r["noise"], r["batch"], r["window"]) for r in rows] == [
        (noise, batch, window)
        for noise in ("uniform", "gumbel")
        for batch in (1, 3)
        for window in (1, 4)
    ]
    for row in rows:
        assert_positive({k: v for k, v in row.items() if k != "schedule"})
        assert row["equal images"] == 1 and row["calls"] <= row["steps"] == 19
    assert "of 19 calls" in printed


@pytest.mark.slow
def test_scale(measure):
    results, printed = measure(
        "scale", "--images", 30, "--files", 3, "--samples", 9, 20, "--side", 8
    )  # fmt: skip
    figures = results["images"]["30"]
    assert_positive({k: v["seconds"] for k, v in figures.items() if k != "shards"})
    ways = [*figures.values(), *results["samples"].values()]
    assert_positive({(i, k): way[k] for i, way in enumerate(ways) for k in ("processor", "MiB")})
    assert "| finishing (meta.json): s |" in printed and "| a claim, ms |" in printed
    assert "| samples | 9 | 20 |" in printed


def test_scale_in_parts(measure):
    results, printed = measure("scale", "--parts", "claims", "--files", 3, 5)
    assert results.keys() == {"claims"} and results["claims"].keys() == {"3", "5"}
    assert "| files in the folder | 3 | 5 |" in printed and "samples" not in printed
