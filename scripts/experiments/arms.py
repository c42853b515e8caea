"""Arms of an experiment: a GPT trained with some options, its losses on held-out images, samples.

Losses are in nats, of the same images for every arm, so that differences between arms are paired.
The total correlation of tokens predicted at once, given all before them, is what predicting in
parallel gives up; with models that learned the true conditionals the difference of losses is it.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoregressive.models.load import load_gpt
from dataset.codes import Codes, open_codes
from scripts.benchmarks.common import write_results
from scripts.experiments.common import newest, run, save_figure
from scripts.experiments.data import Data, add_data_options, prepare
from scripts.experiments.plots import draw_intervals, panels
from utils.files import atomic_path
from utils.options import make_parser, positive_int

BATCH = 100


@dataclass(frozen=True)
class Arm:
    """What is trained: n, the trainer's options beside the recipe, and the size."""

    n: int
    options: tuple[object, ...] = ()
    gpt_model: str = "GPT-T"


def add_training_options(parser: ArgumentParser, samples: int = 5000, losses: bool = True) -> None:
    """Add the options of ``run_arms``; without ``losses`` only those that models need."""
    add_data_options(parser)
    group = parser.add_argument_group("models")
    group.add_argument("--arms", nargs="+", metavar="ARM", help="only these (default: all)")
    group.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the training")
    group.add_argument("--epochs", type=positive_int, default=6, help="epochs of training")
    if losses:
        group.add_argument("--val-images", type=positive_int, default=1000, help="held-out images")
    group.add_argument(
        "--samples", type=int, default=samples, help="samples for the Frechet distance; 0: none"
    )


def check_arms(args: Namespace, arms: Collection[str]) -> None:
    """Raise ``ValueError`` if ``--arms`` names one that is not among ``arms``."""
    if unknown := [name for name in args.arms or () if name not in arms]:
        raise ValueError(f"--arms: there is no {', '.join(unknown)}; there are {', '.join(arms)}")


def run_arms(args: Namespace, arms: dict[str, Arm]) -> dict[str, list[dict[str, Any]]]:
    """Train and judge every arm with every seed, unless that is done; return results per arm.

    Each has ``weights`` (.pt), ``losses``, the .npz of ``measure_losses``, ``nats``, their mean per
    image, ``steps``, forward calls per image, and with ``--samples`` ``frechet_distance``.
    """
    check_arms(args, arms)
    if args.quick:
        args.samples, args.val_images, args.seeds = min(args.samples, 100), 30, args.seeds[:1]
        args.arms = args.arms or list(arms)[:2]
    data, results = prepare(args), {}
    for name in args.arms or arms:
        results[name] = [run_arm(args, data, arms[name], seed) for seed in args.seeds]
    return results


def folder_of(args: Namespace, data: Data, arm: Arm, seed: int) -> Path:
    """Return where an arm's run lies; arms of all experiments share what is trained alike."""
    words = [str(word).lstrip("-") for word in arm.options]
    name = "-".join([arm.gpt_model, str(arm.n), *words, f"{args.epochs}-epochs", f"seed-{seed}"])
    return data.codes.parent / "arms" / name


def train_arm(args: Namespace, data: Data, arm: Arm, seed: int) -> Path:
    """Train an arm with the quickstart's recipe, unless that is done; return its weights (.pt).

    The learning rate warms up over a sixth of the run.
    """
    folder = folder_of(args, data, arm, seed)
    if not list(folder.glob("GPT-*/checkpoints/*.pt")):
        run(
            *("bash", "scripts/autoregressive/train_c2i.sh", "--cloud-save-path", folder),
            *("--no-local-save", "--code-path", data.codes, "--ar-token-num", arm.n),
            *("--spe-token-num", arm.n - 1, "--gpt-model", arm.gpt_model, "--epochs", args.epochs),
            *("--lr", 2e-3, "--global-batch-size", 16, "--warmup-epochs", args.epochs / 6),
            *("--dropout-p", 0),
            *("--attn-dropout-p", 0, "--token-dropout-p", 0, "--global-seed", seed, *arm.options),
        )
    return newest(folder, "GPT-*/checkpoints/*.pt")


def run_arm(args: Namespace, data: Data, arm: Arm, seed: int) -> dict[str, Any]:
    """Train and judge one arm with one seed."""
    folder, weights = folder_of(args, data, arm, seed), train_arm(args, data, arm, seed)
    losses = folder / f"losses-{args.val_images}.npz"
    if not losses.exists():
        measure_losses(weights, data.held_out, args.val_images, losses)
    with np.load(losses) as file:
        result = {
            "weights": str(weights),
            "losses": str(losses),
            "nats": float(file["losses"].sum(1).mean()),
            "steps": int(file["step"].max()) + 1,
        }
    if args.samples:
        metrics = judge_samples(args, data, weights, folder / f"samples-{args.samples}")
        result["frechet_distance"] = metrics["frechet_distance"]
    return result


