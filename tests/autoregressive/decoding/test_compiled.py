"""The compiled decoder: tokens of the model, number of graphs."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from autoregressive.decoding.compiled import CompiledDecoder
from autoregressive.decoding.generate import Generator
from autoregressive.decoding.sampling import SamplingOptions, image_randomness
from autoregressive.models.gpt import GPT
from scripts.diagnosis.models import fill_from_names
from tests.helpers import small_config


def test_compiled_decoder_gives_the_tokens_of_the_model(monkeypatch):
    """On the CPU, without a graph; the model is not changed by it."""
    model = fill_from_names(GPT(small_config(drop_path_rate=0.1))).eval()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    decoder = CompiledDecoder(model)
    labels, uniforms = map(torch.from_numpy, image_randomness(3, range(3), 3, 16))
    options = SamplingOptions(cfg_scale=1.5)
    expected = Generator(model, model.order, options, 3)(labels, uniforms)
    assert torch.equal(Generator(decoder, model.order, options, 3)(labels, uniforms), expected)
    assert model.layers[1].drop_path.rate > 0


@pytest.mark.parametrize("interval, graphs", [(-1, 4), (20, 6)])
def test_graphs_of_a_whole_schedule(compiler, interval, graphs):
    """For all layers and steps: before and after attention, of 1 and n slots; rows once more."""
    model = GPT(small_config(n_layer=10, grid_height=8, grid_width=8)).eval()
    model.init_weights()
    options = SamplingOptions(cfg_scale=1.5, cfg_interval=interval)
    generator = Generator(CompiledDecoder(model), model.order, options, 2)
    for seed in range(2):
        torch.manual_seed(seed)
        generator(torch.tensor([0, 1]), torch.rand(2, 64))
        assert compiler.graphs == graphs, "a second batch compiles nothing"
