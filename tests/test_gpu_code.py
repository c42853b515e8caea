"""The kernels that torch's compiler writes for an H100, without one: it only has to be believed in.

Counts hold how much of a decoding step, and of attention with dropout, is fused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from autoregressive.decoding import compiled
from autoregressive.decoding.sampling import SamplingOptions, sample
from autoregressive.models import causal_attention
from autoregressive.models.config import GPT_models, GPTConfig
from autoregressive.models.gpt import GPT
from autoregressive.models.pad_heads import pad_heads

try:  # none of this is promised to stay
    import triton.runtime
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.fx_passes.replace_random import replace_random_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._inductor.virtualized import V
    from torch.utils import _triton
    from triton.backends.compiler import GPUTarget
except ImportError as error:
    pytest.skip(f"another torch: {error}", allow_module_level=True)

pytestmark = pytest.mark.slow
CUDA = torch.device("cuda", 0)
H100 = SimpleNamespace(
    name="NVIDIA H100",
    multi_processor_count=132,
    major=9,
    minor=0,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block_optin=232448,
    total_memory=80 << 30,
)
BYTES = {"bfloat16": 2, "float32": 4, "bool": 1, "int64": 8, "float64": 8, "uint8": 1}


@pytest.fixture
def fake() -> Iterator[None]:
    """Let tensors have no values; entered while torch still knows that there is no GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@pytest.fixture
def h100(fake, monkeypatch) -> Iterator[None]:
    """Let torch's compiler and Triton believe in an H100."""
    for owner in (CudaInterface, CudaInterface.Worker):
        monkeypatch.setattr(owner, "get_device_properties", staticmethod(lambda *_: H100))
    monkeypatch.setattr(CudaInterface, "get_compute_capability", staticmethod(lambda *_: 90))
    for name in ("is_available", "is_triton_capable"):
        monkeypatch.setattr(CudaInterface, name, staticmethod(lambda *_: True))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: H100)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_active_torch_device=lambda: CUDA,
        get_device_interface=lambda: torch.cuda,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    forget()  # what earlier tests made torch believe
    yield
    forget()


def forget() -> None:
    for remembered in (DeviceProperties.create, _triton.has_triton):
        remembered.cache_clear()


class Holder(nn.Module):
    """Gives a function of modules parameters that are arguments."""

    def __init__(self, function: Callable, modules: list[nn.Module]):
        super().__init__()
        self.function, self.held = function, nn.ModuleList(modules)

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        out = self.function(*self.held, *arguments)
        return out if isinstance(out, tuple) else (out,)


def gpu_code(function: Callable, modules: list[nn.Module], *inputs: Tensor) -> str:
    """Return what torch's compiler writes for ``function`` of modules and tensors on CUDA."""
    holder = Holder(function, modules)
    parameters = dict(holder.named_parameters())
    flat, count = [*parameters.values(), *inputs], len(parameters)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(parameters, tensors[:count], strict=True))
        return functional_call(holder, given, tensors[count:])

    with torch.no_grad():
        pure = functionalize(call, remove="mutations")
        graph = make_fx(pure, decomposition_table=select_decomp_table())(*flat)
    with V.set_fake_mode(torch._guards.detect_fake_mode(flat)):
        replace_random_passes(graph)
        post_grad_passes(graph, True)
        lowering = GraphLowering(graph, example_inputs=flat, is_inference=True)
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*flat)
            code = lowering.codegen()[0]
    return getattr(code, "value", code).split("def call")[1]


def launches(code: str) -> tuple[int, list[str]]:
    """Return the number of fused kernels, and the others by name."""
    fused = re.findall(r"\btriton_\w+\.run\(", code)
    return len(fused), re.findall(r"\b(?:extern_kernels|torch\.ops)\.([\w.]+)\(", code)


