"""E3: where do tokens that are predicted at once depend on one another?

Three figures: the total correlation of each group of tokens that is predicted at once, given all
before it; the mutual information of two tokens given the class, and given the first four tokens
too, against their distance; the loss of each cell. The first two are gains of probes (probes.py).
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from autoregressive.models.load import load_gpt
from dataset.codes import Codes, open_codes
from scripts.benchmarks.common import write_results
from scripts.experiments.arms import (
    Arm,
    add_training_options,
    paired_difference,
    run_arms,
    spread,
    without_paths,
)
from scripts.experiments.common import save_figure
from scripts.experiments.data import prepare
from scripts.experiments.plots import draw_cells, draw_lines, panels
from scripts.experiments.probes import SIDE, mutual_information, total_correlation
from utils.options import make_parser, positive_int, run_main

ALONE, TOGETHER = "raster, n = 1", "region, n = 4"
ARMS = {
    ALONE: Arm(1),
    TOGETHER: Arm(4),
    "region, n = 16": Arm(16),
    "raster, n = 4": Arm(4, ("--order", "raster")),
}


def correlations(
    args: Namespace, runs: list[dict[str, Any]], codes: Codes, held_out: Codes
) -> dict[str, Any]:
    """Return total correlation of each group in nats: mean and standard error, per seed, sum."""
    images = spread(held_out, args.val_images)  # (I,)
    found = []  # one (I, G) for each seed
    for run in runs:
        gpt, _, _ = load_gpt(run["weights"], grid=None)
        found.append(total_correlation(gpt, codes, held_out, images, args.probe_steps))
    mean = np.mean(found, axis=0)  # (I, G)
    sums = mean.sum(1)  # (I,)
    return {
        "mean": mean.mean(0).tolist(),
        "error": (mean.std(0) / len(mean) ** 0.5).tolist(),
        "sum": float(sums.mean()),
        "sum, error": float(sums.std() / len(sums) ** 0.5),
        "sums of seeds": np.sum(found, axis=2).mean(1).tolist(),
    }


def cell_losses(runs: list[dict[str, Any]]) -> np.ndarray:
    """Return nats (SIDE, SIDE) of each cell, the mean of images and seeds."""
    cells = np.zeros(SIDE * SIDE)
    for run in runs:
        with np.load(run["losses"]) as file:
            cells[file["raster"]] += file["losses"].mean(0) / len(runs)
    return cells.reshape(SIDE, SIDE)


def main() -> None:
    """Train the models and the probes, write JSON and plot."""
    parser = make_parser(__doc__, "bash scripts/experiments/run.sh e3 --seeds 0 1 2")
    add_training_options(parser, samples=0)
    parser.add_argument_group("probes").add_argument(
        "--probe-steps", type=positive_int, default=1500, help="training steps of each probe"
    )
    args = parser.parse_args()
    if args.arms:
        raise ValueError("--arms: this experiment needs all of them")
    if args.quick:
        args.probe_steps, args.arms = 50, [ALONE, TOGETHER]
    results, data = run_arms(args, ARMS), prepare(args)
    codes, held_out = open_codes(data.codes), open_codes(data.held_out)
    groups = {
        name: correlations(args, runs, codes, held_out)
        for name, runs in results.items()
        if name != ALONE
    }
    for name, g in groups.items():
        g["lost"] = paired_difference(results[name], results[ALONE])
        line = f"{name:16} total correlation {g['sum']:6.2f} +- {g['sum, error']:.2f} nats"
        print(f"{line}, loss {g['lost']['mean']:+.2f} over {ALONE}")
    information = mutual_information(codes, held_out, args.probe_steps)
    alone, together = (cell_losses(results[name]) for name in (ALONE, TOGETHER))
    cells = {
        f"nats of each cell, {ALONE}": alone,
        f"{TOGETHER}, more than {ALONE}": together - alone,
    }
    folder = Path(args.output) / "e3" / args.data
    args.output = folder / "results.json"
    found = {"runs": without_paths(results), "groups": groups, "information": information}
    write_results(args, {**found, "cells": {k: v.tolist() for k, v in cells.items()}})
    plot(folder / "dependence.png", groups[TOGETHER], information, cells)


def plot(
    path: Path,
    groups: dict[str, Any],
    information: dict[str, list[float]],
    cells: dict[str, np.ndarray],
) -> None:
    """Plot groups, information against distance, and the cells' losses beside one another."""
    figure, axes = panels(2 + len(cells), 4.6, 4)
    mean, error = np.array(groups["mean"]), np.array(groups["error"])
    labels = ("group of 4 tokens, in the order of decoding", "total correlation, nats per image")
    draw_lines(axes[0], np.arange(len(mean)), {"": (mean, error)}, labels)
    lines = {
        name: (np.array(information[name]), np.array(information[f"{name}, error"]))
        for name in ("given the class", "given the first four too")
    }
    labels = ("distance of two tokens, cells", "mutual information, nats")
    draw_lines(axes[1], np.array(information["distance"]), lines, labels)
    for axis, (title, values) in zip(axes[2:], cells.items(), strict=True):
        draw_cells(axis, values, title)
    save_figure(figure, path)


if __name__ == "__main__":
    run_main(main)
