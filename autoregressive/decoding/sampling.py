"""Logits -> tokens: sampling options, filters, and the draw by inverse CDF or Gumbel noise.

Pure functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from autoregressive.decoding.choices import CFG_SCHEDULES, NOISES, TEMPERATURE_SCHEDULES

WHOLE = 2.0**36  # a probability of 1 as a whole number, see ``cumulative``


@dataclass(frozen=True)
class SamplingOptions:
    """How logits become tokens; by default as in the paper (temperature 1, nothing cut off)."""

    cfg_scale: float = 1.0  # guidance: uncond + cfg_scale (cond - uncond); 1 is none
    cfg_interval: int = -1  # guide only steps after at most this many tokens; -1: all steps
    cfg_schedule: str = "constant"  # linear, power-cosine: from 1 at the first token to cfg_scale
    cfg_power: float = 2.75  # of power-cosine
    temperature: float = 1.0  # 0: the most likely token
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    temperature_schedule: str = "constant"  # linear, cosine: from temperature to temperature_end
    temperature_end: float = 1.0  # after the last token
    noise: str = "uniform"  # one number per token; gumbel: one per token and code

    def __post_init__(self) -> None:
        finite = {
            "--cfg-scale": self.cfg_scale,
            "--temperature": self.temperature,
            "--temperature-end": self.temperature_end,
        }
        for option, number in finite.items():
            if not math.isfinite(number):
                raise ValueError(f"{option} {number} must be finite")
        for option, value, choices in (
            ("--cfg-schedule", self.cfg_schedule, CFG_SCHEDULES),
            ("--temperature-schedule", self.temperature_schedule, TEMPERATURE_SCHEDULES),
            ("--noise", self.noise, NOISES),
        ):
            if value not in choices:
                raise ValueError(f"{option} {value} must be one of {', '.join(choices)}")
        if not 1.0 <= self.cfg_scale <= 1e3:
            raise ValueError(
                f"--cfg-scale {self.cfg_scale} must be in [1, 1000] (1 is no guidance)"
            )
        if self.cfg_interval < -1:
            raise ValueError(
                f"--cfg-interval {self.cfg_interval} must be a token count, or -1 for all tokens"
            )
        if not 0.0 < self.cfg_power < math.inf:
            raise ValueError(f"--cfg-power {self.cfg_power} must be a finite number above 0")
        if self.temperature != 0.0 and not 1e-3 <= self.temperature <= 1e3:
            raise ValueError(
                f"--temperature {self.temperature} must be 0 (greedy) or in [0.001, 1000]"
            )
        ends = self.temperature, self.temperature_end
        if self.temperature_schedule != "constant" and not all(1e-3 <= t <= 1e3 for t in ends):
            raise ValueError(
                f"--temperature-schedule {self.temperature_schedule} goes from --temperature "
                f"{ends[0]} to --temperature-end {ends[1]}; both must be in [0.001, 1000]"
            )
        if self.top_k < 0:
            raise ValueError(f"--top-k {self.top_k} must not be negative (0 is off)")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"--top-p {self.top_p} must be in (0, 1] (1 is off)")

    def scale(self, decoded: int, total: int) -> float:
        """Return the CFG scale of a step after ``decoded`` of ``total`` tokens; 1.0: none.

        With progress p = decoded / total: constant s; linear 1 + (s - 1) p; power-cosine
        1 + (s - 1) (1 - cos(pi p^power)) / 2 (MDTv2, arXiv 2303.14389).
        """
        if 0 <= self.cfg_interval < decoded:
            return 1.0
        progress = decoded / total
        share = {
            "constant": 1.0,
            "linear": progress,
            "power-cosine": (1.0 - math.cos(math.pi * progress**self.cfg_power)) / 2.0,
        }[self.cfg_schedule]
        return 1.0 + (self.cfg_scale - 1.0) * share

    def temperature_at(self, decoded: int, total: int) -> float:
        """Return the temperature of a step after ``decoded`` of ``total`` tokens.

        With progress p = decoded / total: T + (T_end - T) s, s = p or (1 - cos(pi p)) / 2.
        """
        progress = decoded / total
        share = {
            "constant": 0.0,
            "linear": progress,
            "cosine": (1.0 - math.cos(math.pi * progress)) / 2.0,
        }[self.temperature_schedule]
        return self.temperature + (self.temperature_end - self.temperature) * share


def image_randomness(
    seed: int, indices: range, num_classes: int, num_tokens: int, noise: str = "uniform"
) -> tuple[np.ndarray, np.ndarray]:
    """Return random class ids (B,) int64 and random numbers (B, T) of ``indices``.

    The numbers are those that ``sample`` takes for ``noise``: uniforms in [0, 1), float32, or keys
    of Gumbel noise, int64. Each image's are a function of (seed, index) alone.
    """
    streams = [np.random.Generator(np.random.Philox(key=[seed, i])) for i in indices]
    labels = np.array([s.integers(num_classes) for s in streams], dtype=np.int64)
    if noise == "gumbel":
        keys = [s.integers(-(2**63), 2**63, num_tokens, dtype=np.int64) for s in streams]
        return labels, np.stack(keys)
    return labels, np.stack([s.random(num_tokens, dtype=np.float32) for s in streams])


def sums_in_order(device: torch.device) -> bool:
    """Return whether cumulative sums on ``device`` add one number after the other."""
    return device.type == "cpu"


def cumulative(probabilities: Tensor) -> tuple[Tensor, float]:
    """Return cumulative sums (..., V) that never fall, and what stands for 1 in them.

    Elsewhere than on a CPU sums are made in parallel, in an order that may change from run to run:
    rounding then lets them fall, and rise where a probability is 0, so that such a token could be
    drawn. There they are of whole multiples of 2^-36, int64, which have the same sums in any order.
    """
    if sums_in_order(probabilities.device):
        return probabilities.cumsum(-1), 1.0  # (..., V)
    whole = (probabilities * WHOLE).to(torch.int64)  # (..., V)
    return whole.cumsum(-1), WHOLE  # (..., V)


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set to -inf what top-k, then nucleus (top-p) filtering cut off; (..., V) -> (..., V).

    Top-k keeps ties with the k-th logit. Top-p keeps the smallest set of most likely tokens whose
    probability exceeds ``top_p``, at least one (Holtzman et al. 2020).
    """
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[..., -1:]  # (..., 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)  # (..., V)
    if top_p < 1.0:
        ranked, ranks = logits.sort(descending=True)  # (..., V)
        total, one = cumulative(ranked.softmax(-1))  # (..., V)
        before = F.pad(total[..., :-1], (1, 0))  # (..., V) of all more likely tokens
        cut = torch.zeros_like(logits, dtype=torch.bool)  # (..., V)
        cut = cut.scatter(-1, ranks, before > top_p * one)  # (..., V)
        logits = logits.masked_fill(cut, -torch.inf)  # (..., V)
    return logits


