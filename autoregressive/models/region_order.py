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

The model is fed slots, as many per step as it predicts tokens. They hold the tokens of the step
before, and special tokens where that had fewer. With the paper's schedule slot s predicts token s:

    slot     0        1 .. n      n+1 .. 2n-1       2n .. T-1
    holds    class    t1 .. tn    n-1 special       token s - n (all groups but the last)
    step     0        1 .. n      n                 n + s // n - 1

Other schedules (schedules.py) have special tokens wherever steps grow, n - 1 in all if they never
shrink. Where they shrink, a step has a slot for each token of the step before, and only the first
of its slots predict. Always slot q attends to slot k  <=>  level[q] >= level[k], and the level is
the step. Other code asks this file; gpt.py repeats only that comparison, for FlexAttention.

For comparison (paper, table 4) there are also raster order, in which neighbours are predicted
together, regions of other shapes, and causal attention among the slots of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from autoregressive.models.regions import parse_layout, rounds_of, split_regions, spread
from autoregressive.models.schedules import step_sizes


class Step(NamedTuple):
    """A decoding step: its slots [start, stop), and the tokens [first, end) that they predict."""

    start: int
    stop: int
    first: int
    end: int


@dataclass(frozen=True)
class RegionOrder:
    """Order of a ``grid`` (h, w) in ``regions`` (rh, rw), with a ``schedule`` of schedules.py.

    raster: tokens come in raster order instead, and neighbours are predicted together; causal:
    slots of a step see only those before them. Equal arguments give equal orders. All tensors are
    int64 on the CPU, computed once.
    """

    grid: tuple[int, int]
    regions: tuple[int, int]
    schedule: str = "region"
    raster: bool = False
    causal: bool = False

    def __post_init__(self) -> None:
        split_regions(self.grid, self.n)
        if self.grid[0] % self.regions[0] or self.grid[1] % self.regions[1]:
            raise ValueError(f"{self.regions} regions do not divide a {self.grid} grid")
        step_sizes(self.schedule, self.n, self.num_tokens)

    @classmethod
    def build(
        cls,
        grid: int | tuple[int, int],
        n: int,
        schedule: str = "region",
        layout: str = "region",
        group_attention: str = "full",
    ) -> RegionOrder:
        """Return the order of a square (int) or h x w grid in ``n`` regions.

        layout: see ``parse_layout``; group_attention: ``full`` or ``causal``.
        """
        height, width = (grid, grid) if isinstance(grid, int) else grid
        regions = parse_layout(layout, (height, width), n)
        causal = group_attention == "causal"
        return cls((height, width), regions, schedule, layout == "raster", causal)

    @property
    def n(self) -> int:
        """Number of regions, the most tokens predicted in a step."""
        return self.regions[0] * self.regions[1]

    @property
    def num_tokens(self) -> int:
        """Number of tokens, T = h * w."""
        return self.grid[0] * self.grid[1]

    @property
    def num_slots(self) -> int:
        """Number of slots, S: T unless a step is smaller than the one before."""
        return self.steps[-1].stop

    @property
    def num_special(self) -> int:
        """Number of special tokens: n - 1 unless a step is smaller than the one before."""
        return sum(stop - start for kind, start, stop, _ in self._runs if kind == "special")

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The decoding steps: by the paper's schedule n of one token, then T/n - 1 of n."""
        steps, start, first, before = [], 0, 0, 1
        for size in step_sizes(self.schedule, self.n, self.num_tokens):
            steps.append(Step(start, start + max(size, before), first, first + size))
            start, first, before = steps[-1].stop, first + size, size
        return tuple(steps)

    @cached_property
    def permutation(self) -> Tensor:
        """(T,) raster index of each token of the region order: ``region = raster[:, permutation]``.

        Place in the region is the outer index (raster within the region), region the inner one
        (raster over regions); paper, section 3.2 and figure 4. In other schedules than the paper's
        the regions themselves are ``spread``.
        """
        if self.raster:
            return torch.arange(self.num_tokens)  # (T,)
        rounds = rounds_of(self.grid, self.regions)  # (T/n, n)
        if self.schedule != "region":
            rounds = rounds[:, spread(self.regions)]
        return rounds.reshape(-1)  # (T,)

    @cached_property
    def inverse(self) -> Tensor:
        """(T,) place of each raster token in the region order: ``raster = region[:, inverse]``."""
        return self.permutation.argsort()

    @cached_property
    def step_of_slot(self) -> Tensor:
        """(S,) step of each slot."""
        widths = torch.tensor([step.stop - step.start for step in self.steps])
        return torch.arange(len(widths)).repeat_interleave(widths)

    @cached_property
    def level(self) -> Tensor:
        """(S,) what decides what a slot sees, see ``attends``: its step, or itself if causal."""
        return torch.arange(self.num_slots) if self.causal else self.step_of_slot

    @cached_property
    def seen(self) -> tuple[int, ...]:
        """Number of slots that each slot attends to: the first ones, itself among them."""
        if self.causal:
            return tuple(range(1, self.num_slots + 1))
        return tuple(step.stop for step in self.steps for _ in range(step.start, step.stop))

    @cached_property
    def predicting(self) -> Tensor:
        """(T,) slot that predicts each token of the region order: the first ones of each step."""
        slots = [range(step.start, step.start + step.end - step.first) for step in self.steps]
        return torch.tensor([slot for part in slots for slot in part])

    def predicting_among(self, first: int, last: int) -> slice | Tensor | None:
        """Return which of the slots of steps [first, last) predict; None: all."""
        start, stop = self.steps[first].start, self.steps[last - 1].stop
        tokens = slice(self.steps[first].first, self.steps[last - 1].end)
        if stop - start == tokens.stop - tokens.start:
            return None
        if last == first + 1:
            return slice(0, tokens.stop - tokens.start)
        return self.predicting[tokens] - start

    @cached_property
    def _row_column(self) -> Tensor:
        """(T, 2) row and column of each token of the region order."""
        raster = self.permutation
        return torch.stack([raster // self.grid[1], raster % self.grid[1]], dim=-1)  # (T, 2)

    @cached_property
    def slot_positions(self) -> Tensor:
        """(S, 2) row and column of each slot's token; (-1, -1) for class and special slots."""
        none = torch.full((self.num_slots, 2), -1)
        held = self.held(0, self.num_slots)
        parts = [self._row_column[w] if kind == "token" else none[w] for kind, w in held]
        return torch.cat(parts)  # (S, 2)

    @cached_property
    def positions_with_special(self) -> Tensor:
        """(S, 2) ``slot_positions``, and of special slots those of the tokens they predict."""
        positions = self.slot_positions.clone()  # (S, 2)
        special = torch.zeros(self.num_slots, dtype=torch.bool)  # (S,)
        for kind, start, stop, _ in self._runs:
            special[start:stop] = kind == "special"
        predicts = special[self.predicting]  # (T,) whether a special slot predicts the token
        positions[special] = self._row_column[predicts]
        return positions

    def attends(self, query: Tensor, key: Tensor) -> Tensor:
        """Return level[q] >= level[k] of slots (paper, section 3.3); broadcasts, bool."""
        return self.level[query] >= self.level[key]

    @cached_property
    def _runs(self) -> tuple[tuple[str, int, int, int], ...]:
        """What slots hold, see ``held``: kind, first slot, end, and slot minus which one it is."""
        runs: list[tuple[str, int, int, int]] = []
        special = 0  # special tokens so far
        kind, held, which = "class", 1, 0  # what the first slots of a step hold, and from which on
        for start, stop, first, end in self.steps:
            pieces = [(kind, start, start + held, start - which)]
            pieces += [("special", start + held, stop, start + held - special)]
            special += stop - start - held
            for run in (piece for piece in pieces if piece[1] < piece[2]):
                if runs and (runs[-1][0], runs[-1][2], runs[-1][3]) == (run[0], run[1], run[3]):
                    run = (run[0], runs.pop()[1], run[2], run[3])  # one with the run before
                runs.append(run)
            kind, held, which = "token", end - first, first
        return tuple(runs)

    def held(self, start: int, stop: int) -> list[tuple[str, slice]]:
        """Return what slots [start, stop) hold, in their order: a kind, and which ones of it.

        ``("class", [0, 1))``, ``("token", places in the region order)`` or ``("special", of the
        special tokens)``.
        """
        held = []
        for kind, first, end, shift in self._runs:
            first, end = max(first, start), min(end, stop)
            if first < end:
                held.append((kind, slice(first - shift, end - shift)))
        return held

    def mask(self) -> Tensor:
        """Return (S, S) bool, True where a query slot (row) attends to a key slot (column)."""
        slots = torch.arange(self.num_slots)
        return self.attends(slots[:, None], slots[None, :])
