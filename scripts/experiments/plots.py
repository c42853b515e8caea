"""Panels of the experiments' figures, in one style: black on white, each line named at its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # draws to files and needs no display
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure of ``count`` panels in a row, each ``width`` x ``height`` inches."""
    size = (count * width, height)
    figure, axes = pyplot.subplots(1, count, figsize=size, layout="constrained", squeeze=False)
    return figure, list(axes[0])


def draw_intervals(axis: Axes, differences: Mapping[str, dict[str, Any]], xlabel: str) -> None:
    """Draw a row per arm: mean and 95% interval, and each seed as a small mark."""
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


def draw_lines(
    axis: Axes,
    x: np.ndarray,
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]],
    labels: tuple[str, str],
) -> None:
    """Draw lines of (mean, standard error) with 95% intervals, each named at its right end."""
    for i, (name, (mean, error)) in enumerate(lines.items()):
        style = {"linestyle": ("-", "--", "-.", ":")[i % 4], "marker": "os^DvP"[i % 6]}
        axis.errorbar(x, mean, 1.96 * error, color="black", markersize=5, capsize=2, **style)
        axis.annotate(
            f" {name}", (x[-1], mean[-1]), xytext=(4, 0), textcoords="offset points", va="center"
        )
    axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))
    if x.dtype.kind == "i":
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    axis.margins(x=0.08)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)


def draw_cells(axis: Axes, cells: np.ndarray, title: str) -> None:
    """Draw a value (h, w) for each cell, written into it."""
    low, high = min(cells.min(), 0), cells.max()
    axis.imshow(cells, cmap="Greys", vmin=low, vmax=high)
    for (row, column), value in np.ndenumerate(cells):
        color = "white" if value - low > 0.6 * (high - low) else "black"
        text = f"{value:.1f}".replace("-0.0", "0.0")
        axis.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("column")
    axis.set_ylabel("row")
