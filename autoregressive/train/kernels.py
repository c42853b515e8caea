"""Which attention a GPT trains with on a device, why, and what another one would gain."""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from autoregressive.models.attention import attend_fused
from autoregressive.models.causal_attention import make_causal_mask
from autoregressive.models.gpt import GPT
from utils.precision import AUTOCAST_DTYPE

# Estimates for an H100 in 16 bits, none of them measured: operations per second of products, and
# of attention, forward and backward, by each kernel over the pairs that it computes.
PRODUCTS = 500e12
ATTENTION = {"dense": 80e12, "flash": 200e12, "flex": 200e12}
MEMORY = 3e12  # bytes per second
BLOCK = 128  # slots; flash and flex leave out blocks that are masked whole
PASSES = 20  # over q, k, v or the output, to add the pairs of a step to flash
ROUNDING = 3e-2  # of outputs and gradients in bfloat16, relative


def step_seconds(model: GPT, kind: str) -> float:
    """Return an estimate of the time per image and training step of one layer."""
    config, slots = model.config, model.order.num_tokens
    width = config.n_head * -(-config.head_dim // 8) * 8
    blocks = -(-slots // BLOCK)
    pairs = slots**2 if kind == "dense" else blocks * (blocks + 1) // 2 * BLOCK**2
    weights = 4 * config.dim**2 + 3 * config.dim * config.ffn_dim
    weights += config.dim * config.vocab_size // config.n_layer
    seconds = 6 * slots * weights / PRODUCTS
    seconds += 14 * pairs * width / ATTENTION[kind]  # 4 forward, 10 backward
    return seconds + (kind == "flash") * PASSES * 2 * slots * width / MEMORY


def expected_gain(model: GPT, kind: str, other: str) -> str:
    """Return how much faster a step is expected to be by ``other``, in words."""
    gain = step_seconds(model, kind) / step_seconds(model, other)
    return f"a step about {gain:.2f} times as fast (arithmetic for an H100, not measured)"


def choose_attention(args: Namespace, model: GPT, device: torch.device) -> tuple[str, str | None]:
    """Return ``dense``, ``flash`` or ``flex`` for ``--attention``, and a note for the log, if any.

    auto keeps the attention dropout that was asked for: flash takes any, flex takes none. The note
    names what would be faster, with the expected gain.
    """
    asked = args.attention
    if device.type != "cuda" or args.compile is False or asked == "flex":
        return ("dense" if asked == "auto" else asked), None
    without = "--attn-dropout-p 0, which is not the paper's, would take FlexAttention: "
    if args.attn_dropout_p == 0:
        if asked == "dense":
            return "dense", f"--attention flex: {expected_gain(model, 'dense', 'flex')}"
        return ("flex" if asked == "auto" else asked), None
    reason = unavailable_reason(model, args.mixed_precision, device)
    if asked == "dense" and reason is None:
        return "dense", f"--attention flash: {expected_gain(model, 'dense', 'flash')}"
    if asked != "flash" and reason is not None:
        gain = expected_gain(model, "dense", "flex")
        return "dense", f"attention with dropout over the whole mask: {reason}. {without}{gain}"
    gain = expected_gain(model, "flash", "flex")
    return "flash", f"flash attention with dropout. {without}{gain}"


def unavailable_reason(model: GPT, precision: str, device: torch.device) -> str | None:
    """Return why flash attention cannot be used with the region order here; None if it can.

    It is tried on a few numbers, against the mask, as a kernel that is called by its name could
    have changed with torch.
    """
    config, dtype = model.config, AUTOCAST_DTYPE[precision]
    if dtype is None:
        return f"flash attention is of 16 bits, not of --mixed-precision {precision}"
    if config.n_head != config.kv_heads:
        return "its heads are grouped"
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            error = flash_error(model, device, dtype)
    except (RuntimeError, TypeError, ValueError) as failure:
        return f"flash attention failed: {str(failure).splitlines()[0]}"
    return None if error <= ROUNDING else f"flash attention is off by {error:.2g} of its output"


def flash_error(model: GPT, device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest relative error of flash attention: output, gradients, mean of dropout."""
    torch.manual_seed(0)
    visible, mask = model.mask.to(device), make_causal_mask(model.order.mask()).to(device)
    shape = (4, 1, 2, model.order.num_tokens, model.config.head_dim)
    *inputs, weight = torch.randn(shape, device=device).to(dtype)  # (B, H, T, hd) each
    scale, results = model.config.head_dim**-0.5, []
    for ours in (True, False):
        q, k, v = (x.to(dtype if ours else torch.float32).requires_grad_() for x in inputs)
        if ours:
            y = attend_fused(q, k, v, mask, 0.0, scale, False)  # (B, H, T, hd)
        else:
            y = sdpa(q, k, v, visible, scale=scale)  # (B, H, T, hd)
        results.append([y, *torch.autograd.grad((y * weight).sum(), (q, k, v))])
    errors = [relative_error(a, b) for a, b in zip(*results, strict=True)]
    # weights that were dropped and those that grew add up to 1 in the mean
    ones = torch.ones_like(inputs[2])  # (B, H, T, hd)
    q, k = (x.expand(64, -1, -1, -1) for x in inputs[:2])
    means = attend_fused(q, k, ones.expand_as(q), mask, 0.1, scale, False).float().mean((0, 1, 3))
    return max(*errors, (means.mean() - 1).abs().item())


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return |found - expected| / |expected| in 2-norms."""
    return ((found.float() - expected).norm() / expected.norm()).item()
