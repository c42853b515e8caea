"""Attention with dropout by a causal kernel and the pairs of one step; the kernel is emulated."""

from argparse import Namespace
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from autoregressive.models import causal_attention
from autoregressive.models.attention import attend
from autoregressive.models.causal_attention import CausalMask, make_causal_mask
from autoregressive.models.config import GPT_models, GPTConfig
from autoregressive.models.gpt import GPT
from autoregressive.models.region_order import RegionOrder
from autoregressive.train import kernels, watch
from scripts.diagnosis import golden
from scripts.diagnosis.check import BROKEN, OK, Check, Context, run_here
from tests.helpers import GOLDEN, ROOT, random_codes, small_config
from utils.distributed import World

SCALE = 0.3


def forward(q, k, v, dropout_p, is_causal, return_debug_mask, *, scale):
    """aten::_scaled_dot_product_flash_attention; what it dropped is in place of the seed."""
    assert is_causal and not return_debug_mask
    scores = causal_scores(q, k, scale)  # (B, H, T, T)
    kept = torch.rand(scores.shape) >= dropout_p  # (B, H, T, T)
    out = (scores.softmax(-1) * kept.to(v.dtype) / (1 - dropout_p)) @ v  # (B, H, T, hd)
    return out, scores.logsumexp(-1), None, None, q.shape[2], k.shape[2], kept, kept[:0], kept[:0]


def backward(
    d_out,
    q,
    k,
    v,
    out,
    log_sum,
    cum_q,
    cum_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    kept,
    _,
    *,
    scale,
):
    """Its backward, as the kernel computes it: weights from the logarithm of sums that it gets."""
    assert cum_q is cum_k is None and max_q == max_k == q.shape[2] and is_causal
    weights = (causal_scores(q, k, scale) - log_sum[..., None]).exp()  # (B, H, T, T)
    drop = kept.to(v.dtype) / (1 - dropout_p)  # (B, H, T, T)
    d_weights = d_out @ v.mT * drop  # (B, H, T, T)
    d_scores = weights * (d_weights - (d_out * out).sum(-1, keepdim=True)) * scale
    return d_scores @ k, d_scores.mT @ q, (weights * drop).mT @ d_out


def causal_scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)  # (T, T)
    return (q @ k.mT * scale).masked_fill(later, -torch.inf)  # (B, H, T, T)


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(causal_attention, "forward_kernel", forward)
    monkeypatch.setattr(causal_attention, "backward_kernel", backward)


def plain(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, drop: Tensor) -> Tensor:
    scores = (q @ k.mT * SCALE).masked_fill(~visible, -torch.inf)  # (B, H, T, T)
    return (scores.softmax(-1) * drop) @ v  # (B, H, T, hd)


@pytest.mark.parametrize("n", [2, 4, 9, 16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_output_and_gradients_are_those_of_the_mask(emulated, n, dropout_p):
    """In float64, with the same weights dropped: to the last digits."""
    order = RegionOrder.build(12, n)
    slots, visible = order.num_tokens, order.mask()  # (T, T)
    mask = make_causal_mask(visible)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 2, 3, slots, 6, generator=generator, dtype=torch.float64)
    results = []
    for ours in (True, False):
        q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
        torch.manual_seed(1)
        if ours:
            y = attend(q, k, v, mask, dropout_p, SCALE)
        else:
            kept = torch.rand(2, 3, slots, slots) >= dropout_p
            later = torch.rand(2, 3, slots, mask.more.shape[1]) >= dropout_p
            for query in range(slots):
                for e, key in enumerate(range(query + 1, slots)):
                    kept[:, :, query, key] = later[:, :, query, e] if visible[query, key] else False
            y = plain(q, k, v, visible, kept.double() / (1 - dropout_p))
        (y * inputs[3]).sum().backward()
        results.append([y.detach(), q.grad, k.grad, v.grad])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("n", [1, 4, 16])
def test_parts_of_the_mask(n):
    """Causal, and of its step's later slots as many as there are."""
    visible = RegionOrder.build(24, n).mask()
    more = make_causal_mask(visible).more
    assert more.shape == (576, n - 1)
    rebuilt = torch.ones_like(visible).tril()
    for query, e in more.nonzero().tolist():
        rebuilt[query, query + 1 + e] = True
    assert torch.equal(rebuilt, visible)
    with pytest.raises(AssertionError):
        make_causal_mask(visible & (torch.rand(576, 576) > 0.1))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_model_trains_alike(emulated, recompute):
    """Loss and gradients of the dense mask, without dropout; also with activations recomputed."""
    rates = ("class_dropout_prob", "token_dropout_p", "attn_dropout_p", "resid_dropout_p")
    config = small_config(**dict.fromkeys((*rates, "ffn_dropout_p"), 0.0))
    torch.manual_seed(0)
    model = GPT(config).double().train()
    model.init_weights()
    torch.nn.init.normal_(model.output.weight)
    model.recompute_activations(recompute)
    batch, found = random_codes(config), []
    for mask in (None, make_causal_mask(model.mask)):
        model.block_mask = mask
        model.zero_grad()
        loss, _ = model(*batch)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert isinstance(model.block_mask, CausalMask)
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-8)


