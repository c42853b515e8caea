"""Stateless data order: the batch of a step is a function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


class EpochOrder:
    """Shuffled batches from ``length`` items; the last, incomplete batch of an epoch is dropped.

    Batches are the same for every number of processes; each rank uses an equal slice of each.
    """

    def __init__(self, length: int, batch: int, seed: int):
        if length < batch:
            raise ValueError(
                f"--global-batch-size {batch} is larger than the data set, {length} items"
            )
        self.length, self.batch, self.seed = length, batch, seed
        self.steps_per_epoch = length // batch
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def indices(self, step: int) -> tuple[int, np.ndarray]:
        """Return epoch and item indices (batch,) of global ``step``, both counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.length)
        return epoch, self._permutation[position * self.batch : (position + 1) * self.batch]

    def rank_keys(
        self, first_step: int, last_step: int, rank: int, size: int
    ) -> Iterator[list[tuple[int, int]]]:
        """Yield (index, epoch) keys of one rank per step, for a DataLoader's batch_sampler."""
        for step in range(first_step, last_step):
            epoch, indices = self.indices(step)
            yield [(int(i), epoch) for i in np.split(indices, size)[rank]]
