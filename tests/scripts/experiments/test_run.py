"""run.sh as a stranger runs it."""

import json

import pytest
from PIL import Image

from tests.helpers import run_command

RUN = ("bash", "scripts/experiments/run.sh")


@pytest.mark.slow
def test_the_first_experiment_in_quick_mode_and_again(tmp_path):
    words = (*RUN, "e1", "--quick", "--samples", 0, "--output", tmp_path)
    done = run_command(*words).stdout
    assert done.count("+ bash scripts/autoregressive/train_c2i.sh") == 2
    assert "raster, n = 1" in done and "region, one at a time" in done
    found = json.loads((tmp_path / "e1" / "digits" / "results.json").read_text())["results"]
    d = found["differences"]["region, one at a time"]
    assert d["low"] <= d["mean"] <= d["high"] and len(found["runs"]) == 2
    # 36 steps: less than a uniform guess over 128 entries
    assert 0 < found["runs"]["raster, n = 1"][0]["nats"] < 64 * 4.86
    with Image.open(tmp_path / "e1" / "digits" / "differences.png") as picture:
        assert picture.width > 1000
    again = run_command(*words).stdout
    assert "\n+ " not in again and again.splitlines()[-1] == done.splitlines()[-1]


def test_what_there_is_is_named():
    done = run_command(*RUN, "e99", check=False)
    assert done.returncode == 2 and "error: first argument: one of e1 e2 e3 e4" in done.stderr
    done = run_command(*RUN, "e1", "--data", "cifar10", "--output", "/tmp/x", check=False)
    assert done.returncode == 2 and "--images: --data cifar10 needs a folder" in done.stderr