def spread(codes: Codes, images: int) -> np.ndarray:
    """Return the numbers (I,) of at most ``images`` evenly spaced images, the same for all arms."""
    return np.linspace(0, len(codes) - 1, min(images, len(codes))).astype(np.int64)  # (I,)


@torch.no_grad()
def measure_losses(weights: Path, held_out: Path, images: int, path: Path) -> None:
    """Write nats (I, T) of each token of the first crops of evenly spaced images, in region order.

    Beside them ``step`` (T,), which predicts each token, and ``raster`` (T,), where it is.
    """
    gpt, _, _ = load_gpt(weights, grid=None)
    codes = open_codes(held_out)
    chosen = spread(codes, images)  # (I,)
    losses = []
    for part in np.split(chosen, range(BATCH, len(chosen), BATCH)):
        x, y = codes.batch(part, np.zeros_like(part))  # (b, T), (b,)
        losses.append(gpt(torch.from_numpy(x), torch.from_numpy(y))[1].numpy())  # (b, T)
    steps = [i for i, step in enumerate(gpt.order.steps) for _ in range(step.first, step.end)]
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, losses=np.concatenate(losses), step=steps, raster=gpt.order.permutation)


def judge_samples(
    args: Namespace, data: Data, weights: Path, folder: Path, *options: object
) -> dict[str, float]:
    """Sample, by default without guidance, and return the metrics against the training images."""
    if not list(folder.glob("*.metrics.json")):
        guidance = options or ("--cfg-scale", 1.0)
        run(
            *("bash", "scripts/autoregressive/sample_c2i.sh", "--vq-ckpt", data.tokenizer),
            *("--gpt-ckpt", weights, "--num-fid-samples", args.samples, "--sample-dir", folder),
            *("--class-protocol", "balanced", "--per-proc-batch-size", 100, *guidance),
        )
        npz = newest(folder, "*.npz")
        run(
            *("python", "evaluations/c2i/evaluator.py", data.reference, npz),
            *("--feature-network", data.classifier, "--output", npz.with_suffix(".metrics.json")),
        )
        npz.unlink()  # 15 MB each; the metrics stay
    return json.loads(newest(folder, "*.metrics.json").read_text())["metrics"]


def without_paths(results: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Return results per arm without the files' places, for a file that is passed on."""
    return {
        arm: [{k: v for k, v in run.items() if k not in ("weights", "losses")} for run in runs]
        for arm, runs in results.items()
    }


def nats_per_image(results: Sequence[dict[str, Any]]) -> np.ndarray:
    """Return (seeds, images) nats per image."""
    return np.stack([np.load(r["losses"])["losses"].sum(1) for r in results])


def paired_difference(
    arm: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]], resamples: int = 10_000
) -> dict[str, Any]:
    """Return the mean difference in nats per image, its 95% interval, and that of each seed.

    The interval is of a bootstrap over images, the differences averaged over seeds; how far seeds
    lie apart is seen from their own values.
    """
    seeds = min(len(arm), len(base))
    per_seed = nats_per_image(arm[:seeds]) - nats_per_image(base[:seeds])  # (seeds, I)
    differences = per_seed.mean(0)  # (I,)
    draws = np.random.default_rng(0).integers(len(differences), size=(resamples, len(differences)))
    low, high = np.percentile(differences[draws].mean(1), [2.5, 97.5])
    return {
        "mean": float(differences.mean()),
        "low": float(low),
        "high": float(high),
        "seeds": per_seed.mean(1).tolist(),
    }


def compare(description: str, name: str, arms: dict[str, Arm], base: str) -> None:
    """Be the command of the experiment ``name`` that compares ``arms`` with the arm ``base``.

    Prints, writes and plots each one's difference; JSON and picture go to ``--output``/``name``.
    """
    parser = make_parser(description, f"bash scripts/experiments/run.sh {name} --seeds 0 1 2")
    add_training_options(parser)
    args = parser.parse_args()
    if args.arms and base not in args.arms:
        raise ValueError(f"--arms: {base!r}, which all are compared with, is missing")
    results = run_arms(args, arms)
    differences = {k: paired_difference(v, results[base]) for k, v in results.items() if k != base}
    for arm, runs in results.items():
        nats = sum(r["nats"] for r in runs) / len(runs)
        line = f"{arm:36} {runs[0]['steps']:3} steps {nats:8.2f} nats per image"
        if d := differences.get(arm):
            line += f" {d['mean']:+7.2f} [{d['low']:+.2f}, {d['high']:+.2f}]"
        if args.samples:
            line += "   distance " + ", ".join(f"{r['frechet_distance']:.2f}" for r in runs)
        print(line)
    folder = Path(args.output) / name / args.data
    args.output = folder / "results.json"
    write_results(args, {"runs": without_paths(results), "differences": differences})
    figure, (axis,) = panels(1, 7.5, 1.2 + 0.42 * len(differences))
    label = f"held-out nats per image more than {base}\n(dot: mean, bar: 95%, tick: a seed)"
    draw_intervals(axis, differences, label)
    save_figure(figure, folder / "differences.png")
