"""Estimates of dependence against cases whose answer is known."""

from argparse import Namespace

import numpy as np
import pytest

from scripts.experiments import e3_dependence as e3


class Copies:
    """Codes of which all cells of an image are the same random value of 4."""

    num_crops, meta = 1, {"codebook_size": 4, "classes": ["a", "b"]}

    def __len__(self) -> int:
        return 2000

    def batch(self, images: np.ndarray, crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.repeat((images % 4)[:, None], 64, axis=1), (images // 4) % 2


def test_copies_share_all_they_hold_until_it_is_known():
    found = e3.mutual_information(Namespace(probe_steps=60), Copies(), Copies())
    assert min(found["given the class"]) > 0.9 * np.log(4)
    assert max(map(abs, found["given the first four too"])) < 0.1
    assert found["distance"][0] == 1 and found["distance"][-1] == round(7 * 2**0.5)


def test_gaps_of_groups_are_sums_over_their_tokens(tmp_path):
    rng, results = np.random.default_rng(0), {}
    for name in (e3.TOGETHER, e3.ALONE):
        losses = rng.random((50, 64))
        np.savez(tmp_path / f"{name}.npz", losses=losses, raster=np.arange(64))
        results[name] = [{"losses": tmp_path / f"{name}.npz", "values": losses}]
    difference = results[e3.TOGETHER][0]["values"] - results[e3.ALONE][0]["values"]
    mean, error = e3.group_gaps(results)
    expected = [difference[:, i : i + 4].sum(1) for i in range(0, 64, 4)]
    assert mean == pytest.approx(np.mean(expected, axis=1))
    assert error == pytest.approx(np.std(expected, axis=1) / 50**0.5)
