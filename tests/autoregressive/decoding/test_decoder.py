"""How a decoder is chosen."""

import json

import pytest
import torch

from autoregressive.decoding import decoder as decoders
from autoregressive.decoding.cpu.build import unavailable_reason
from autoregressive.decoding.decoder import Way, choose_way, possible_ways
from autoregressive.models.gpt import GPT
from scripts.diagnosis.models import fill_from_names
from tests.helpers import small_config

CPU = torch.device("cpu")


def test_options_leave_ways(monkeypatch):
    """auto: kernels keep bfloat16 on every processor, torch's operators what is quick there."""
    monkeypatch.setattr(decoders, "unavailable_reason", lambda dtype: None)
    for has, eager in ((True, "bf16"), (False, "none")):
        monkeypatch.setattr(
            "utils.precision.bfloat16_unit", lambda device, has=has: "a unit" if has else None
        )
        assert possible_ways(CPU, "auto", None, False)[0] == [
            Way("bf16", "kernels"),
            Way(eager, "eager"),
        ]
        assert possible_ways(CPU, "none", None, False)[0] == [
            Way("none", "kernels"),
            Way("none", "eager"),
        ]
        assert possible_ways(CPU, "auto", True, False)[0] == [Way("bf16", "kernels")]
        assert possible_ways(CPU, "auto", False, False)[0] == [Way(eager, "eager")]
        assert possible_ways(CPU, "auto", None, True)[0] == [Way(eager, "eager")]
    other = torch.device("xpu")
    assert possible_ways(other, "auto", None, False)[0] == [Way("none", "eager")]
    assert possible_ways(other, "bf16", True, False)[0] == [Way("bf16", "compiled")]


@pytest.fixture
def timed(monkeypatch, tmp_path):
    """Ways as they are timed, and the seconds to pretend."""
    log, seconds = [], {"kernels": 0.002, "eager": 0.001}
    monkeypatch.setattr(
        decoders, "time_step", lambda model, way, *_: log.append(way) or seconds[way.decoder]
    )
    monkeypatch.setattr(decoders, "cache_folder", lambda: tmp_path)
    return log, seconds


WAYS = [Way("bf16", "kernels"), Way("none", "eager")]


def test_the_faster_way_is_taken_and_remembered(timed, tmp_path):
    """The kernels were the default where they were 6 times slower than torch's operators."""
    log, seconds = timed
    model = GPT(small_config())
    way, reason = choose_way(model, WAYS, 8, guided=True)
    assert (
        way == WAYS[1]
        and "1 ms per forward call, by our kernels in bfloat16 2" in reason
        and "measured now" in reason
    )
    seconds["kernels"] = 0.0005
    assert choose_way(model, WAYS, 8, guided=True)[0] == WAYS[1], "measured before"
    assert len(log) == 2
    assert choose_way(model, WAYS, 4, guided=True)[0] == WAYS[0], "another number of rows"
    assert choose_way(GPT(small_config(dim=64)), WAYS, 8, guided=True)[0] == WAYS[0], "another size"
    for path in tmp_path.iterdir():
        path.write_text(json.dumps({str(w): "nonsense" for w in WAYS}))
    assert choose_way(model, WAYS, 8, guided=True)[0] == WAYS[0], "a damaged file"


def test_a_run_ends_as_it_began(timed):
    way, reason = choose_way(
        GPT(small_config()), WAYS, 8, guided=True, begun=lambda way: way.decoder == "kernels"
    )
    assert way == WAYS[0] and "as the run began" in reason and not timed[0]


def test_only_one_way_is_not_timed(timed):
    assert choose_way(GPT(small_config()), WAYS[1:], 8, guided=True)[0] == WAYS[1]
    assert not timed[0]


def test_timing_leaves_the_model_as_it_was(monkeypatch, tmp_path):
    """The kernels take the weights of what they are given, and a type is cast in place."""
    if (reason := unavailable_reason(torch.bfloat16)) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(decoders, "cache_folder", lambda: tmp_path)
    model = fill_from_names(GPT(small_config())).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    way, reason = choose_way(model, WAYS, 2, guided=True)
    assert way in WAYS and "measured now" in reason
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    kept = [json.loads(path.read_text()) for path in tmp_path.glob("decoders-*.json")]
    assert len(kept) == 1 and all(kept[0][str(way)] > 0 for way in WAYS)
