"""E6: does a larger model close the gap between one token and several at once?

The published FID gap closes with size. The gap in nats cannot fall below the total correlation of
tokens predicted at once, which belongs to the data (e3). Both are plotted against the parameters.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from autoregressive.models.load import load_gpt
from scripts.benchmarks.common import write_results
from scripts.experiments.arms import (
    Arm,
    add_training_options,
    nats_per_image,
    paired_difference,
    run_arms,
    without_paths,
)
from scripts.experiments.common import save_figure
from scripts.experiments.plots import draw_lines, panels
from utils.options import make_parser, run_main

SIZES = ("GPT-N", "GPT-T", "GPT-S")


def main() -> None:
    """Train every size at n = 1 and 4, write JSON and plot."""
    parser = make_parser(__doc__, "bash scripts/experiments/run.sh e6 --data cifar10 --images DIR")
    add_training_options(parser)
    args = parser.parse_args()
    if args.arms:
        raise ValueError("--arms: this experiment needs all of them")
    sizes = SIZES[:1] if args.quick else SIZES
    arms = {f"{size}, n = {n}": Arm(n, gpt_model=size) for size in sizes for n in (1, 4)}
    results, differences, parameters = run_arms(args, arms), {}, []
    for size in sizes:
        one, four = results[f"{size}, n = 1"], results[f"{size}, n = 4"]
        differences[size] = paired_difference(four, one)
        gpt, _, _ = load_gpt(one[0]["weights"], grid=None)
        parameters.append(sum(p.numel() for p in gpt.parameters()))
        d = differences[size]
        line = f"{size} {parameters[-1]:9,} parameters: {nats_per_image(one).mean():.2f} nats, "
        line += f"n = 4 {d['mean']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}]"
        if args.samples:
            distances = [np.mean([r["frechet_distance"] for r in runs]) for runs in (one, four)]
            d["distances"] = [float(x) for x in distances]
            line += f"   distance {distances[0]:.2f} -> {distances[1]:.2f}"
        print(line)
    folder = Path(args.output) / "e6" / args.data
    args.output = folder / "results.json"
    runs = without_paths(results)
    write_results(args, {"runs": runs, "parameters": parameters, "differences": differences})
    plot(folder / "size.png", np.array(parameters), list(differences.values()))


def plot(path: Path, parameters: np.ndarray, differences: list[dict[str, Any]]) -> None:
    """Plot the gap in nats, and if there are any the distances, against parameters (sizes,)."""
    distances = np.array([d["distances"] for d in differences if "distances" in d])  # (sizes, 2)
    figure, axes = panels(1 + bool(len(distances)), 5.2, 3.8)
    mean = np.array([d["mean"] for d in differences])
    error = np.array([(d["high"] - d["low"]) / 2 / 1.96 for d in differences])
    labels = ("parameters", "held-out nats per image,\nn = 4 more than n = 1")
    draw_lines(axes[0], parameters, {"": (mean, error)}, labels)
    if len(distances):
        lines = {f"n = {n}": (row, 0 * row) for n, row in zip((1, 4), distances.T, strict=True)}
        draw_lines(axes[1], parameters, lines, ("parameters", "Frechet distance of samples"))
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xticks(parameters, [f"{count / 1e6:.1f}M" for count in parameters])
        axis.minorticks_off()
    save_figure(figure, path)


if __name__ == "__main__":
    run_main(main)
