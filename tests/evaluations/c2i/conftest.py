"""The evaluator's command line on two small sets of images."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from evaluations.c2i import evaluator
from evaluations.c2i.classifier import ClassifierConfig, SmallClassifier, save_classifier
from utils.lock import release_all


@pytest.fixture
def sets(tmp_path):
    """A folder with ref.npz and sam.npz (8 x 8 images with labels) and a classifier for them."""
    generator = np.random.default_rng(0)
    for name, count in (("ref", 30), ("sam", 25)):
        images = generator.integers(0, 256, (count, 8, 8, 3), np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=images, labels=np.arange(count) % 3)
    torch.manual_seed(0)
    save_classifier(tmp_path / "net.pt", SmallClassifier(ClassifierConfig(8, 3)), ["a", "b", "c"])
    return tmp_path


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """``evaluate(folder, *options)`` of ref.npz and sam.npz by the classifier, in-process."""

    def call(
        folder, *options, ref="ref.npz", sam="sam.npz", network=("--feature-network", "net.pt")
    ):
        monkeypatch.chdir(folder)
        words = [ref, sam, *network, "--device", "cpu", *map(str, options)]
        monkeypatch.setattr(sys, "argv", ["evaluator.py", *words])
        try:
            evaluator.main()
        finally:
            release_all(delete=True)  # as ``run_main`` does
        return capsys.readouterr()

    return call