def largest_buffer(code: str) -> int:
    """Return the bytes of the largest buffer that is made on the way or as a result."""
    found = re.findall(r"empty_strided_cuda\(\(([\d, ]*)\), \([\d, ]*\), torch\.(\w+)\)", code)
    sizes = [[int(n) for n in re.findall(r"\d+", shape)] for shape, _ in found]
    return max(math.prod(s) * BYTES[kind] for s, (_, kind) in zip(sizes, found, strict=True))


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=CUDA)


def placed(size: str) -> GPT:
    """Return two layers of a size, as they are for decoding; their values are not there."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**GPT_models[size] | {"n_layer": 2}))
    return pad_heads(model.cast_weights(torch.bfloat16).eval().requires_grad_(False), 8)


def place(model: GPT) -> None:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = empty(*parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=False)
    model.freqs_cis = empty(*model.freqs_cis.shape, dtype=torch.float32)


MODELS = {size: placed(size) for size in ("GPT-B", "GPT-3B")}


@pytest.mark.parametrize("size", MODELS)
@pytest.mark.parametrize("slots", [1, 4])
def test_kernels_of_a_decoding_step(h100, size, slots):
    """Between two attentions four products and five fused kernels, one of which fills the cache."""
    model, rows = MODELS[size], 2
    place(model)
    config, attention = model.config, model.layers[0].attention
    heads, channels = config.n_head, attention.head_dim
    store = empty(2, 2, rows, heads, 576, channels)
    x, y = empty(rows, slots, config.dim), empty(rows, slots, heads, channels).transpose(1, 2)
    gates, freqs_cis = empty(2 * config.ffn_dim, config.dim), model.freqs_cis[100 : 100 + slots]
    cache = store[1, :, :, :, 100 : 100 + slots]
    code = gpu_code(compiled.next_attention, list(model.layers), x, y, gates, freqs_cis, cache)
    assert launches(code) == (5, ["mm"] * 4)

    logits = gpu_code(compiled.logits_of, [model], x, y, gates, None, empty(dtype=torch.float64))
    assert launches(logits) == (5, ["mm"] * 4)


def test_kernels_of_the_draw(h100):
    """Two of the softmax, one of the sums, one of the search."""

    def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
        return sample(logits, uniforms, SamplingOptions(cfg_scale=1.5))

    code = gpu_code(draw, [], empty(1, 4, 16384, dtype=torch.float32), empty(1, 4).float())
    fused, others = launches(code)
    assert fused <= 4 and not others


@pytest.mark.parametrize("n", [4, 16])
def test_kernels_of_attention_with_dropout(h100, n):
    """Few beside flash attention, and no buffer larger than the output."""
    rows, heads, slots, channels = 16, 20, 576, 64
    q, k, v, y, d_y = (empty(rows, slots, heads, channels).transpose(1, 2) for _ in range(5))
    more = empty(slots, n - 1, dtype=torch.bool)
    attention, whole = causal_attention._CausalAttention, 2 * rows * heads * slots * channels

    def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
        saved: list[Tensor] = []
        context = SimpleNamespace(save_for_backward=lambda *tensors: saved.extend(tensors))
        return attention.forward(context, *inputs, 0.1, 0.125), *saved[4:6]

    def backward(d_y: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
        tensors = (*saved[:7], None, None, *saved[7:])
        context = SimpleNamespace(saved_tensors=tensors, sizes=(slots, slots))
        context.dropout_p, context.scale = 0.1, 0.125
        return attention.backward(context, d_y)[:3]

    code = gpu_code(forward, [], q, k, v, more)
    fused, others = launches(code)
    assert fused <= 4 and others == ["aten._scaled_dot_product_flash_attention.default"]
    assert largest_buffer(code) <= whole

    log_sum = empty(rows, heads, slots, dtype=torch.float32)
    kept = empty(rows, heads, slots, n - 1, dtype=torch.bool)
    seeds = (empty(2, dtype=torch.uint64), empty(dtype=torch.uint64))
    code = gpu_code(backward, [], d_y, q, k, v, y, log_sum, kept, more, *seeds)
    fused, others = launches(code)
    assert fused <= 6 and others == ["aten._scaled_dot_product_flash_attention_backward.default"]
    assert largest_buffer(code) <= whole
