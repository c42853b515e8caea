"""E7: does sharper sampling hide what predicting in parallel gives up?

Frechet distance of samples at n = 1, 4 and 16 over guidance scales and temperatures, without any
training beyond the three models of E1. Published guidance rises from 1.345 at PAR-3B-4x to 1.5 at
PAR-3B-16x.
"""

from __future__ import annotations

import sys
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
from scripts.experiments.data import prepare
from scripts.experiments.plots import draw_lines, panels
from utils.options import make_parser, run_main

ARMS = {f"n = {n}": Arm(n) for n in (1, 4, 16)}


def main() -> None:
    """Sample and judge over the grid, write JSON and plot."""
    parser = make_parser(__doc__, "bash scripts/experiments/run.sh e7 --cfg-scales 1 1.5 2 3")
    add_training_options(parser, losses=False)
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--cfg-scales", type=float, nargs="+", default=[1.0, 1.25, 1.5, 2.0, 3.0], help="guidance"
    )
    group.add_argument(
        "--temperatures", type=float, nargs="+", default=[0.9, 1.0], help="of the softmax"
    )
    args = parser.parse_args()
    check_arms(args, ARMS)
    args.cfg_scales.sort()
    if args.quick:
        args.seeds, args.arms = args.seeds[:1], args.arms or list(ARMS)[:1]
        args.samples, args.cfg_scales, args.temperatures = 100, args.cfg_scales[:1], [1.0]
    if args.samples < 2:
        raise ValueError("--samples: this experiment is about samples; 5000 are usual")
    data, found = prepare(args), {}
    for name in args.arms or ARMS:
        for temperature in args.temperatures:
            for scale in args.cfg_scales:
                seeds = []
                for seed in args.seeds:
                    weights = train_arm(args, data, ARMS[name], seed)
                    folder = folder_of(args, data, ARMS[name], seed)
                    folder /= f"samples-{args.samples}-cfg-{scale}-temperature-{temperature}"
                    options = ("--cfg-scale", scale, "--temperature", temperature)
                    metrics = judge_samples(args, data, weights, folder, *options)
                    seeds.append(metrics["frechet_distance"])
                found.setdefault(f"{name}, temperature {temperature}", []).append(seeds)
                print(f"{name}, temperature {temperature}, CFG {scale}: {np.mean(seeds):.3f}")
    folder = Path(args.output) / "e7" / args.data
    scales, args.output = np.array(args.cfg_scales), folder / "results.json"
    write_results(args, found)
    lines = {
        name: (np.mean(v, 1), np.std(v, 1) / max(len(args.seeds) - 1, 1) ** 0.5)
        for name, v in found.items()
    }
    figure, (axis,) = panels(1, 6.4, 4.2)
    draw_lines(axis, scales, lines, ("CFG scale", "Frechet distance of samples"))
    save_figure(figure, folder / "guidance.png")


if __name__ == "__main__":
    run_main(main)
