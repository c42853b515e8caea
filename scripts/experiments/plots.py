"""Plots of the experiments, in the same style."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # draws to files and needs no display
from matplotlib import pyplot

from scripts.experiments.common import save_figure


def plot_intervals(differences: Mapping[str, dict[str, Any]], xlabel: str, path: Path) -> None:
    """Plot a row per arm: mean and 95% interval, and each seed as a small mark."""
    figure, axis = pyplot.subplots(
        figsize=(7.5, 1.2 + 0.42 * len(differences)), layout="constrained"
    )
    for row, d in enumerate(reversed(list(differences.values()))):
        axis.plot([d["low"], d["high"]], [row, row], color="black", linewidth=2)
        axis.plot(d["mean"], row, "o", color="black", markersize=6)
        axis.plot(d["seeds"], [row + 0.22] * len(d["seeds"]), "|", color="0.5", markersize=6)
        axis.annotate(
            f"{d['mean']:+.2f}",
            (max(d["high"], *d["seeds"]), row),
            (8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axis.axvline(0, color="0.6", linewidth=1)
    axis.set_yticks(range(len(differences)), list(reversed(differences)))
    axis.set_ylim(-0.6, len(differences) - 0.3)
    axis.margins(x=0.12)
    axis.set_xlabel(xlabel)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.3)
    save_figure(figure, path)


def plot_lines(
    x: np.ndarray,
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]],
    labels: tuple[str, str],
    path: Path,
    log_x: bool = False,
) -> None:
    """Plot lines of (mean, standard error) with 95% intervals, each named at its right end."""
    figure, axis = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
    for i, (name, (mean, error)) in enumerate(lines.items()):
        style = ("-", "--", "-.", ":")[i % 4]
        axis.errorbar(
            x, mean, 1.96 * error, color="black", linestyle=style, marker="os^D"[i % 4], capsize=2
        )
        axis.annotate(
            f" {name}", (x[-1], mean[-1]), xytext=(4, 0), textcoords="offset points", va="center"
        )
    axis.axhline(0, color="0.6", linewidth=1)
    if log_x:
        axis.set_xscale("log")
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    axis.margins(x=0.08 + 0.25 * any(lines))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)
    save_figure(figure, path)


def plot_cells(cells: np.ndarray, label: str, path: Path) -> None:
    """Plot a value (h, w) for each cell, written into it."""
    figure, axis = pyplot.subplots(figsize=(5, 4.2), layout="constrained")
    image = axis.imshow(cells, cmap="Greys", vmin=0)
    for (row, column), value in np.ndenumerate(cells):
        color = "white" if value > 0.6 * cells.max() else "black"
        axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8, color=color)
    axis.set_xlabel("column")
    axis.set_ylabel("row")
    figure.colorbar(image, label=label)
    save_figure(figure, path)