def sample(
    logits: Tensor,
    randomness: Tensor,
    options: SamplingOptions,
    temperature: float | Tensor | None = None,
) -> Tensor:
    """Draw tokens (B, t) int64 from logits (B, t, V); one of probability 0 is never drawn.

    randomness: (B, t), see ``image_randomness``. temperature: instead of that of ``options``, one
    or (t, 1).
    """
    if options.temperature == 0.0:
        return logits.argmax(-1)  # (B, t)
    temperature = options.temperature if temperature is None else temperature
    if isinstance(temperature, Tensor) or temperature != 1.0:
        logits = logits / temperature  # (B, t, V)
    logits = filter_logits(logits, options.top_k, options.top_p)  # (B, t, V)
    if options.noise == "gumbel":
        return (logits + gumbel_noise(randomness, logits.shape[-1])).argmax(-1)  # (B, t)
    return inverse_cdf(logits, randomness)  # (B, t)


def inverse_cdf(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Return the first tokens whose cumulative probability exceeds u.

    logits: (B, t, V); uniforms: (B, t) in [0, 1). Returns (B, t) int64.
    """
    cdf, _ = cumulative(logits.softmax(-1))  # (B, t, V)
    # The last value y of cdf is 1 only up to rounding. u stays below it, so that the search ends
    # within the vocabulary: uniforms are at most 1 - 2^-24, and (1 - 2^-24) y rounds to below y.
    if cdf.dtype == torch.int64:  # products below 2^61
        u = (uniforms[..., None] * 2.0**24).to(torch.int64) * cdf[..., -1:] >> 24  # (B, t, 1)
    else:
        u = uniforms[..., None] * cdf[..., -1:]  # (B, t, 1)
    return torch.searchsorted(cdf, u, right=True).squeeze(-1)  # (B, t)


def gumbel_noise(keys: Tensor, codes: int) -> Tensor:
    """Return standard Gumbel noise (..., V) float32 of keys (...) int64, for codes 0 to V - 1.

    Each value is a function of its key and code alone, on every device up to rounding. The largest
    of logits + noise is a draw from their softmax (Gumbel-max). Small changes of the logits seldom
    change it, while the inverse CDF shifts all later codes.
    """
    code = torch.arange(codes, dtype=torch.int32, device=keys.device)  # (V,)
    low, high = keys.to(torch.int32), (keys >> 32).to(torch.int32)  # (...) each
    bits = _mix(_mix(code ^ low[..., None]) ^ high[..., None])  # (..., V)
    # small uniforms, which decide, keep their precision: log1p, and 31 bits
    uniform = ((bits & 0x7FFFFFFF).float() + 0.5) * 2.0**-31  # (..., V)
    uniform.clamp_(max=1.0 - 2.0**-24)  # rounded to 1, its noise would be -inf
    return uniform.neg_().log1p_().neg_().log_().neg_()  # (..., V)


def _mix(x: Tensor) -> Tensor:
    """Mix 32 bits, one to one: "lowbias32" of Ellis' hash prospector; int32 products wrap."""
    x = (x ^ (x >> 16 & 0xFFFF)) * 0x7FEB352D
    x = (x ^ (x >> 15 & 0x1FFFF)) * (0x846CA68B - 2**32)
    return x ^ (x >> 16 & 0xFFFF)


def log_likelihood(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return log p (B, t) of tokens (B, t) int64 by unfiltered logits (B, t, V)."""
    return logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)  # (B, t)
