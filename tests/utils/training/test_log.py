"""Averages over the steps since the last log line."""

import json
import time

import pytest
import torch

from utils.distributed import World
from utils.logger import create_logger
from utils.training.log import ScalarLog, Window

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


def test_a_torn_last_line_is_cut_off(tmp_path):
    """A full disk left half a line, and the next life of the run went on behind it."""
    world = World(0, 1, CPU)
    torn = '{"step": 1, "loss": 3.5}\n{"step": 17, "loss": 3.77'
    (tmp_path / "metrics.jsonl").write_text(torn)
    (tmp_path / "log.txt").write_text("[2026-01-01] whole\n[2026-01-01] to")
    curves = ScalarLog(world, tmp_path, None, {})
    curves.write(11, {"loss": 3.0})
    curves.close()
    create_logger(world, tmp_path).info("goes on")
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 11]
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert len(log) == 2 and log[1].endswith("] goes on")
