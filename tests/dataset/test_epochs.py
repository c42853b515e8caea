"""The order of the data is a function of seed and step."""

import numpy as np
import pytest

from dataset.epochs import EpochOrder


def test_every_epoch_sees_every_item_once_in_another_order():
    order = EpochOrder(length=103, batch=10, seed=0)
    epochs = [np.concatenate([order.indices(10 * e + i)[1] for i in range(10)]) for e in range(2)]
    for seen in epochs:
        assert len(set(seen)) == 100
    assert not np.array_equal(*epochs)
    assert [order.indices(s)[0] for s in (9, 10, 29)] == [0, 1, 2]


def test_any_number_of_ranks_sees_the_same_global_batches():
    order = EpochOrder(length=50, batch=12, seed=3)
    for size in (1, 2, 3, 4):
        parts = [list(order.rank_keys(2, 6, rank, size)) for rank in range(size)]
        for i, step in enumerate(range(2, 6)):
            together = [key for part in parts for key in part[i]]
            epoch, indices = order.indices(step)
            assert together == [(index, epoch) for index in indices]


def test_batch_larger_than_the_data_is_named():
    with pytest.raises(
        ValueError, match="--global-batch-size 60 is larger than the data set, 50 items"
    ):
        EpochOrder(50, 60, 0)
