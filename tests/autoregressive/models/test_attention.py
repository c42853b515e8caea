"""Attention in parts, padded and in bfloat16 is torch's attention under the whole mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from autoregressive.models import attention
from autoregressive.models.attention import DenseMask, attend, query_chunks
from autoregressive.models.region_order import RegionOrder
from tests.fake_cuda import CUDA


@pytest.mark.parametrize("n, grid", [(1, 8), (4, 8), (16, 8), (9, 6), (4, 24)])
@pytest.mark.parametrize("size", [1, 7, 30, 192])
def test_parts_of_queries_hide_only_what_the_mask_hides(n, grid, size):
    """Each query is in one part; no key beyond ``seen`` is visible to it, the last one is."""
    order = RegionOrder.build(grid, n)
    mask = order.mask()
    parts = query_chunks(mask, size)
    assert [q for a, b, _ in parts for q in range(a, b)] == list(range(order.num_tokens))
    for start, stop, seen in parts:
        assert not mask[start:stop, seen:].any()
        assert mask[start:stop, seen - 1].any()


@pytest.mark.parametrize("n, n_kv_head", [(1, None), (4, 2), (16, None)])
def test_attention_on_the_cpu_is_torchs(n, n_kv_head):
    """Query parts in float32, products in bfloat16, against a dense masked call; gradients too."""
    order = RegionOrder.build(24, n)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, 576, 8, generator=generator) for h in (4, n_kv_head or 4, n_kv_head or 4)
    )
    weights = torch.randn(2, 4, 576, 8, generator=generator)
    mask = DenseMask(order.mask(), query_chunks(order.mask()))
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [x.to(dtype).detach().clone().requires_grad_() for x in (q, k, v)]
        y = attend(*inputs, mask, 0.0, 8**-0.5)
        assert y.dtype == dtype
        (y.float() * weights).sum().backward()
        results[dtype] = [y.detach().float(), *(x.grad.float() for x in inputs)]
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    y = F.scaled_dot_product_attention(*inputs, order.mask(), enable_gqa=True)
    (y * weights).sum().backward()
    for ours, half, expected in zip(
        *results.values(), [y.detach(), *(x.grad for x in inputs)], strict=True
    ):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
        assert (half - expected).norm() < 0.02 * expected.norm()


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
