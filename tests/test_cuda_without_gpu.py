"""What holds for CUDA, shown on a CPU: fake tensors of the device "cuda" and a counting compiler.

Fake tensors have shapes, types and devices but no values. torch refuses operators over two devices
there, and what reads values on the host is seen by a dispatch mode. What only a device can show is
in test_gpu.py.
"""

from __future__ import annotations

import inspect
import math
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autoregressive.decoding.compiled import CompiledDecoder
from autoregressive.decoding.decoder import Decoder, Way, place_for_decoding
from autoregressive.decoding.generate import Generator, generate
from autoregressive.decoding.sampling import SamplingOptions
from autoregressive.models import attention
from autoregressive.models.gpt import GPT, GPT_models, GPTConfig
from autoregressive.models.linear_cross_entropy import linear_cross_entropy
from autoregressive.models.pad_heads import pad_heads
from autoregressive.sample import sample_c2i_ddp
from autoregressive.sample.pipeline import Pipeline
from autoregressive.train import extract_codes_c2i, train_c2i, watch
from dataset.imagenet import to_model_range
from scripts.diagnosis.models import fill_from_names
from tests.helpers import random_codes, same_tensors, small_config
from tokenizer import reconstruct_vq, train_vq
from tokenizer.layout import place_tokenizer
from tokenizer.vq_model import AttnBlock, VQModel, make_vq_config
from utils.distributed import World
from utils.parallel import fill, local, shard
from utils.precision import autocast

CUDA = torch.device("cuda", 0)
# operators that read values on the host, or whose result has as many elements as values say
WAITING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero")
WAITING += ("unique", "_unique2", "bincount", "repeat_interleave")


class Operations(TorchDispatchMode):
    """Lists operators with shapes and types, and those that would make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name.startswith("prim::"):  # asks for a property
            return out
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        seen = [(tuple(t.shape), t.dtype) for t in tensors]
        numbers = [a for a in tree_leaves(args) if isinstance(a, (int, float, bool))]
        self.all.append((name, seen, numbers))
        # a number on the host goes along with a kernel's arguments; more than one must be copied
        devices = {t.device.type for t in tensors if t.ndim > 0}
        by_bool = name in ("index", "index_put", "index_put_") and any(
            t.dtype in (torch.bool, torch.uint8) for t in tensors[1:-1]
        )
        if name in WAITING or by_bool or devices - {"cuda"}:
            self.waits.append(f"{name} {seen} {devices}")
        return out


@dataclass
class Call:
    """Arguments of one call of scaled_dot_product_attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    cudnn: bool = field(default_factory=torch.backends.cuda.cudnn_sdp_enabled)


