"""Options that all trainers share."""

import pytest

from utils.training.options import split_batch


def test_batch_that_does_not_split_is_named():
    assert split_batch(64, 4, 2) == 8
    with pytest.raises(ValueError, match="--global-batch-size 10 does not split over 4 processes"):
        split_batch(10, 4, 1)
