"""Dropout of elements, quick on the CPU, and of whole residual branches."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """nn.Dropout; on the CPU by 16-bit numbers, as torch's generator takes 10% of a step there."""

    def forward(self, x: Tensor) -> Tensor:
        """Zero elements with probability p (to 1/65536 on the CPU), divide others by 1 - p."""
        dropped = round(self.p * 65536)
        if x.device.type != "cpu" or not self.training or not 0 < dropped < 65536:
            return super().forward(x)
        # each 64-bit draw makes four elements
        limits = torch.iinfo(torch.int64)
        words = torch.randint(limits.min, limits.max, (-(-x.numel() // 4),))
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)  # uniform in [-32768, 32768)
        return torch.where(bits >= dropped - 32768, x * (1.0 / (1.0 - self.p)), 0.0)


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): zero a row's branch with probability ``rate``.

    Branches that stay grow by 1 / (1 - rate). ``enabled``: whether any block has a rate above 0;
    compiled blocks then share one compilation, as they read their rate from a buffer.
    """

    def __init__(self, rate: float, enabled: bool):
        super().__init__()
        self.rate, self.enabled = rate, enabled
        # on the CPU also where parameters are on the meta device, so that it is never lost
        self.register_buffer("kept", torch.tensor(1.0 - rate, device="cpu"), persistent=False)  # ()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ...) -> (B, ...)."""
        if not self.training or not self.enabled:
            return x
        shape = (len(x), *(1,) * (x.ndim - 1))
        if torch.compiler.is_compiling():
            rows = torch.rand(shape, device=x.device) < self.kept  # (B, 1, ...)
            return x * (rows / self.kept).to(x.dtype)  # (B, ...)
        if self.rate == 0:
            return x
        kept = 1.0 - self.rate
        rows = x.new_empty(shape).bernoulli_(kept)  # (B, 1, ...)
        return x * rows.div_(kept)  # (B, ...)
