"""What the doctor calls slow."""

from functools import partial

import pytest

from scripts.diagnosis import speed
from scripts.diagnosis.check import OK, SLOW
from tests.scripts.diagnosis.helpers import result_of


@pytest.mark.parametrize("share, other, status, reason", [
    (0.5, 3.0, OK, None),
    (0.5, None, OK, None),
    (0.1, 3.0, SLOW, "below 30% of a ceiling"),
    (0.5, 1.0, SLOW, "slower than the published way"),
])  # fmt: skip
def test_what_is_slow(share, other, status, reason):
    others = {"the published way": {} if other is None else {"seconds": other}}
    result = speed.judge("2 s", {"seconds": 2.0}, share, 0.3, others)
    assert result.status == status and (reason or "2 s") in result.detail
    assert ("speed relative to the published way" in result.figures) is (other is not None)


@pytest.mark.slow
def test_a_gpu_far_below_its_data_sheet_is_slow(monkeypatch):
    monkeypatch.setattr(speed, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(speed, "peak_flops", lambda device, precision: (1e15, "data sheet"))
    assert result_of(partial(speed.check_products, precision="bf16")).status == SLOW
