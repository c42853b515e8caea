"""Train GPT-T on the quickstart's digits with several schedules, and plot what fewer steps cost.

Each schedule is trained alike, then judged by the loss on held-out digits and by the Frechet
distance of samples to the training digits, on features of the quickstart's classifier. Results go
to OUTPUT/schedules.json, the plot to OUTPUT/schedules.png. Run scripts/quickstart.sh first; what is
done is not done again.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib

matplotlib.use("Agg")  # draws to files and needs no display
from matplotlib import pyplot

from autoregressive.models.region_order import RegionOrder
from scripts.benchmarks.common import write_results
from scripts.experiments.common import extract, last_value, newest, run, save_figure, train_gpt
from utils.options import make_parser, positive_int, run_main

GRID = 8
# label -> n, --schedule
SCHEDULES = {
    "n = 1": (1, "region"),
    "n = 4": (4, "region"),
    "n = 16": (16, "region"),
    "n = 16, nested": (16, "nested"),
    "n = 16, growing": (16, "1x4,4x3,2x8,8x4"),
    "n = 16, constant": (16, "1x4,4x15"),
    "n = 16, shrinking": (16, "1x4,4x3,8x4,2x8"),
    "n = 4, no start": (4, "4x16"),
    "n = 16, no start": (16, "16x4"),
}


def measure(args: Namespace, label: str, seed: int) -> dict[str, float]:
    """Train, sample and evaluate one schedule."""
    n, schedule = SCHEDULES[label]
    quickstart, output = Path(args.quickstart).resolve(), Path(args.output).resolve()
    vq = newest(quickstart, "tokenizer/*/checkpoints/*.pt")
    held_out = extract(vq, quickstart / "digits" / "test", output / "codes-test")
    folder = output / f"{n}-{schedule}-{seed}"
    options = ("--schedule", schedule, "--global-seed", seed)
    trained = train_gpt(folder, quickstart / "codes", held_out, n, args.epochs, *options)

    samples = folder / f"samples-cfg-{args.cfg_scale}"
    run(
        *("bash", "scripts/autoregressive/sample_c2i.sh", "--vq-ckpt", vq),
        *("--gpt-ckpt", newest(trained, "checkpoints/*.pt"), "--image-size-eval", 32),
        *("--num-fid-samples", args.samples, "--per-proc-batch-size", 100),
        *("--class-protocol", "balanced", "--cfg-scale", args.cfg_scale, "--compile"),
        *("--precision", "none", "--sample-dir", samples),
    )
    npz = newest(samples, "*.npz")
    metrics = npz.with_suffix(".metrics.json")
    if not metrics.exists():
        run(
            *("python", "evaluations/c2i/evaluator.py", quickstart / "train.npz", npz),
            *("--feature-network", quickstart / "classifier.pt", "--output", metrics),
        )
    numbers = json.loads(metrics.read_text())["metrics"]
    return {
        "steps": len(RegionOrder.build(GRID, n, schedule).steps),
        "held-out loss": last_value(trained, "val/loss"),
        "Frechet distance": numbers["frechet_distance"],
    }


def plot(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Plot loss and distance against the number of steps, one point per run."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    titles = ("held-out loss, nats per code", "Frechet distance, classifier features")
    for axis, title, name in zip(axes, titles, ("held-out loss", "Frechet distance"), strict=True):
        for i, (label, runs) in enumerate(results.items()):
            steps, values = [r["steps"] for r in runs], [r[name] for r in runs]
            axis.plot(steps, values, "os^vD<>Pp"[i], color=f"C{i}")
            left = 8 < steps[0] < 19 or steps[0] > 32  # where there is room
            axis.annotate(
                label,
                (steps[0], values[0]),
                (-9 if left else 9, -3),
                textcoords="offset points",
                ha="right" if left else "left",
                fontsize=8,
            )
        axis.set_xscale("log", base=2)
        axis.set_xlim(3, 90)
        axis.set_xticks([4, 8, 16, 32, 64], ["4", "8", "16", "32", "64"])
        axis.set_xlabel("forward calls per image")
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
    save_figure(figure, path)


def main() -> None:
    """Measure every schedule, write JSON and plot."""
    parser = make_parser(__doc__, "python3 scripts/experiments/schedules.py --seeds 0 1")
    parser.add_argument("--quickstart", default="quickstart", help="folder of the quickstart")
    parser.add_argument(
        "--names", nargs="+", choices=list(SCHEDULES), default=list(SCHEDULES), help="schedules"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the training")
    parser.add_argument("--epochs", type=positive_int, default=6, help="epochs of training")
    parser.add_argument("--samples", type=positive_int, default=4000, help="samples per model")
    parser.add_argument("--cfg-scale", type=float, default=1.5, help="CFG scale of the samples")
    parser.add_argument("--output", default="results/schedules", help="folder for everything")
    args = parser.parse_args()
    results = {label: [measure(args, label, seed) for seed in args.seeds] for label in args.names}
    folder = Path(args.output)
    args.output = folder / "schedules.json"
    write_results(args, results)
    plot(results, folder / "schedules.png")
    print(f"{'schedule':18} {'steps':>5} {'loss':>8} {'distance':>9}")
    for label, runs in results.items():
        for r in runs:
            loss, distance = r["held-out loss"], r["Frechet distance"]
            print(f"{label:18} {r['steps']:5} {loss:8.4f} {distance:9.3f}")


if __name__ == "__main__":
    run_main(main)