def arguments(**changes: object) -> Namespace:
    given = dict(attention="auto", compile=None, attn_dropout_p=0.1, mixed_precision="bf16")
    return Namespace(**given | changes)


CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
CHOICES = [
    (CPU, {}, "dense", None),
    (CUDA, {}, "flash", "--attn-dropout-p 0"),
    (CUDA, {"attn_dropout_p": 0.0}, "flex", None),
    (CUDA, {"attn_dropout_p": 0.0, "attention": "dense"}, "dense", "--attention flex: a step"),
    (CUDA, {"attention": "dense"}, "dense", "--attention flash: a step about 1.2"),
    (CUDA, {"attention": "flash"}, "flash", "FlexAttention: a step about 1.0"),
    (CUDA, {"compile": False}, "dense", None),
    (CUDA, {"mixed_precision": "none"}, "dense", "not of --mixed-precision none. --attn"),
]


@pytest.mark.parametrize("device, changes, kind, note", CHOICES, ids=str)
def test_the_paper_is_followed_on_every_device(monkeypatch, device, changes, kind, note):
    """The attention dropout that is asked for stays; the log says what would be faster."""
    monkeypatch.setattr(kernels, "flash_error", lambda *_: 0.001)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    with torch.device("meta"):
        model = GPT(GPTConfig(**GPT_models["GPT-XL"]))
    found, text = kernels.choose_attention(arguments(**changes), model, device)
    assert found == kind
    assert text is None if note is None else note in text


def test_a_kernel_that_fails_or_is_wrong_is_not_used(emulated, monkeypatch):
    """It is tried before training: then the mask is used, and the log says why."""
    model = GPT(small_config(grid_height=8, grid_width=8, n_layer=1))
    reason = partial(kernels.unavailable_reason, model, "bf16", CPU)
    assert reason() is None
    monkeypatch.setattr(
        causal_attention, "backward_kernel", lambda *a, **k: backward(*a[::-1], **k)
    )
    assert "flash attention failed" in reason()
    wrong = lambda *a, **k: tuple(2 * x for x in backward(*a, **k))  # noqa: E731
    monkeypatch.setattr(causal_attention, "backward_kernel", wrong)
    assert "is off by" in reason()
    monkeypatch.setattr(causal_attention, "backward_kernel", backward)
    undivided = lambda q, k, v, p, *a, **o: forward(q, k, v * (1 - p), p, *a, **o)  # noqa: E731
    monkeypatch.setattr(causal_attention, "forward_kernel", undivided)
    assert "is off by" in reason()


def test_torchs_kernel_takes_these_arguments():
    """The operators themselves, without values: shapes, types, and what backward hands over."""
    mask = make_causal_mask(RegionOrder.build(4, 4).mask())
    q, k, v = torch.zeros(3, 2, 3, 16, 8, dtype=torch.bfloat16, device="meta").requires_grad_()
    y = attend(q, k, v, CausalMask(mask.more.to("meta")), 0.1, SCALE)
    grads = torch.autograd.grad(y.sum(), (q, k, v))
    for x in (y, *grads):
        assert x.shape == q.shape and x.dtype == q.dtype


def test_causal_groups_need_no_pairs():
    order = RegionOrder.build(6, 4, group_attention="causal")
    assert make_causal_mask(order.mask()).more.shape == (36, 0)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_it_compiles_to_one_graph(emulated, recompute):
    """For all blocks, forward and backward, also with activations recomputed."""
    model = GPT(small_config(n_layer=3)).train()
    model.init_weights()
    model.recompute_activations(recompute)
    model.block_mask = make_causal_mask(model.order.mask())
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.layers:
        block.compile(backend=counter)
    for _ in range(2):
        model(*random_codes(model.config))[0].backward()
    torch._dynamo.reset()
    assert counter.frame_count == 1


class HeldOut:
    num_crops = 1

    def __init__(self, codes: np.ndarray, labels: np.ndarray):
        self.codes, self.labels = codes, labels

    def __len__(self) -> int:
        return len(self.codes)

    def batch(self, images: np.ndarray, crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.codes[images], self.labels[images]


def test_validation_takes_the_mask():
    """Uncompiled, the pairs of a step would take much memory; training goes on with them."""
    model, used = GPT(small_config()).train(), []
    model.init_weights()
    model.block_mask = mask = make_causal_mask(model.order.mask())
    held_out = HeldOut(*(x.numpy() for x in random_codes(model.config, 4)))

    def forward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        used.append(model.block_mask)
        return model(x, y)

    losses = watch.validate(forward, model, held_out, 4, 2, World(0, 1, CPU), "none")
    assert used == [None, None] and model.block_mask is mask and losses["val/loss"] > 0


def test_the_doctor_finds_a_wrong_kernel(emulated, monkeypatch):
    """Loss and gradient against the published code's, where a GPU would be."""
    function = partial(golden.check_training, precision="bf16", attention="flash")
    check, context = Check("", "", function, "advice"), Context(Namespace(), GOLDEN[1], ROOT)
    assert run_here(check, context).status == OK
    wrong = lambda *a, **k: tuple(2 * x for x in backward(*a, **k))  # noqa: E731
    monkeypatch.setattr(causal_attention, "backward_kernel", wrong)
    assert run_here(check, context).status == BROKEN
