"""E7: does sharper sampling hide what predicting in parallel gives up?

Frechet distance of samples at n = 1, 4 and 16 over guidance scales and temperatures, without any
training beyond the three models of E1. Published guidance rises from 1.345 at PAR-3B-4x to 1.5 at
PAR-3B-16x.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from scripts.benchmarks.common import write_results
from scripts.experiments.arms import (
    Arm,
    add_training_options,
    check_arms,
    folder_of,
    judge_samples,
    train_arm,
)
from scripts.experiments.common import save_figure
from scripts.experiments.data import Data, prepare
from scripts.experiments.plots import draw_lines, panels
from utils.options import make_parser, run_main

ARMS = {f"n = {n}": Arm(n) for n in (1, 4, 16)}


def main() -> None:
    """Sample and judge over the grid, write JSON and plot."""
    parser = make_parser(__doc__, "bash scripts/experiments/run.sh e7 --cfg-scales 1 1.5 2 3")
    add_training_options(parser, losses=False)
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--cfg-scales",
        type=float,
        nargs="+",
        default=[1.0, 1.25, 1.5, 2.0, 3.0, 4.0],
        help="CFG scales; 1 disables guidance",
    )
    group.add_argument(
        "--temperatures", type=float, nargs="+", default=[0.8, 0.9, 1.0], help="of softmax"
    )
    args = parser.parse_args()
    check_arms(args, ARMS)
    args.cfg_scales.sort()
    if args.quick:
        args.seeds, args.arms = args.seeds[:1], args.arms or list(ARMS)[:1]
        args.samples, args.cfg_scales, args.temperatures = 100, args.cfg_scales[:1], [1.0]
    if args.samples < 2:
        raise ValueError("--samples: this experiment is about samples; 5000 are usual")
    found = judge_grid(args, prepare(args))
    folder = Path(args.output) / "e7" / args.data
    args.output = folder / "results.json"
    write_results(args, found)
    plot(folder / "guidance.png", args, found)


def judge_grid(args: Namespace, data: Data) -> dict[str, dict[str, list[list[float]]]]:
    """Sample and judge; return distances by temperature and arm: for each scale, of each seed."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for temperature, name in product(args.temperatures, args.arms or ARMS):
        row = found.setdefault(f"temperature {temperature}", {}).setdefault(name, [])
        for scale in args.cfg_scales:
            row.append([])
            for seed in args.seeds:
                weights = train_arm(args, data, ARMS[name], seed)
                folder = folder_of(args, data, ARMS[name], seed)
                folder /= f"samples-{args.samples}-cfg-{scale}-temperature-{temperature}"
                options = ("--cfg-scale", scale, "--temperature", temperature)
                metrics = judge_samples(args, data, weights, folder, *options)
                row[-1].append(metrics["frechet_distance"])
            print(f"{name}, temperature {temperature}, CFG {scale}: {np.mean(row[-1]):.3f}")
    return found


def plot(path: Path, args: Namespace, found: dict[str, dict[str, list[list[float]]]]) -> None:
    """Plot distance against guidance, a panel for each temperature and a line for each n."""
    figure, axes = panels(len(found), 4.6, 4.2)
    labels = ("CFG scale", "Frechet distance of samples")
    for axis, (title, arms) in zip(axes, found.items(), strict=True):
        root = max(len(args.seeds) - 1, 1) ** 0.5
        lines = {name: (np.mean(v, 1), np.std(v, 1) / root) for name, v in arms.items()}
        draw_lines(axis, np.array(args.cfg_scales), lines, labels)
        axis.set_title(title, fontsize=10)
    top = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(0, top)  # one scale, so that panels can be compared
    save_figure(figure, path)


if __name__ == "__main__":
    run_main(main)
