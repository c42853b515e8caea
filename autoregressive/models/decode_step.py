"""One step of decoding, the same for a GPT and for its faster decoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autoregressive.models.region_order import RegionOrder


def guide(hidden: Tensor, cfg_scale: float | Tensor | None) -> Tensor:
    """Guide hidden states (B, t, D), a conditional and an unconditional half -> (B / 2, t, D).

    uncond + cfg_scale (cond - uncond), computed in at least float32; one scale or (t, 1). The
    output layer is linear, so this guides the logits at half its work. Without ``cfg_scale``
    returns ``hidden``.
    """
    if cfg_scale is None:
        return hidden
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))  # (B, t, D)
    conditional, unconditional = wide.chunk(2)  # (B / 2, t, D) each
    if isinstance(cfg_scale, Tensor):
        cfg_scale = cfg_scale.to(wide.dtype)  # () or (t, 1)
    return torch.lerp(unconditional, conditional, cfg_scale).to(hidden.dtype)  # (B / 2, t, D)


class StepDecoder:
    """One decoding step by ``embed_slots``, ``trunk`` and ``head`` of a GPT or a faster decoder."""

    order: RegionOrder
    embed_slots: Callable[[Tensor, Tensor, int, int], Tensor]
    trunk: Callable[..., Tensor]  # a GPT's takes a mask too
    head: Callable[[Tensor], Tensor]

    def decode_step(
        self,
        tokens: Tensor,
        cond: Tensor,
        first: int,
        last: int,
        cache: Any,
        cfg_scale: float | Tensor | None = None,
    ) -> Tensor:
        """Return logits (B, t, V) of the tokens that steps [first, last) predict.

        tokens: (B, T) region-ordered codes, of which those before step ``last - 1`` are read;
        cond: (B,). Steps must come in order with one cache of ``new_cache``; those that come again
        overwrite their keys and values. Within one step every cached key is visible, so there is
        no mask. With ``cfg_scale``, a number or (t, 1), the rows are a conditional half and an
        unconditional one, and logits are those of ``guide``, (B / 2, ...). At least float32.
        """
        steps = self.order.steps
        start, stop = steps[first].start, steps[last - 1].stop
        x = self.embed_slots(tokens, cond, start, stop)  # (B, slots, D)
        hidden = self.trunk(x, start, cache=cache)  # (B, slots, D)
        if (predicting := self.order.predicting_among(first, last)) is not None:
            hidden = hidden[:, predicting]  # (B, t, D)
        return self.head(guide(hidden, cfg_scale))  # (B or B / 2, t, V)