@dataclass
class AttentionCalls(TorchFunctionMode):
    """Keeps what reaches torch's attention."""

    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.calls.append(Call(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def slow_because(call: Call) -> str | None:
    """Return why torch would take its slow attention on an H100, or copy q, k and v first.

    The rules of ATen/native/transformers/cuda/sdp_utils.cpp and attention.cpp for 16 bits: flash
    has no mask and copies heads to a multiple of 8 channels (pad_last_dim<8>); efficient needs such
    a multiple (check_head_dim_size_mem_efficient), and as many key heads as query heads.
    """
    q, k, v = call.q, call.k, call.v
    if len({x.device for x in (q, k, v)}) > 1 or q.device.type != "cuda":
        return "devices"
    if len({x.dtype for x in (q, k, v)}) > 1 or q.dtype not in (torch.bfloat16, torch.float16):
        return "types"
    if len({x.shape[-1] for x in (q, k, v)}) > 1 or q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"{q.shape[-1]} channels"
    if any(x.stride(-1) != 1 or x.storage_offset() * x.itemsize % 16 for x in (q, k, v)):
        return "strides"
    if min(q.shape[2], k.shape[2]) < 1:
        return "no slots"
    if call.attn_mask is not None and (call.enable_gqa or q.shape[1] != k.shape[1]):
        return "a mask and grouped heads"
    return None


@contextmanager
def fake_cuda() -> Iterator[None]:
    """A context in which tensors have no values, those of "cuda" neither."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def place(model: nn.Module) -> nn.Module:
    """Give ``model`` fake parameters and buffers on CUDA; within ``fake_cuda`` only."""
    place_parameters(model, CUDA)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                fake = torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA)
                module._buffers[name] = fake
    return model


def place_parameters(model: nn.Module, device: torch.device) -> None:
    """Give ``model`` fake parameters on ``device``."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                module._parameters[name] = nn.Parameter(fake, parameter.requires_grad)


def bare_gpt(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> GPT:
    """Return a GPT without values, in ``eval()`` mode; to be placed within ``fake_cuda``."""
    with torch.device("meta"):
        model = GPT(small_config(**changes))
    return model.cast_weights(dtype).eval()


def sized_gpt(size: str, **changes: Any) -> GPT:
    """Return one layer of a size of the table without values, in bfloat16."""
    small = dict(n_layer=1, vocab_size=64, grid_height=4, grid_width=4)
    with torch.device("meta"):
        model = GPT(GPTConfig(**GPT_models[size] | small | changes))
    return model.cast_weights(torch.bfloat16).eval()


def decode_twice(decoder: Decoder, options: SamplingOptions) -> tuple[list, list]:
    """Return the operations of two batches, and assert that none makes the host wait."""
    order, lists = decoder.order, []
    generator = Generator(decoder, order, options, 2)
    cond = torch.zeros(2, dtype=torch.int64, device=CUDA)
    uniforms = torch.zeros(2, order.num_tokens, device=CUDA)
    for _ in range(2):
        with Operations() as operations:
            codes = generator(cond, uniforms)
        assert codes.device == CUDA and codes.shape == (2, order.num_tokens)
        assert not operations.waits
        lists.append(operations.all)
    return lists[0], lists[1]


OPTIONS = {
    "greedy": SamplingOptions(temperature=0.0),
    "plain": SamplingOptions(),
    "guided for a while": SamplingOptions(cfg_scale=1.5, cfg_interval=6),
    "filtered": SamplingOptions(cfg_scale=1.5, top_k=5, top_p=0.9, temperature=0.9),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("n", [1, 4])
def test_decoding_stays_on_the_device_and_repeats_itself(n, options):
    """Then a CUDA graph may hold it: no copy from or to the host, the same operators each time."""
    model = bare_gpt(ar_token_num=n)
    with fake_cuda():
        first, second = decode_twice(place(model), options)
    assert first == second and len(first) > 100


@pytest.mark.parametrize("n", [1, 4])
def test_the_compiled_decoder_repeats_itself_too(monkeypatch, n):
    """What its functions compute, uncompiled, once the CFG scale is on the device."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(CompiledDecoder, "capture", lambda self, decode, *_: decode)
    model = bare_gpt(ar_token_num=n)
    with fake_cuda():
        decoder = CompiledDecoder(place(model))
        decoder.scale_of(1.5)
        first, second = decode_twice(decoder, OPTIONS["guided for a while"])
    assert first == second and len(first) > 100


@pytest.mark.parametrize("changes", [{}, {"n_kv_head": 2}, {"drop_path_rate": 0.1}], ids=str)
@pytest.mark.parametrize("n", [1, 4])
def test_a_training_forward_stays_on_the_device(n, changes):
    """Forward, and the gradients that the loss makes there; the backward needs a real device."""
    model = bare_gpt(ar_token_num=n, **changes)
    with fake_cuda():
        place(model).train()
        codes = torch.zeros(2, 16, dtype=torch.int64, device=CUDA)
        cond = torch.zeros(2, dtype=torch.int64, device=CUDA)
        lists = []
        for _ in range(2):
            with Operations() as operations:
                loss, losses = model(codes, cond)
            assert loss.device == losses.device == CUDA and loss.requires_grad
            assert not operations.waits
            lists.append(operations.all)
    assert lists[0] == lists[1] and len(lists[0]) > 100


def test_offloaded_weights_draw_pictures(monkeypatch):
    """--cpu-offload: weights are on the device only during a call of ``decode_step``.

    The cache was made where the weights are between calls, on the host: an error at the first
    picture.
    """
    model = bare_gpt()
    step = model.decode_step

    def gathered_step(*arguments: Any) -> Tensor:  # as FSDP's hooks do
        place_parameters(model, CUDA)
        try:
            return step(*arguments)
        finally:
            place_parameters(model, torch.device("cpu"))

    monkeypatch.setattr(model, "decode_step", gathered_step)
    with fake_cuda():
        place(model)
        place_parameters(model, torch.device("cpu"))
        generator = Generator(model, model.order, OPTIONS["filtered"], 2)
        cond = torch.zeros(2, dtype=torch.int64, device=CUDA)
        codes = generator(cond, torch.zeros(2, model.order.num_tokens, device=CUDA))
    assert codes.device == CUDA


def test_what_makes_the_host_wait_is_seen():
    """The mode itself: each of these is found."""
    with fake_cuda(), Operations() as operations:
        x = torch.zeros(3, device=CUDA)
        for wait in (
            lambda: x.sum().item(),
            lambda: x.nonzero(),
            lambda: x[x > 0],
            lambda: x.cpu(),
            lambda: torch.zeros(3).to(CUDA),
            lambda: x.masked_select(x > 0),
            lambda: x.copy_(torch.zeros(3)),
        ):
            before = len(operations.waits)
            try:
                wait()
            except Exception as error:  # fake tensors have no values to return
                assert "DataDependent" in type(error).__name__ or "Dynamic" in type(error).__name__
                operations.waits.append(str(error))
            assert len(operations.waits) > before


# 64, 100 and 128 channels per head
@pytest.mark.parametrize("size", ["GPT-B", "GPT-3B", "GPT-7B"])
def test_attention_gets_what_a_fast_kernel_takes(monkeypatch, size):
    """In decoding, and in training with the dense mask and dropout, of each width of heads.

    Heads of 100 channels had the whole cache copied in each layer of each step, and in training all
    scores in float32.
    """
    monkeypatch.setattr(GPT, "to", lambda self, _: self)
    model = place_for_decoding(sized_gpt(size), torch.bfloat16, CUDA)
    training = sized_gpt(size).train()
    with fake_cuda(), AttentionCalls() as sdpa:
        operations, _ = decode_twice(place(model), OPTIONS["guided for a while"])
        decoded = len(sdpa.calls)
        codes = torch.zeros(2, 16, dtype=torch.int64, device=CUDA)
        place(training)(codes, torch.zeros(2, dtype=torch.int64, device=CUDA))
    assert decoded == 2 * len(model.order.schedule) and len(sdpa.calls) == decoded + 1
    assert not [name for name, *_ in operations if "pad" in name], "padded once, at load"
    # cuDNN would make a plan for each length; elsewhere it may be chosen
    assert [call.cudnn for call in sdpa.calls] == [False] * decoded + [True]
    assert sdpa.calls[-1].attn_mask is not None and sdpa.calls[-1].dropout_p == 0.1
    assert not [reason for call in sdpa.calls if (reason := slow_because(call))]
    scale = GPT_models[size]["n_head"] ** 0.5 / GPT_models[size]["dim"] ** 0.5
    assert all(call.scale == pytest.approx(scale) for call in sdpa.calls)


@pytest.mark.parametrize("n_kv_head", [None, 1])
def test_padded_heads_change_nothing(n_kv_head):
    """Heads of 100 channels padded to 104, in float64: logits, tokens, and what is saved."""
    config = small_config(dim=200, n_head=2, n_kv_head=n_kv_head)
    model = fill_from_names(GPT(config)).double().eval()
    padded = pad_heads(fill_from_names(GPT(config)).double().eval(), 8)
    assert pad_heads(padded, 8).new_cache(1).store.shape[-1] == 104, "padded twice is padded once"
    codes, cond = random_codes(config)
    with torch.no_grad():
        logits = [m.logits(codes, cond) for m in (model, padded)]
    torch.testing.assert_close(*logits, atol=1e-12, rtol=0)
    options, uniforms = OPTIONS["filtered"], torch.rand(2, 16)
    tokens = [generate(m, model.order, cond, uniforms, options) for m in (model, padded)]
    assert torch.equal(*tokens) and tokens[0].unique().numel() > 3
    assert same_tensors(padded.state_dict(), model.state_dict())


@pytest.mark.parametrize("masked", [False, True])
def test_attention_padded_on_the_way_changes_nothing(monkeypatch, masked):
    """What training on CUDA does, here: output and gradients in float64."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, weight = torch.randn(4, 2, 3, 5, 100, generator=generator, dtype=torch.float64)
    results = []
    mask = torch.ones(5, 5, dtype=torch.bool).tril() if masked else None
    for multiple in (1, 8):
        monkeypatch.setattr(attention, "channel_multiple", lambda *_, m=multiple: m)
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        y = attention.attend_fused(*inputs, mask, 0.0, 0.1, False)
        (y * weight).sum().backward()
        results.append([y.detach(), *(x.grad for x in inputs)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-14, rtol=1e-12)


def test_only_16_bits_on_cuda_are_padded():
    """What a CPU computes is as it was."""
    half, single = torch.bfloat16, torch.float32
    places = ((CUDA, half), (CUDA, single), (torch.device("cpu"), half))
    assert [attention.channel_multiple(*p) for p in places] == [8, 1, 1]


class CountingCompiler:
    """A back-end of torch.compile that counts graphs and runs them as they are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.graphs = 0
        real = torch.compile
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", lambda *a, **k: real(*a, **k | {"backend": self}))

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Tensor]):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def compiler(monkeypatch):
    """Count graphs; a step that torch would leave uncompiled raises."""
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield CountingCompiler(monkeypatch)
    torch._dynamo.reset()


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


def trainable_gpt(**changes: Any) -> GPT:
    """Return a GPT of ten compiled blocks in ``train()`` mode."""
    model = GPT(small_config(n_layer=10, **changes)).train()
    model.init_weights()
    nn.init.normal_(model.output.weight)
    for block in model.layers:
        block.compile()
    return model


def train_steps(model: GPT, steps: int) -> None:
    for seed in range(steps):
        torch.manual_seed(seed)
        model(*random_codes(model.config))[0].backward()


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_graphs_of_training(compiler, recompute):
    """One for all blocks."""
    model = trainable_gpt()
    model.recompute_activations(recompute)
    train_steps(model, 2)
    assert compiler.graphs == 1


def test_graphs_of_training_with_stochastic_depth(compiler):
    """Each block has its own rate: it was compiled on its own, and from the ninth on not at all."""
    model = trainable_gpt(drop_path_rate=0.5)
    train_steps(model, 2)
    assert compiler.graphs == 1


def test_compiled_stochastic_depth_drops_rows_by_the_blocks_rate(compiler):
    """The last of three blocks has the whole rate; rows that stay are divided by what stays."""
    model = GPT(small_config(n_layer=3, drop_path_rate=0.4))
    torch.manual_seed(0)
    for layer, rate in enumerate((0.0, 0.2, 0.4)):
        drop_path = model.layers[layer].drop_path
        out = torch.compile(drop_path)(torch.ones(20_000, 2, 3))
        assert compiler.graphs == 1
        assert (out == 0).all(-1).all(-1).float().mean().item() == pytest.approx(rate, abs=0.02)
        assert out.max().item() == pytest.approx(1 / (1 - rate))


class HeldOut:
    """Seven images of random codes, of one crop each."""

    num_crops = 1

    def __init__(self, config: GPTConfig):
        self.codes, self.labels = (x.numpy() for x in random_codes(config, 7))

    def __len__(self) -> int:
        return 7

    def batch(self, images: np.ndarray, crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.codes[images], self.labels[images]


def test_pictures_and_validation_compile_nothing(compiler, monkeypatch, tmp_path):
    """A picture took up to eight compilations in mid-run, an odd last batch of validation one."""
    model = trainable_gpt()
    train_steps(model, 1)
    monkeypatch.setattr(watch, "save_png", lambda *_: None)
    world, decoded = World(0, 1, torch.device("cpu")), []
    vq = Namespace(decode_code=lambda codes: decoded.append(codes) or torch.zeros(16, 3, 8, 8))
    assert compiler.graphs == 1
    losses = watch.validate(model, model, HeldOut(model.config), 7, 2, world, "none")
    watch.draw_samples(model, vq, tmp_path / "a.png", world, "none", False)
    assert compiler.graphs == 1 and decoded[0].shape == (16, 4, 4)
    train_steps(model, 1)
    assert compiler.graphs == 1 and losses["val/loss"] > 0


def test_validation_with_flex_attention_keeps_one_shape(compiler, monkeypatch):
    """It stays compiled: uncompiled FlexAttention holds all scores."""
    model = GPT(small_config()).eval()
    model.init_weights()
    nn.init.normal_(model.output.weight)
    world, codes = World(0, 1, torch.device("cpu")), HeldOut(model.config)
    expected = watch.validate(model, model, codes, 7, 2, world, "none")
    model.block_mask, shapes = "flex", []

    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        shapes.append(len(x))
        model.block_mask = None
        return model(x, y)

    found = watch.validate(forward, model, codes, 7, 2, world, "none")
    assert shapes == [2, 2, 2, 2]
    assert found == pytest.approx(expected)


class Stream:
    """Stands for a CUDA stream and its events, and notes the device of the thread that waits."""

    devices: ClassVar[list[object]] = []

    def wait_event(self, event: object) -> None:
        self.devices.append(getattr(CURRENT, "device", 0))

    def record_event(self) -> object:
        return object()


CURRENT = threading.local()


def test_images_are_written_by_a_thread_on_the_device_of_the_rank(monkeypatch):
    """A new thread's device is 0: each rank opened a context there."""
    device = torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda d: setattr(CURRENT, "device", d.index))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(Stream, "devices", [])
    pinned: list[Tensor] = []  # from other memory a copy waits until the GPU has nothing to do
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    codes = torch.zeros(2, 16, dtype=torch.int64)
    pipeline = Namespace(
        gpt=GPT(small_config()),
        make_generator=lambda *_: lambda cond, uniforms: codes,
        decode=lambda codes: torch.zeros(2, 3, 8, 8),
    )
    file = Namespace(images_of=lambda c: range(2 * c, 2 * c + 2), write=lambda *_: None)
    args = Namespace(per_proc_batch_size=2, quantize="none", global_seed=0, image_size_eval=8)
    args.class_protocol = "balanced"
    with fake_cuda():
        world = World(3, 4, device)
        sample_c2i_ddp.make_chunks(args, world, pipeline, Way("bf16", "eager"), file, [0, 1, 2])
    assert Stream.devices == [3, 3, 3] and len(pinned) == 6


def test_samples_of_another_gpu_do_not_mix_in(monkeypatch):
    """Chunks of an A100 and an H100 went into one file, whose bytes are said to be a function."""
    names = ("gpt", "vq", "gpt_name", "vq_name", "classes", "ways", "note")
    pipeline = Pipeline(
        **dict.fromkeys(names),
        options=SamplingOptions(),
        world=World(0, 1, CUDA),
        hashes={"gpt_ckpt": "a"},
    )
    args = Namespace(quantize="none", gpt_ema=False, image_size_eval=8, per_proc_batch_size=2)
    vars(args).update(num_fid_samples=4, global_seed=0, class_protocol="random")
    fingerprints = []
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        fingerprints.append(pipeline.fingerprint(args, Way("bf16", "compiled")))
    assert fingerprints[0] == fingerprints[2] != fingerprints[1]


def test_loss_is_made_in_few_chunks():
    """32 images of 576 tokens at 16384 codes: each chunk adds to a gradient as large as itself."""
    with fake_cuda(), Operations() as operations:
        hidden = torch.zeros(32, 576, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.zeros(16384, 64, device=CUDA, requires_grad=True)
        targets = torch.zeros(32, 576, device=CUDA, dtype=torch.int64)
        linear_cross_entropy(hidden, weight, targets)
    sums = [seen for name, seen, _ in operations.all if name == "logsumexp"]
    assert len(sums) == 3
    assert max(math.prod(seen[0][0]) for seen in sums) <= 1 << 27


@pytest.fixture
def two_ranks() -> Iterator[World]:
    """Rank 0 of two whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield World(0, 2, torch.device("cpu"))
    dist.destroy_process_group()


def sharded_gpt(world: World, mode: str, precision: str = "none", layers: int = 3) -> GPT:
    model = GPT(small_config(n_layer=layers)).train()
    model.init_weights()
    return shard(world, model, model.layers, mode, precision)


class Collectives(TorchDispatchMode):
    """Lists collective operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode, gathers", [("fsdp", 7), ("sdp", 4)])
def test_weights_outside_the_blocks_are_gathered_once(two_ranks, mode, gathers):
    """Three blocks twice, or once; the rest was gathered again at the start of backward."""
    model = sharded_gpt(two_ranks, mode)
    for _ in range(2):
        with Collectives() as collectives:
            model(*random_codes(model.config))[0].backward()
        assert len([name for name in collectives.names if "allgather" in name]) == gathers


def test_sharded_norms_are_as_under_autocast(two_ranks):
    """They were gathered in bfloat16, and so rounded; matrices still are, names are as before."""
    model = sharded_gpt(two_ranks, "fsdp", "bf16", layers=2)
    assert set(model.state_dict()) == set(GPT(small_config()).state_dict())
    assert all(isinstance(p, DTensor) for p in model.parameters())
    seen = {}

    def look(name: str, module: nn.Module, *_: Any) -> None:
        seen[name] = module.weight.dtype, type(module.weight)

    for name, module in model.named_modules():
        if hasattr(module, "weight"):
            module.register_forward_pre_hook(partial(look, name))
    with autocast(torch.device("cpu"), "bf16"):
        loss, _ = model(*random_codes(model.config))
    loss.backward()
    types = {name: dtype for name, (dtype, _) in seen.items()}
    assert types["layers.1.attention_norm"] == types["layers.0.ffn_norm"] == torch.float32
    assert types["layers.1.attention.wqkv"] == torch.bfloat16
    assert all(kind is not DTensor for _, kind in seen.values())
    assert all(isinstance(p.grad, DTensor) for p in model.parameters())


def test_extraction_does_not_wait_for_each_batch():
    """Several images per batch, whose codes stay on the device until their shard is whole."""
    assert extract_codes_c2i.default_batch(CUDA) // 10 > 1
    with torch.device("meta"):
        vq = VQModel(make_vq_config("VQ-4", codebook_size=64)).eval()
    args = Namespace(ten_crop=True, no_flip=False, image_size=8, precision="none", batch_size=80)
    with fake_cuda(), Operations() as operations:
        place(vq)
        pixels = torch.zeros(8, 9, 9, 3, dtype=torch.uint8, device=CUDA)
        codes = extract_codes_c2i.encode_crops(vq, vq.quantize.codebook(), pixels, args)
        assert codes.device == CUDA and codes.shape == (8, 10, 4)
    assert not operations.waits


@pytest.fixture
def tf32_flags() -> Iterator[None]:
    """Let a test change what CUDA may round."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


@pytest.mark.parametrize("precision, allowed", [("none", False), ("bf16", True)])
def test_samples_in_float32_are_decoded_in_float32(tf32_flags, monkeypatch, precision, allowed):
    """torch rounds factors of convolutions to TF32 unless told not to: so was --precision none."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not allowed)
    names = ("vq", "gpt_name", "vq_name", "classes", "ways", "note", "hashes")
    world = World(0, 1, torch.device("cpu"))
    gpt = GPT(small_config()).eval()
    pipeline = Pipeline(**dict.fromkeys(names), gpt=gpt, options=SamplingOptions(), world=world)
    pipeline.make_generator(Way(precision, "eager"), 2, "none")
    assert torch.backends.cudnn.allow_tf32 is allowed


@pytest.mark.parametrize("script", [train_vq, reconstruct_vq, extract_codes_c2i])
def test_scripts_with_convolutions_say_whether_tf32_is_allowed(script):
    """Training of the tokenizer and its reconstructions in float32 were in TF32."""
    assert "allow_tf32" in inspect.unwrap(script.main).__code__.co_names


TRAINED = dict(image_size=64, downsample_size=16, gpt_model="GPT-T", vocab_size=19, num_classes=3)
TRAINED |= dict(ar_token_num=4, spe_token_num=3, gpt_ckpt=None, code_path="codes")
NO_RATES = ("class_dropout_prob", "token_dropout_p", "attn_dropout_p", "dropout_p")


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_no_rank_holds_a_whole_model_in_host_memory(two_ranks, mode):
    """For a GPU: each rank made the whole model on the host, eight times 12 GB for GPT-3B."""
    args = Namespace(**TRAINED, **dict.fromkeys(NO_RATES, 0.0), drop_path_rate=0.0)
    torch.manual_seed(0)
    model, weights, _ = train_c2i.make_model(args, None, CUDA)
    assert all(parameter.is_meta for parameter in model.parameters())
    if mode == "fsdp":
        shard(two_ranks, model, model.layers, mode, "none")
    fill(model, weights, two_ranks.device)

    reference = GPT(model.config)
    torch.manual_seed(0)
    expected = train_c2i.initial_weights(reference, {})
    for (name, whole), parameter in zip(expected, model.parameters(), strict=True):
        part = local(parameter)
        assert parameter.requires_grad and torch.equal(part, whole[: len(part)]), name
        assert len(part) == (len(whole) if mode == "ddp" else -(-len(whole) // 2)), name
    loss, _ = model(*random_codes(model.config))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_initial_weights_are_those_of_init_weights():
    model = GPT(small_config())
    torch.manual_seed(0)
    model.init_weights()
    torch.manual_seed(0)
    weights = dict(train_c2i.initial_weights(model, {"norm.weight": torch.full((32,), 7.0)}))
    assert weights.pop("norm.weight")[0] == 7
    state = {k: v for k, v in model.state_dict().items() if k != "norm.weight"}
    assert same_tensors(weights, state)


class Convolutions(TorchDispatchMode):
    """Lists whether input and weight of each convolution are NCHW in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.contiguous: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "conv" in func._schema.name:
            self.contiguous.append(all(x.is_contiguous() for x in args[:2]))
        return func(*args, **(kwargs or {}))


def test_convolutions_of_the_tokenizer_lie_as_group_norm_does(monkeypatch):
    """On CUDA it is NCHW whatever it gets: channels-last weights had two copies a convolution."""
    with torch.device("meta"):
        vq = VQModel(make_vq_config("VQ-4", codebook_size=64)).eval()
    moves = []
    monkeypatch.setattr(VQModel, "to", lambda self, *a, **k: moves.append(k) or self)
    place_tokenizer(vq, CUDA)
    place_tokenizer(vq, torch.device("cpu"))
    formats = [move["memory_format"] for move in moves]
    assert formats == [torch.contiguous_format, torch.channels_last]
    with fake_cuda(), Convolutions() as convolutions, torch.no_grad():
        place(vq)
        pixels = torch.zeros(2, 8, 8, 3, dtype=torch.uint8, device=CUDA)
        vq.decode_code(vq.encode(to_model_range(pixels, CUDA)))
    # but for the 1x1 convolution after attention, whose channels come last
    attentions = sum(isinstance(module, AttnBlock) for module in vq.modules())
    assert len(convolutions.contiguous) > 20
    assert convolutions.contiguous.count(False) == attentions
