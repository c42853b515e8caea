"""One step of decoding, the same for a GPT and for its faster decoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def guide(hidden: Tensor, cfg_scale: float | Tensor | None) -> Tensor:
    """Guide hidden states (B, t, D), a conditional and an unconditional half -> (B / 2, t, D).

    uncond + cfg_scale (cond - uncond), computed in at least float32. The output layer is linear, so
    this guides the logits at half its work. Without ``cfg_scale`` returns ``hidden``.
    """
    if cfg_scale is None:
        return hidden
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))  # (B, t, D)
    conditional, unconditional = wide.chunk(2)  # (B / 2, t, D) each
    return torch.lerp(unconditional, conditional, cfg_scale).to(hidden.dtype)  # (B / 2, t, D)


class StepDecoder:
    """One decoding step by ``embed_slots``, ``trunk`` and ``head`` of a GPT or a faster decoder."""

    embed_slots: Callable[[Tensor, Tensor, int, int], Tensor]
    trunk: Callable[..., Tensor]  # a GPT's takes a mask too
    head: Callable[[Tensor], Tensor]

    def decode_step(
        self,
        tokens: Tensor,
        cond: Tensor,
        start: int,
        stop: int,
        cache: Any,
        cfg_scale: float | None = None,
    ) -> Tensor:
        """Return logits (B, stop - start, V) of slots [start, stop), at least float32.

        tokens: (B, T) region-ordered codes, read only where already decoded; cond: (B,). Steps must
        come in the schedule's order with one cache of ``new_cache``. Every cached key is visible,
        so there is no mask. With ``cfg_scale`` the rows are a conditional half and an unconditional
        one, and logits are those of ``guide``, (B / 2, ...).
        """
        x = self.embed_slots(tokens, cond, start, stop)  # (B, t, D)
        hidden = self.trunk(x, start, cache=cache)  # (B, t, D)
        return self.head(guide(hidden, cfg_scale))  # (B or B / 2, t, V)
