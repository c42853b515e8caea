"""Probes against cases whose answer is known."""

from collections.abc import Callable

import numpy as np
import pytest

from autoregressive.models.gpt import GPT, GPTConfig
from scripts.experiments.probes import mutual_information, total_correlation


class Made:
    """2,000 images of 2 classes whose codes, of 4 values, a function of the image makes."""

    num_crops, meta = 1, {"codebook_size": 4, "classes": ["a", "b"]}

    def __init__(self, codes: Callable[[np.ndarray], np.ndarray]):
        self.codes = codes

    def __len__(self) -> int:
        return 2000

    def batch(self, images: np.ndarray, crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.codes(images), (images // 4) % 2


COPIES = Made(lambda images: np.repeat((images % 4)[:, None], 64, axis=1))
NOISE = Made(lambda images: np.random.default_rng(images).integers(4, size=(len(images), 64)))


def test_copies_share_all_they_hold_until_it_is_known():
    found = mutual_information(COPIES, COPIES, 60)
    assert min(found["given the class"]) > 0.9 * np.log(4)
    assert max(map(abs, found["given the first four too"])) < 0.1
    assert found["distance"][0] == 1 and found["distance"][-1] == round(7 * 2**0.5)


def blind_gpt(n: int) -> GPT:
    """A small GPT that sees nothing but the class."""
    size = {"n_layer": 1, "n_head": 2, "dim": 32, "grid_height": 8, "grid_width": 8}
    config = GPTConfig(vocab_size=4, num_classes=2, ar_token_num=n, **size)
    gpt = GPT(config)
    gpt.init_weights()
    gpt.tok_embeddings.weight.data.zero_()
    gpt.output.weight.data.normal_(std=0.2)
    return gpt


@pytest.mark.parametrize("n", [4, 16])
def test_total_correlation_of_copies_is_all_but_one(n):
    found = total_correlation(blind_gpt(n), COPIES, COPIES, np.arange(200), 120)
    assert found.shape == (200, 64 // n - 1)
    assert found.mean(0) == pytest.approx((n - 1) * np.log(4), rel=0.1)


def test_noise_has_no_total_correlation():
    found = total_correlation(blind_gpt(4), NOISE, NOISE, np.arange(200), 120)
    assert abs(found.mean()) < 0.05
