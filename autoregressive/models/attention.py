"""Attention of the GPT: the key-value cache, the kinds of mask, and the ways to compute it."""

from __future__ import annotations

import copy
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as sdpa

from autoregressive.models.causal_attention import CausalMask, attend_causal


class KVCache:
    """Keys and values of all layers, rows and slots, allocated once and filled in place."""

    def __init__(
        self,
        layers: int,
        rows: int,
        kv_heads: int,
        slots: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        shape = (layers, 2, rows, kv_heads, slots, head_dim)
        self.store = torch.zeros(shape, device=device, dtype=dtype)  # (L, 2, B, Hkv, T, hd)

    def first_rows(self, batch: int) -> KVCache:
        """A cache of the first ``batch`` rows that shares this one's memory."""
        view = copy.copy(self)
        view.store = self.store[:, :, :batch]  # (L, 2, batch, Hkv, T, hd)
        return view

    def slots(self, layer: int, start: int, stop: int) -> Tensor:
        """Return a view of the keys and values of slots [start, stop): (2, B, Hkv, t, hd)."""
        return self.store[layer, :, :, :, start:stop]

    def update(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, Hkv, t, hd) from slot ``start``; return views of all filled slots."""
        stop = start + k.shape[2]
        keys, values = self.store[layer]  # (B, Hkv, T, hd) each
        keys[:, :, start:stop] = k  # (B, Hkv, t, hd)
        values[:, :, start:stop] = v  # (B, Hkv, t, hd)
        return keys[:, :, :stop], values[:, :, :stop]  # (B, Hkv, stop, hd)


class DenseMask(NamedTuple):
    """The mask, whole and in query chunks: [start, stop) attend only to the first ``seen`` keys."""

    visible: Tensor  # (T, T) bool: query (row) attends to key (column)
    chunks: tuple[tuple[int, int, int], ...]  # start, stop, seen


def query_chunks(visible: Tensor, size: int = 192) -> tuple[tuple[int, int, int], ...]:
    """``DenseMask.chunks`` of a mask (T, T), of about ``size`` queries each.

    192: three chunks of a 24x24 grid, whose keys are a third fewer; more chunks gain less than
    their calls cost.
    """
    slots = len(visible)
    count = max(1, round(slots / size))
    edges = [i * slots // count for i in range(count + 1)]
    chunks = []
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        seen = visible[start:stop].any(0).nonzero().max().item() + 1
        chunks.append((start, stop, seen))
    return tuple(chunks)


Mask: TypeAlias = DenseMask | BlockMask | CausalMask | None  # None: all keys are visible


def channel_multiple(device: torch.device, dtype: torch.dtype) -> int:
    """Return the number that the channels of a head should be a multiple of.

    8 in 16 bits on CUDA: with other widths torch copies q, k and v, which is the whole cache in
    each step, or with a mask computes all scores in float32. Elsewhere 1.
    """
    return 8 if device.type == "cuda" and dtype.itemsize == 2 else 1


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout_p: float, scale: float) -> Tensor:
    """softmax(scale q k^T) v over visible keys: q (B, H, Tq, hd), k and v (B, Hkv, Tk, hd)."""
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, BlockMask):  # pads in its kernel
        return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)
    if isinstance(mask, DenseMask) and q.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            return attend_on_cpu(q, k, v, mask, dropout_p, scale, grouped)  # (B, H, Tq, hd)
    visible = mask.visible if isinstance(mask, DenseMask) else mask
    return attend_fused(q, k, v, visible, dropout_p, scale, grouped)  # (B, H, Tq, hd)


def attend_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | CausalMask | None,
    dropout_p: float,
    scale: float,
    grouped: bool,
) -> Tensor:
    """Compute ``attend`` by torch's fused kernels, with channels of zeros where they need some."""
    channels = q.shape[-1]
    if more := -channels % channel_multiple(q.device, q.dtype):
        q, k, v = (F.pad(x, (0, more)) for x in (q, k, v))  # zeros, which change nothing
    if isinstance(visible, CausalMask):
        y = attend_causal(q, k, v, visible, dropout_p, scale)  # (B, H, Tq, hd or more)
    else:
        y = sdpa(q, k, v, visible, dropout_p, scale=scale, enable_gqa=grouped)  # likewise
    return y[..., :channels] if more else y  # (B, H, Tq, hd)


def attend_on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: DenseMask,
    dropout_p: float,
    scale: float,
    grouped: bool,
) -> Tensor:
    """Compute ``attend`` for CPU training; the fused kernel reads masked keys, slowly in 16 bits.

    Measured on AMX, forward and backward, 4 images of 576 slots: float32 63 ms in three chunks, 75
    ms whole; bfloat16 37 ms by matrix products, 72 ms by the fused kernel.
    """
    if q.dtype == torch.bfloat16:
        if grouped:
            repeats = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))  # (B, H, Tk, hd)
        bias = torch.zeros_like(mask.visible, dtype=q.dtype)  # (Tq, Tk)
        bias = bias.masked_fill(~mask.visible, -torch.inf)  # (Tq, Tk)
        scaled = q.flatten(0, 1) * scale  # (B H, Tq, hd)
        scores = torch.baddbmm(bias, scaled, k.flatten(0, 1).mT)  # (B H, Tq, Tk)
        weights = F.dropout(scores.softmax(-1), dropout_p)  # (B H, Tq, Tk)
        return (weights @ v.flatten(0, 1)).view(q.shape)  # (B, H, Tq, hd)
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))  # of float16
    parts = []
    for start, stop, seen in mask.chunks:
        part, keys, values = q[:, :, start:stop], k[:, :, :seen], v[:, :, :seen]
        visible = mask.visible[start:stop, :seen]
        parts.append(sdpa(part, keys, values, visible, dropout_p, scale=scale, enable_gqa=grouped))
    return torch.cat(parts, dim=2)  # (B, H, Tq, hd)
