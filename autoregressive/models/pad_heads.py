"""Heads widened by zeros, for attention kernels that take only some numbers of channels."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import nn

from autoregressive.models.gpt import GPT


def pad_heads(model: GPT, multiple: int) -> GPT:
    """Widen the heads of ``model`` in place to a multiple of ``multiple`` channels (even).

    Exact but for the order of sums: queries and keys gain channels of zeros (rows of zeros in
    wqkv), which add nothing to their products; so do values, whose channels meet columns of zeros
    in wo. The scale of the products stays that of the true width. ``state_dict()`` still returns
    the weights without the zeros, so that what is saved does not depend on where it was made.
    """
    channels = model.config.head_dim
    more = -channels % multiple
    if more == 0 or model.layers[0].attention.head_dim != channels:
        return model
    for block in model.layers:
        attention = block.attention
        attention.head_dim = channels + more
        wqkv = attention.wqkv.weight.detach().unflatten(0, (-1, channels))  # (H + 2 Hkv, hd, D)
        wo = attention.wo.weight.detach().unflatten(1, (-1, channels))  # (D, H, hd)
        _set_weight(attention.wqkv, F.pad(wqkv, (0, 0, 0, more)).flatten(0, 1))  # (.., D)
        _set_weight(attention.wo, F.pad(wo, (0, more)).flatten(1))  # (D, H hd)
    model.freqs_cis = F.pad(model.freqs_cis, (0, 0, 0, more // 2))  # (T, hd/2, 2)
    model.register_state_dict_post_hook(partial(_cut_heads, channels, channels + more))
    return model


def _set_weight(linear: nn.Linear, weight: Any) -> None:
    linear.weight = nn.Parameter(weight, linear.weight.requires_grad)
    linear.out_features, linear.in_features = weight.shape


def _cut_heads(
    channels: int, padded: int, _: nn.Module, state: dict, prefix: str, *__: Any
) -> None:
    """Take the zeros of ``pad_heads`` out of a state dict."""
    for name, weight in state.items():
        if not name.startswith(f"{prefix}layers."):
            continue
        if name.endswith(".attention.wqkv.weight"):
            heads = weight.unflatten(0, (-1, padded))[:, :channels]  # (H + 2 Hkv, hd, D)
            state[name] = heads.flatten(0, 1)  # ((H + 2 Hkv) hd, D)
        elif name.endswith(".attention.wo.weight"):
            state[name] = weight.unflatten(1, (-1, padded))[:, :, :channels].flatten(1)  # (D, D)
