"""Class ids -> raster codes: the one decode loop, with KV cache, guidance and inverse-CDF sampling.

Image i's randomness is one uniform number per token drawn from (seed, i), so neither the batch it stands in nor
the process that makes it changes what it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from autoregressive.models.gpt import GPT, KVCache


@dataclass(frozen=True)
class SamplingOptions:
    """How logits become tokens; the defaults are the paper's sampling (temperature 1, nothing cut off)."""

    cfg_scale: float = 1.0  # guidance: uncond + cfg_scale (cond - uncond); 1 is none
    cfg_interval: int = -1  # guide only steps with at most this many tokens decoded before them; -1: all
    temperature: float = 1.0  # 0: the most likely token
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.cfg_scale, self.temperature))):
            raise ValueError(f"--cfg-scale {self.cfg_scale} and --temperature {self.temperature} must be finite")
        if self.cfg_scale < 1.0:
            raise ValueError(f"--cfg-scale {self.cfg_scale} must be at least 1 (1 is no guidance)")
        if self.cfg_interval < -1:
            raise ValueError(f"--cfg-interval {self.cfg_interval} must be a token count, or -1 for all tokens")
        if self.temperature < 0.0:
            raise ValueError(f"--temperature {self.temperature} must not be negative (0 is greedy)")
        if self.top_k < 0:
            raise ValueError(f"--top-k {self.top_k} must not be negative (0 is off)")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"--top-p {self.top_p} must be in (0, 1] (1 is off)")


def image_randomness(seed: int, indices: range, num_classes: int, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Random class ids (B,) int64 and uniforms (B, T) float32 in [0, 1) of images ``indices``; each is a function
    of (seed, index) alone."""
    streams = [np.random.Generator(np.random.Philox(key=[seed, i])) for i in indices]
    labels = np.array([s.integers(num_classes) for s in streams], dtype=np.int64)
    uniforms = np.stack([s.random(num_tokens, dtype=np.float32) for s in streams])
    return labels, uniforms


def filter_logits(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Set to -inf what top-k, then nucleus (top-p) filtering cut off; (..., V) -> (..., V).

    Top-k keeps ties with the k-th logit. Top-p keeps the smallest set of most likely tokens whose probability
    exceeds ``top_p``, at least one (Holtzman et al. 2020).
    """
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[..., -1:]  # (..., 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)  # (..., V)
    if top_p < 1.0:
        ranked, ranks = logits.sort(descending=True)  # (..., V)
        before = F.pad(ranked.softmax(-1).cumsum(-1)[..., :-1], (1, 0))  # (..., V) of all more likely tokens
        cut = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ranks, before > top_p)  # (..., V)
        logits = logits.masked_fill(cut, -torch.inf)  # (..., V)
    return logits


def sample(logits: torch.Tensor, uniforms: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
    """Draw tokens by inverse CDF: the first token whose cumulative probability exceeds u.

    logits: (B, t, V); uniforms: (B, t) in [0, 1). Returns (B, t) int64. A token of probability 0 is never drawn.
    """
    if options.temperature == 0.0:
        return logits.argmax(-1)  # (B, t)
    logits = filter_logits(logits / options.temperature, options.top_k, options.top_p)  # (B, t, V)
    cdf = logits.softmax(-1).cumsum(-1)  # (B, t, V)
    total = cdf[..., -1:]  # (B, t, 1), 1 up to rounding
    u = torch.minimum(uniforms[..., None] * total, total.nextafter(torch.zeros_like(total)))  # (B, t, 1)
    return torch.searchsorted(cdf, u, right=True).squeeze(-1)  # (B, t)


@torch.inference_mode()
def generate(model: GPT, cond: torch.Tensor, uniforms: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
    """Generate raster codes (B, T) int64 for class ids ``cond`` (B,), in ``len(model.order.schedule)`` calls.

    uniforms: (B, T), one per token in region order. The model must be in ``eval()`` mode. With guidance the batch
    is doubled, conditional rows first, for as long as it is on.
    """
    assert not model.training, "call model.eval() before generating"
    guided = options.cfg_scale > 1.0
    batch, total = len(cond), model.order.num_tokens
    rows = 2 * batch if guided else batch
    labels = torch.cat([cond, torch.full_like(cond, model.config.num_classes)])[:rows]  # (R,)
    tokens = cond.new_zeros(rows, total)  # (R, T), the unconditional half repeats the conditional one
    cache = KVCache(model.config, rows, total, cond.device, model.output.weight.dtype)
    for start, stop in model.order.schedule:
        if guided and 0 <= options.cfg_interval < start:  # guidance ends: the unconditional half rests
            guided, rows = False, batch
            tokens, labels, cache = tokens[:batch], labels[:batch], cache.first_rows(batch)
        logits = model.decode_step(tokens, labels, start, stop, cache)  # (R, t, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (R, t, V)
        if guided:
            conditional, unconditional = logits.chunk(2)  # (B, t, V)
            logits = torch.lerp(unconditional, conditional, options.cfg_scale)  # (B, t, V)
        drawn = sample(logits, uniforms[:, start:stop], options)  # (B, t)
        tokens[:, start:stop] = drawn.repeat(rows // batch, 1)  # (R, t)
    return tokens[:batch, model.inverse]  # (B, T)
