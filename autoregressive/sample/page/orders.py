"""The order of a grid as the demo page draws it: all of it from RegionOrder itself."""

from __future__ import annotations

from typing import Any

from autoregressive.models.region_order import RegionOrder
from autoregressive.models.regions import split_regions

MOST_CELLS = 32  # a side


def describe_order(query: dict[str, str]) -> dict[str, Any]:
    """Answer ``grid``, ``n``, ``schedule`` and ``layout`` with steps, slots and regions;
    ``ValueError`` says what does not fit.
    """
    try:
        grid, n = int(query.get("grid", "8")), int(query.get("n", "4"))
    except ValueError:
        raise ValueError("grid and n: expected whole numbers") from None
    if not 2 <= grid <= MOST_CELLS:
        raise ValueError(f"grid: expected 2 to {MOST_CELLS}")
    schedule, layout = query.get("schedule", "region"), query.get("layout", "region")
    order = RegionOrder.build(grid, n, schedule, layout)
    steps = [
        {
            "slots": [step.start, step.stop],
            "tokens": [step.first, step.end],
            "inputs": [
                [kind, which.start, which.stop] for kind, which in order.held(step.start, step.stop)
            ],
        }
        for step in order.steps
    ]
    return {
        "grid": grid,
        "n": n,
        "regions": order.regions,
        "cells": order.permutation.tolist(),  # raster index of each token
        "steps": steps,
        "special": order.num_special,
        "fitting": fitting(grid),
    }


def fitting(grid: int) -> list[int]:
    """Return the numbers of regions that cut a square grid, at most 64."""
    found = []
    for n in range(1, min(64, grid * grid // 2) + 1):
        try:
            split_regions((grid, grid), n)
        except ValueError:
            continue
        found.append(n)
    return found
