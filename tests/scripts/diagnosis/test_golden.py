"""The doctor notices other numbers than the published."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from scripts.diagnosis import golden
from scripts.diagnosis.check import BROKEN, NOT_HERE, OK
from tests.helpers import GOLDEN
from tests.scripts.diagnosis.helpers import HINT, result_of


@pytest.fixture
def damaged(tmp_path):
    """``damaged(name, **changes)``: golden files; functions change arrays of one of them."""

    def damage(name: str, **changes: object) -> Path:
        for path in GOLDEN[1].glob("*.npz"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
        arrays = dict(np.load(tmp_path / name))
        np.savez(
            tmp_path / name,
            **arrays | {key: change(arrays[key]) for key, change in changes.items()},
        )
        return tmp_path

    return damage


# what is compared, the file, and how its arrays are changed
GOLDEN_CHECKS = {
    "forward": (golden.check_forward, "gpt_tiny_n9.npz", {"train_logits": lambda x: x + 2e-4}),
    "loss": (golden.check_forward, "gpt_tiny_n4.npz", {"train_loss": lambda x: x + 2e-4}),
    "not a number": (
        golden.check_forward,
        "gpt_tiny_n4.npz",
        {"train_logits": lambda x: x * np.nan},
    ),
    "greedy": (
        partial(golden.check_greedy, way="eager"),
        "gpt_tiny_n16.npz",
        {"greedy_raster_cfg1.75": lambda x: x + 1},
    ),
    "bfloat16": (
        partial(golden.check_training, precision="bf16"),
        "gpt_tiny_n4.npz",
        {"train_loss": lambda x: x + 0.1},
    ),
    "filters": (golden.check_sampling, "sampling.npz", {"probs_k5_p1.0": lambda x: x + 1e-5}),
    "pixels": (golden.check_sampling, "sampling.npz", {"pixels_uint8_64": lambda x: x ^ 1}),
    "tokenizer": (golden.check_tokenizer, "vq16.npz", {"codes": lambda x: x ^ (x == x.max())}),
}


@pytest.mark.parametrize("function, name, changes", GOLDEN_CHECKS.values(), ids=list(GOLDEN_CHECKS))
def test_other_numbers_than_the_published_are_broken(damaged, function, name, changes):
    assert result_of(function).status == OK
    result = result_of(function, golden_folder=damaged(name, **changes))
    assert result.status == BROKEN and result.advice == HINT


@pytest.mark.parametrize("function", [
    partial(golden.check_greedy, way="kernels"),
    partial(golden.check_stored, way="kernels", precision="bf16"),
    partial(golden.check_stored, way="eager", precision="fp16"),
    partial(golden.check_training, precision="fp16"),
])  # fmt: skip
def test_every_way_of_computing_agrees_here(function):
    assert result_of(function).status in (OK, NOT_HERE)


def test_a_damaged_golden_file_is_one_broken_line(damaged):
    folder = damaged("gpt_tiny_n1.npz")
    (folder / "gpt_tiny_n1.npz").write_bytes(b"PK nonsense")
    result = result_of(golden.check_forward, golden_folder=folder)
    assert result.status == BROKEN and "\n" not in result.detail and result.advice == HINT
