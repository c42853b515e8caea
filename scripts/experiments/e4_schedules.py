"""E4: what do fewer or other steps cost?

Schedules of equally many steps that grow, stay or shrink; the nested start; no sequential start.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.benchmarks.common import write_results
from scripts.experiments.arms import Arm, add_training_options, run_arms, without_paths
from scripts.experiments.common import save_figure
from scripts.experiments.plots import panels
from utils.options import make_parser, run_main

ARMS = {
    "n = 1": Arm(1),
    "n = 4": Arm(4),
    "n = 16": Arm(16),
    "n = 16, nested": Arm(16, ("--schedule", "nested")),
    "n = 16, growing": Arm(16, ("--schedule", "1x4,4x3,2x8,8x4")),
    "n = 16, constant": Arm(16, ("--schedule", "1x4,4x15")),
    "n = 16, shrinking": Arm(16, ("--schedule", "1x4,4x3,8x4,2x8")),
    "n = 4, no start": Arm(4, ("--schedule", "4x16")),
    "n = 16, no start": Arm(16, ("--schedule", "16x4")),
}


def plot(results: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Plot loss and distance against the number of steps, one point per run."""
    names = {"nats": "held-out nats per image", "frechet_distance": "Frechet distance of samples"}
    names = {k: title for k, title in names.items() if k in next(iter(results.values()))[0]}
    figure, axes = panels(len(names), 5, 4.2)
    for axis, (name, title) in zip(axes, names.items(), strict=True):
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
    """Run every arm, write JSON and plot."""
    parser = make_parser(__doc__, "bash scripts/experiments/run.sh e4 --seeds 0 1 2")
    add_training_options(parser)
    args = parser.parse_args()
    results = run_arms(args, ARMS)
    folder = Path(args.output) / "e4" / args.data
    args.output = folder / "results.json"
    write_results(args, without_paths(results))
    plot(results, folder / "schedules.png")
    for label, runs in results.items():
        for r in runs:
            distance = f"distance {r['frechet_distance']:.3f}" if args.samples else ""
            print(f"{label:18} {r['steps']:3} steps {r['nats']:8.2f} nats per image  {distance}")


if __name__ == "__main__":
    run_main(main)
