"""What holds for CUDA, shown on a CPU with fake tensors: see fake_cuda.py.

What only a device can show is in test_gpu.py.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from autoregressive.decoding.compiled import CompiledDecoder
from autoregressive.decoding.decoder import Decoder, place_for_decoding
from autoregressive.decoding.generate import Generator
from autoregressive.decoding.sampling import SamplingOptions
from autoregressive.models.config import GPT_models, GPTConfig
from autoregressive.models.gpt import GPT
from autoregressive.train import extract_codes_c2i
from tests.fake_cuda import (
    CUDA,
    AttentionCalls,
    Call,
    Operations,
    bare_gpt,
    fake_cuda,
    place,
    place_parameters,
)
from tokenizer import reconstruct_vq, train_vq


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
    assert decoded == 2 * len(model.order.steps) and len(sdpa.calls) == decoded + 1
    assert not [name for name, *_ in operations if "pad" in name], "padded once, at load"
    # cuDNN would make a plan for each length; elsewhere it may be chosen
    assert [call.cudnn for call in sdpa.calls] == [False] * decoded + [True]
    assert sdpa.calls[-1].attn_mask is not None and sdpa.calls[-1].dropout_p == 0.1
    assert not [reason for call in sdpa.calls if (reason := slow_because(call))]
    scale = GPT_models[size]["n_head"] ** 0.5 / GPT_models[size]["dim"] ** 0.5
    assert all(call.scale == pytest.approx(scale) for call in sdpa.calls)


@pytest.mark.parametrize("script", [train_vq, reconstruct_vq, extract_codes_c2i])
def test_scripts_with_convolutions_say_whether_tf32_is_allowed(script):
    """Training of the tokenizer and its reconstructions in float32 were in TF32."""
    assert "allow_tf32" in inspect.unwrap(script.main).__code__.co_names
