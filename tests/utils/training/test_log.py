"""Averages over the steps since the last log line."""

import time

import pytest
import torch

from utils.training.log import Window

CPU = torch.device("cpu")


def test_speed_is_that_of_the_time_not_paused():
    window = Window(("loss",), CPU)
    for loss in (1.0, 3.0, float("nan"), 4.0):
        window.add({"loss": torch.tensor(loss)})
        time.sleep(0.05)
    with window.paused():
        time.sleep(1.0)
    figures = window.read(images=8)
    assert figures["loss"] == pytest.approx(8 / 3)  # the nan is left out
    assert 0.05 <= figures["seconds/step"] < 0.2
    assert figures["images/s"] == pytest.approx(8 / figures["seconds/step"])
