"""Features of several ranks come to rank 0 as they are made, in order."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier

import numpy as np
import pytest
import torch

from evaluations.c2i.features import Features, ImageFeatures, extract_features
from utils.distributed import World

BATCH = 4


@dataclass(frozen=True)
class Peer(World):
    """A rank in a thread, which shares ``values`` with the others."""

    values: list
    meet: Barrier

    def gather_objects(self, value: ImageFeatures | None) -> list | None:
        assert value is None or len(value.pool) <= BATCH
        self.values[self.rank] = value
        self.meet.wait(timeout=60)
        gathered = list(self.values)
        self.meet.wait(timeout=60)
        return gathered if self.is_main else None


def network(images: torch.Tensor) -> Features:
    pool = images.flatten(1).float()
    return Features(pool, None, pool.softmax(-1))


@pytest.mark.parametrize("count, ranks", [(26, 3), (24, 3), (9, 3), (3, 2), (8, 1)])
def test_features_of_all_ranks_are_gathered_in_order_on_rank_0(count, ranks):
    """A batch at a time: 50,000 took 3.9 GiB on rank 0 of two and 2.4 GiB on the other."""
    images = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
    )
    values, meet = [None] * ranks, Barrier(ranks)

    def extract(rank: int) -> ImageFeatures | None:
        world = Peer(rank, ranks, torch.device("cpu"), values, meet)
        batches = images.split(BATCH)[rank::ranks]
        return extract_features(network, batches, count, BATCH, world)

    # whatever the threads leave of torch's flags, this ends as it began
    with torch.backends.cudnn.flags(enabled=True), ThreadPoolExecutor(ranks) as threads:
        found, *others = threads.map(extract, range(ranks))
    assert others == [None] * (ranks - 1)
    assert found.spatial is None and len(np.unique(found.hashes)) == count
    assert np.array_equal(found.pool, images.flatten(1).float().numpy())
    assert np.allclose(found.probabilities.sum(1), 1)
