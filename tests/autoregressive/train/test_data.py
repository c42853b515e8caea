"""Batches of codes for training."""

import numpy as np
import pytest
import torch

from autoregressive.train.data import CodeBatches
from dataset.codes import MixedCodes
from utils.distributed import World


@pytest.mark.parametrize("weight, expected", [(0.0, range(10)), (1.0, range(10, 20))])
def test_mixing_weight_says_which_crops_are_drawn(weight, expected):
    """Both sets code every image with its crop's number, so a batch shows what was drawn."""

    class Numbered:
        labels, meta, num_crops, num_tokens, num_classes = np.zeros(64, int), {}, 10, 4, 1

        def __init__(self, first: int):
            self.first = first

        def __len__(self) -> int:
            return 64

        def gather(self, images: np.ndarray, crops: np.ndarray) -> np.ndarray:
            return np.repeat(crops[:, None] + self.first, 4, axis=1)

    alone = World(0, 1, torch.device("cpu"))
    batches = CodeBatches(
        MixedCodes(Numbered(0), Numbered(10), weight), vocab_size=20, batch=32, seed=0
    )
    drawn = {int(c) for step in range(20) for c in batches.rank_slice(step, alone)[0][:, 0]}
    assert drawn == set(expected)
