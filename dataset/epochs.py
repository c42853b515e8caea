"""Data order without state: what a step sees is a function of (seed, step) alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


class EpochOrder:
    """Shuffled global batches of ``batch`` out of ``length`` items; the last, short batch of an epoch is left out.

    Batches are the same for every number of processes; a rank takes its equal slice of each.
    """

    def __init__(self, length: int, batch: int, seed: int):
        if length < batch:
            raise ValueError(f"--global-batch-size {batch} is larger than the data set, {length} items")
        self.length, self.batch, self.seed = length, batch, seed
        self.steps_per_epoch = length // batch
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def indices(self, step: int) -> tuple[int, np.ndarray]:
        """Epoch and item indices (batch,) of global ``step``, both counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.length)
        return epoch, self._permutation[place * self.batch : (place + 1) * self.batch]

    def rank_keys(self, first_step: int, last_step: int, rank: int, size: int) -> Iterator[list[tuple[int, int]]]:
        """For a DataLoader's batch_sampler: (index, epoch) keys of one rank's slice of each step."""
        for step in range(first_step, last_step):
            epoch, indices = self.indices(step)
            yield [(int(i), epoch) for i in np.split(indices, size)[rank]]
