"""The compiled decoder: few kernels per layer, weights held once, a schedule in several graphs."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from autoregressive.decoding import compiled
from autoregressive.decoding.compiled import CompiledDecoder, fuse_gates, record
from autoregressive.decoding.decoder import first_layers
from autoregressive.decoding.generate import Generator, generate
from autoregressive.decoding.sampling import SamplingOptions, image_randomness
from autoregressive.models.gpt import GPT
from autoregressive.models.pad_heads import pad_heads
from scripts.diagnosis.models import fill_from_names
from tests.helpers import same_tensors, small_config

OPTIONS = SamplingOptions(cfg_scale=1.5)


def make_model(**changes: object) -> GPT:
    return fill_from_names(GPT(small_config(n_layer=3, **changes))).eval()


class Operators(TorchDispatchMode):
    """Lists the names of operators; those inside ``opaque`` functions apart."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.inside: list[str] = []
        self.calls = 0
        self.within = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        (self.inside if self.within else self.outside).append(func._schema.name)
        return func(*args, **(kwargs or {}))

    def opaque(self, function, **options):
        """Stands for torch.compile."""
        assert options["dynamic"] in (False, True), "kernels for the very shapes of the schedule"

        def run(*arguments: object) -> object:
            self.calls, self.within = self.calls + 1, True
            try:
                return function(*arguments)
            finally:
                self.within = False

        return run


class Attentions(TorchFunctionMode):
    """Counts what reaches torch's attention, and hides it from ``Operators``."""

    def __init__(self, operators: Operators):
        super().__init__()
        self.operators, self.count = operators, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.count += 1
        before = len(self.operators.outside)
        out = func(*args, **(kwargs or {}))
        del self.operators.outside[before:]
        return out


def test_only_attention_is_outside_what_is_compiled(monkeypatch):
    """Per step a compiled function before each attention, one after the last, and the sampler.

    Keys and values were copied to the cache by two kernels each outside; w1 and w3 were two
    products.
    """
    model, operators = make_model(), Operators()
    monkeypatch.setattr(torch, "compile", operators.opaque)
    generator = Generator(CompiledDecoder(model), model.order, OPTIONS, 2)
    with operators, Attentions(operators) as attentions:
        generator(torch.tensor([0, 1]), torch.rand(2, 16))
    steps, layers = len(model.order.steps), model.config.n_layer
    assert operators.calls == steps * (layers + 2) and attentions.count == steps * layers
    products = [name for name in operators.inside if name in ("aten::mm", "aten::linear")]
    assert len(products) == steps * (4 * layers + 1)
    # embeddings and their concatenation, the CFG scale once, and the write of the tokens
    views = r"slice|select|transpose|view|expand|unsqueeze|squeeze|permute|unbind|alias|t$|detach"
    rest = [n for n in operators.outside if not re.match(rf"aten::_?({views})", n)]
    assert not [n for n in rest if re.search(r"mm|rsqrt|silu|softmax|lerp|cumsum|stack|mul", n)]
    assert len(rest) <= 7 * steps + 10


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_head": 2},
        {"ar_token_num": 1},
        {"group_attention": "causal", "order": "raster", "special_tokens": "last"},
    ],
    ids=str,
)
@pytest.mark.parametrize("multiple", [1, 16])
def test_tokens_are_those_of_the_model(monkeypatch, changes, multiple):
    """Also with padded heads, grouped ones, one token per step, and a scale of each step."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model, uniforms = pad_heads(make_model(**changes), multiple), torch.rand(2, 16)
    cond, options = torch.tensor([0, 1]), SamplingOptions(cfg_scale=2.0, cfg_schedule="linear")
    expected = generate(model, model.order, cond, uniforms, options)
    assert torch.equal(
        generate(CompiledDecoder(model), model.order, cond, uniforms, options), expected
    )
    assert torch.equal(generate(model, model.order, cond, uniforms, options), expected)


def test_fused_gates_are_held_once_and_saved_apart():
    """The model stays as it was: names, shapes, values, and no byte more."""
    model, before = make_model(), make_model().state_dict()
    gates = fuse_gates(model)
    assert len(gates) == 3 and same_tensors(model.state_dict(), before)
    for block, both in gates.items():
        for linear in (block.feed_forward.w1, block.feed_forward.w3):
            assert linear.weight.untyped_storage().data_ptr() == both.untyped_storage().data_ptr()
    part = first_layers(model, 2)
    assert len(fuse_gates(part)) == 2 and same_tensors(model.state_dict(), before)


class Rounded(Tensor):
    """Stands for a tensor of torchao."""


def test_rounded_weights_stay_as_they_are():
    model = make_model()
    for block in model.layers:
        for linear in (block.feed_forward.w1, block.feed_forward.w3):
            rounded = linear.weight.detach().as_subclass(Rounded)
            linear.weight = torch.nn.Parameter(rounded, requires_grad=False)
    assert not fuse_gates(model)


class Graph:
    """Stands for a CUDA graph: notes what it holds."""

    made: list[Graph]
    now: Graph | None = None

    def __init__(self) -> None:
        self.steps: list[int] = []
        Graph.made.append(self)

    def capture_begin(self, pool: object) -> None:
        assert pool == "pool" and Graph.now is None
        Graph.now = self

    def capture_end(self) -> None:
        assert Graph.now is self
        Graph.now = None


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("steps, sizes", [(3, [3, 3, 1]), (7, [7, 0]), (8, [7])])
def test_a_long_schedule_is_several_graphs(monkeypatch, steps, sizes):
    """One graph of all steps of n = 1 would have hundreds of thousands of kernels."""
    Graph.made, Graph.now = [], None
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    model = make_model()
    generator = Generator(CompiledDecoder(model), model.order, OPTIONS, 2)
    step = generator.decoder.decode_step

    def counted(tokens: Tensor, cond: Tensor, start: int, *rest: object) -> Tensor:
        Graph.now.steps.append(start)
        return step(tokens, cond, start, *rest)

    monkeypatch.setattr(generator.decoder, "decode_step", counted)
    inputs = (torch.tensor([0, 1]), torch.rand(2, 16))
    with torch.inference_mode():
        graphs, codes = record(generator._decode, inputs, steps)
    assert [len(graph.steps) for graph in graphs] == sizes and Graph.now is None
    assert torch.equal(codes, generate(model, model.order, *inputs, OPTIONS))


def test_flagship_schedules_are_cut_where_graphs_grow_too_large():
    """GPT-3B: one graph at n = 4 and 16, pieces at n = 1; none above the limit by far."""
    decoder = partial(CompiledDecoder.steps_per_graph, type("D", (), {})())
    for layers, fewest in ((24, 147), (48, 70)):
        decoder.args[0].config = small_config(n_layer=layers)
        assert fewest <= decoder() <= compiled.GRAPH_NODES / (9 * layers)


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


@pytest.mark.parametrize("interval, graphs", [(-1, 8), (20, 11)])
def test_graphs_of_a_whole_schedule(compiler, interval, graphs):
    """For all layers and steps: first, between two attentions, last, and sampling, each of 1 and n
    slots; all but sampling once more for fewer rows.
    """
    model = GPT(small_config(n_layer=10, grid_height=8, grid_width=8)).eval()
    model.init_weights()
    options = SamplingOptions(cfg_scale=1.5, cfg_interval=interval)
    generator = Generator(CompiledDecoder(model), model.order, options, 2)
    for seed in range(2):
        torch.manual_seed(seed)
        generator(torch.tensor([0, 1]), torch.rand(2, 64))
        assert compiler.graphs == graphs, "a second batch compiles nothing"
