"""The region order: which tokens are predicted together, and what each of them may see.

A grid of h x w codes is cut into rh x rw equal regions, n = rh * rw (paper, section 3.2). Tokens at
the same place of every region are far apart, hence weakly dependent, and are predicted in one step.
The first token of every region sets the global structure and is predicted alone. A 4x4 grid at n =
4, where a number is the step that predicts a code:

    0  4 | 1  4        steps 0 to 3: one code each, the first of every region
    5  6 | 5  6        steps 4 to 6: four codes each, one in every region
    -----+-----
    2  4 | 3  4        16 codes take 7 steps
    5  6 | 5  6

The model is fed T = h * w slots; slot s predicts token s of the region order:

    slot     0        1 .. n      n+1 .. 2n-1       2n .. T-1
    holds    class    t1 .. tn    n-1 special       token s - n (all groups but the last)
    step     0        1 .. n      n                 n + s // n - 1

and slot q attends to slot k  <=>  step[q] >= step[k]. Other code asks this file; gpt.py repeats
only that comparison, for FlexAttention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

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


@dataclass(frozen=True)
class RegionOrder:
    """Order of a ``grid`` (h, w) in ``regions`` (rh, rw); equal arguments give equal orders.

    All tensors are int64 on the CPU, computed once.
    """

    grid: tuple[int, int]
    regions: tuple[int, int]

    def __post_init__(self) -> None:
        split_regions(self.grid, self.n)
        if self.grid[0] % self.regions[0] or self.grid[1] % self.regions[1]:
            raise ValueError(f"{self.regions} regions do not divide a {self.grid} grid")

    @classmethod
    def build(cls, grid: int | tuple[int, int], n: int) -> RegionOrder:
        """Return the order of a square (int) or h x w grid at ``n`` tokens per step."""
        height, width = (grid, grid) if isinstance(grid, int) else grid
        return cls((height, width), split_regions((height, width), n))

    @property
    def n(self) -> int:
        """Tokens predicted per step."""
        return self.regions[0] * self.regions[1]

    @property
    def num_tokens(self) -> int:
        """Number of tokens and of slots, T = h * w."""
        return self.grid[0] * self.grid[1]

    @cached_property
    def permutation(self) -> Tensor:
        """(T,) raster index of each token of the region order: ``region = raster[:, permutation]``.

        Place in the region is the outer index (raster within the region), region the inner one
        (raster over regions); paper, section 3.2 and figure 4.
        """
        (h, w), (rh, rw) = self.grid, self.regions
        raster = torch.arange(h * w).view(rh, h // rh, rw, w // rw)  # (rh, h/rh, rw, w/rw)
        return raster.permute(1, 3, 0, 2).reshape(-1)  # (T,)

    @cached_property
    def inverse(self) -> Tensor:
        """(T,) place of each raster token in the region order: ``raster = region[:, inverse]``."""
        return self.permutation.argsort()

    @cached_property
    def steps(self) -> Tensor:
        """(T,) step of each slot."""
        n, slot = self.n, torch.arange(self.num_tokens)
        return torch.where(slot <= n, slot, n + slot // n - 1)

    @cached_property
    def slot_positions(self) -> Tensor:
        """(T, 2) row and column of each slot's token; (-1, -1) for class and special slots."""
        n = self.n
        raster = self.permutation
        row_column = torch.stack([raster // self.grid[1], raster % self.grid[1]], dim=-1)  # (T, 2)
        none = torch.full((n, 2), -1)
        return torch.cat([none[:1], row_column[:n], none[1:], row_column[n:-n]])  # (T, 2)

    @cached_property
    def schedule(self) -> tuple[tuple[int, int], ...]:
        """Slots [start, stop) of each decoding step: n single, then T/n - 1 groups of n."""
        n = self.n
        singles = [(s, s + 1) for s in range(n)]
        return (*singles, *((s, s + n) for s in range(n, self.num_tokens, n)))

    def attends(self, query: Tensor, key: Tensor) -> Tensor:
        """Return step[q] >= step[k] of slots (paper, section 3.3); broadcasts, bool."""
        return self.steps[query] >= self.steps[key]

    def held(self, start: int, stop: int) -> list[tuple[str, slice]]:
        """Return what slots [start, stop) hold, in their order: a kind, and which ones of it.

        ``("class", [0, 1))``, ``("token", places in the region order)`` or ``("special", of the
        special tokens)``.
        """
        n, slots = self.n, self.num_tokens
        runs = [
            ("class", 0, 1, 0),
            ("token", 1, n + 1, 1),
            ("special", n + 1, 2 * n, n + 1),
            ("token", 2 * n, slots, n),
        ]
        held = []
        for kind, first, end, shift in runs:
            first, end = max(first, start), min(end, stop)
            if first < end:
                held.append((kind, slice(first - shift, end - shift)))
        return held

    def mask(self) -> Tensor:
        """Return (T, T) bool, True where a query slot (row) attends to a key slot (column)."""
        slots = torch.arange(self.num_tokens)
        return self.attends(slots[:, None], slots[None, :])
