"""Attention of the region order, with dropout, through the kernel of flash attention.

That kernel is the fast one that takes a dropout of any rate, but it has no mask except the causal
one. The region order's is causal but for pairs of slots of one step: a query also sees the few keys
of its step that come after it. So the kernel computes all but these pairs, and plain operators,
which torch.compile fuses, add them.

Dropout acts on each weight of the softmax by itself, so parts of the keys can be added when each
has the same normalisation: with l the logarithm of the sum of all exponentials, of both parts,

    out = exp(l_causal - l) out_causal + sum_e exp(s_e - l) drop_e v_e

In backward the kernel takes the whole ``out`` and ``l`` in place of its own, as each part of ring
attention does (torch/distributed/tensor/experimental/_context_parallel/_attention.py): weights are
exp(s - l), and the product of ``out`` with its gradient is that of all keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import scaled_dot_product_attention as sdpa

# (output (B, H, T, hd), log of sums (B, H, T) float32, *what backward needs)
forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention.default
backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_backward.default


class CausalMask(NamedTuple):
    """A causal mask, and the keys that a query sees beyond its own."""

    more: Tensor  # (T, E) bool: query q also sees key q + 1 + e

    def to(self, device: torch.device) -> CausalMask:
        """Return the mask on ``device``."""
        return CausalMask(self.more.to(device))


def make_causal_mask(visible: Tensor) -> CausalMask:
    """Return the parts of a mask (T, T) bool, which must be causal but for keys soon after."""
    slots = torch.arange(len(visible), device=visible.device)
    later = visible & (slots > slots[:, None])  # (T, T)
    count = int((later * (slots - slots[:, None])).max())
    keys = slots[:, None] + 1 + torch.arange(count, device=visible.device)  # (T, E)
    inside = keys < len(slots)  # (T, E)
    more = visible.gather(1, keys.clamp(max=len(slots) - 1)) & inside  # (T, E)
    assert (visible | (slots > slots[:, None])).all(), "the mask hides keys of earlier steps"
    return CausalMask(more)


def attend_causal(
    q: Tensor, k: Tensor, v: Tensor, mask: CausalMask, dropout_p: float, scale: float
) -> Tensor:
    """softmax(scale q k^T) v with dropout over the keys of ``mask``: all (B, H, T, hd)."""
    if mask.more.shape[1] == 0:
        return sdpa(q, k, v, None, dropout_p, is_causal=True, scale=scale)  # (B, H, T, hd)
    return _CausalAttention.apply(q, k, v, mask.more, dropout_p, scale)  # (B, H, T, hd)


def later_slots(x: Tensor, count: int) -> Tensor:
    """Return a view of the ``count`` slots after each one, zeros past the end: (B, H, T, hd, E)."""
    return F.pad(x, (0, 0, 0, count))[:, :, 1:].unfold(2, count, 1)  # (B, H, T, hd, E)


def to_later_slots(weights: Tensor, x: Tensor) -> Tensor:
    """Return the sums over e of weights (B, H, T, E) x (B, H, T, hd), each at slot t + 1 + e."""
    slots, total = x.shape[2], torch.zeros_like(x)  # (B, H, T, hd)
    for e in range(min(weights.shape[-1], slots - 1)):
        kept = slots - 1 - e
        part = weights[:, :, :kept, e, None] * x[:, :, :kept]  # (B, H, T - 1 - e, hd)
        total = total + F.pad(part, (0, 0, e + 1, 0))  # (B, H, T, hd)
    return total


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        more: Tensor,
        dropout_p: float,
        scale: float,
    ) -> Tensor:
        results = forward_kernel(q, k, v, dropout_p, True, False, scale=scale)
        causal, log_causal, cum_q, cum_k, max_q, max_k, seed, offset, _ = results
        count, wide = more.shape[1], log_causal.dtype
        scores = (q.to(wide)[..., None] * later_slots(k, count)).sum(3) * scale  # (B, H, T, E)
        scores = scores.masked_fill(~more, -torch.inf)  # (B, H, T, E)
        log_sum = torch.logaddexp(log_causal, scores.logsumexp(-1))  # (B, H, T)
        kept = torch.rand(scores.shape, device=q.device) >= dropout_p  # (B, H, T, E)
        weights = (scores - log_sum[..., None]).exp() * kept / (1.0 - dropout_p)  # (B, H, T, E)
        added = (weights[..., None, :] * later_slots(v, count)).sum(-1)  # (B, H, T, hd)
        share = (log_causal - log_sum).exp()[..., None]  # (B, H, T, 1)
        out = (share * causal + added).to(q.dtype)  # (B, H, T, hd)
        ctx.save_for_backward(q, k, v, out, log_sum, kept, more, cum_q, cum_k, seed, offset)
        ctx.sizes, ctx.dropout_p, ctx.scale = (max_q, max_k), dropout_p, scale
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum, kept, more, cum_q, cum_k, seed, offset = ctx.saved_tensors
        shape = (cum_q, cum_k, *ctx.sizes, ctx.dropout_p, True, seed, offset)
        grads = backward_kernel(d_out, q, k, v, out, log_sum, *shape, scale=ctx.scale)
        count, wide = more.shape[1], log_sum.dtype
        wide_q, wide_d = q.to(wide), d_out.to(wide)  # (B, H, T, hd)
        keys, values = later_slots(k, count), later_slots(v, count)  # (B, H, T, hd, E)
        scores = (wide_q[..., None] * keys).sum(3) * ctx.scale  # (B, H, T, E)
        weights = (scores - log_sum[..., None]).exp() * more  # (B, H, T, E)
        drop = kept.to(wide) / (1.0 - ctx.dropout_p)  # (B, H, T, E)
        d_weights = (wide_d[..., None] * values).sum(3) * drop  # (B, H, T, E)
        mean = (wide_d * out).sum(-1, keepdim=True)  # (B, H, T, 1)
        d_scores = weights * (d_weights - mean) * ctx.scale  # (B, H, T, E)
        d_q = grads[0] + (d_scores[..., None, :] * keys).sum(-1)  # (B, H, T, hd)
        d_k = grads[1] + to_later_slots(d_scores, wide_q)  # (B, H, T, hd)
        d_v = grads[2] + to_later_slots(weights * drop, wide_d)  # (B, H, T, hd)
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None, None, None
