"""How a grid is cut into n regions, and in which order these come."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor


def split_regions(grid: tuple[int, int], n: int) -> tuple[int, int]:
    """Return (rh, rw), rh * rw = n, cutting ``grid`` into regions as nearly square as possible.

    Of two equally square cuts the one with more columns of regions is taken. Raises ``ValueError``
    with the n that would fit. A region must hold at least two tokens, since its first one is not
    predicted in parallel.
    """

    def cuts(m: int) -> list[tuple[int, int]]:
        pairs = [(rh, m // rh) for rh in range(1, m + 1) if m % rh == 0]
        return [(rh, rw) for rh, rw in pairs if grid[0] % rh == 0 and grid[1] % rw == 0]

    tokens = grid[0] * grid[1]
    if n < 1 or 2 * n > tokens or not cuts(n):
        fitting = [m for m in range(1, tokens // 2 + 1) if cuts(m)]
        raise ValueError(
            f"n = {n} does not cut a {grid[0]}x{grid[1]} grid into equal regions; these do: "
            f"{', '.join(map(str, fitting))}"
        )
    return min(cuts(n), key=lambda r: abs(math.log((grid[0] / r[0]) / (grid[1] / r[1]))))


def rounds_of(grid: tuple[int, int], regions: tuple[int, int]) -> Tensor:
    """Return (T/n, n) raster indices: a row for each place in a region, of all n regions."""
    (h, w), (rh, rw) = grid, regions
    raster = torch.arange(h * w).view(rh, h // rh, rw, w // rw)  # (rh, h/rh, rw, w/rw)
    return raster.permute(1, 3, 0, 2).reshape(-1, rh * rw)  # (T/n, n)


def spread(regions: tuple[int, int]) -> Tensor:
    """Return (n,) regions, so that any few that follow one another lie far apart.

    They are a grid, which comes in the region order of n / 4 regions, and these likewise; 4 or
    fewer, or a number that 4 does not divide, in raster order.
    """
    n = regions[0] * regions[1]
    if n <= 4 or n % 4:
        return torch.arange(n)
    fewer = split_regions(regions, n // 4)
    return rounds_of(regions, fewer)[:, spread(fewer)].reshape(-1)  # (n,)


def parse_layout(layout: str, grid: tuple[int, int], n: int) -> tuple[int, int]:
    """Return the regions (rh, rw) of ``--order``: region, raster, or written as 1x4.

    ``ValueError`` says what does not fit.
    """
    if layout in ("region", "raster"):
        return split_regions(grid, n)
    match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", layout)
    if match is None:
        raise ValueError(
            f"--order {layout}: expected region, raster, or rows x columns of regions such as 1x{n}"
        )
    rows, columns = map(int, match.groups())
    if rows * columns != n or grid[0] % rows or grid[1] % columns:
        raise ValueError(
            f"--order {layout} does not cut a {grid[0]}x{grid[1]} grid into n = {n} equal regions"
        )
    return rows, columns


def canonical_layout(layout: str, grid: tuple[int, int], n: int) -> str:
    """Return the name of ``--order``, the same for all that are the same; ``ValueError`` too."""
    regions = parse_layout(layout, grid, n)
    if layout == "raster":
        return "region" if n == 1 else "raster"
    return "region" if regions == split_regions(grid, n) else f"{regions[0]}x{regions[1]}"
