"""Batches that are made while the step before is computed."""

import pytest

from utils.training.run import prefetch


def test_batches_made_ahead_come_in_order():
    made = []
    for step, value in prefetch(lambda step: made.append(step) or step**2, range(3, 8)):
        assert value == step**2
        assert max(made) <= step + 2
    assert made == [3, 4, 5, 6, 7]
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda step: 1 // step, range(2)))
