"""How a tokenizer's tensors lie in memory on a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.vq_model import VQModel


def place_tokenizer(
    vq: VQModel,
    device: torch.device,
    elsewhere: torch.memory_format = torch.channels_last,
    compiled: bool = False,
) -> VQModel:
    """Move ``vq`` to ``device`` in place, in the memory format that is fast there.

    torch's GroupNorm on CUDA takes and returns NCHW only: channels-last weights would cost two
    copies per convolution. torch.compile writes its own, which keeps channels-last. ``elsewhere``:
    the format on other devices.
    """
    if device.type != "cuda":
        return vq.to(device, memory_format=elsewhere)
    if compiled:
        return vq.to(device, memory_format=torch.channels_last)
    for first in (vq.encoder, vq.post_quant_conv):  # convolutions follow their input's format too
        first.register_forward_pre_hook(_make_contiguous)
    return vq.to(device, memory_format=torch.contiguous_format)


def _make_contiguous(_: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    return inputs[0].contiguous()  # (B, C, H, W)
