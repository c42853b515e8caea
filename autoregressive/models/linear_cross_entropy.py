"""Output layer and cross-entropy in one, so that the logits of all tokens never exist at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

CHUNK_ELEMENTS = 1 << 24  # logits that exist at a time: 64 MiB in float32
# on CUDA 512 MiB, as each chunk reads and writes the gradient of the whole weight
CUDA_CHUNK_ELEMENTS = 1 << 27


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of -log softmax(hidden weight^T)[target], and the same for each token.

    hidden: (..., D); weight: (V, D); targets: (...) int64 in [0, V). Returns the mean, a float32
    scalar to differentiate, and the detached losses (...) float32. Products run in autocast's type,
    softmax in float32. Gradients are made in the forward pass, chunk by chunk while its logits
    exist (as in Liger Kernel, arXiv 2410.10989), so nothing is computed twice.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    rows = hidden.flatten(0, -2)  # (N, D)
    loss, losses = _LinearCrossEntropy.apply(rows, weight, targets.flatten(), dtype)  # (), (N,)
    return loss, losses.view(targets.shape)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        differentiate = any(ctx.needs_input_grad)
        h, w = hidden.to(dtype), weight.to(dtype)  # (N, D), (V, D)
        wide = torch.promote_types(dtype, torch.float32)
        losses = torch.empty(len(h), device=h.device, dtype=wide)  # (N,)
        if differentiate:
            d_hidden = torch.empty_like(hidden)  # (N, D)
            d_weight = torch.zeros_like(weight)  # (V, D)
        elements = CUDA_CHUNK_ELEMENTS if h.is_cuda else CHUNK_ELEMENTS
        rows = max(1, elements // len(w))
        for start in range(0, len(h), rows):
            part = slice(start, start + rows)
            logits = (h[part] @ w.T).to(losses.dtype)  # (c, V)
            target = targets[part, None]  # (c, 1)
            log_z = logits.logsumexp(-1, keepdim=True)  # (c, 1)
            losses[part] = (log_z - logits.gather(-1, target)).squeeze(-1)  # (c,)
            if differentiate:
                d_logits = logits.sub_(log_z).exp_()  # (c, V), softmax
                minus_one = torch.full_like(log_z, -1.0)  # (c, 1)
                d_logits.scatter_add_(-1, target, minus_one)  # (c, V), softmax - one-hot
                d_logits = d_logits.to(dtype)  # (c, V), not yet divided by N: float16 would lose it
                d_hidden[part] = d_logits @ w  # (c, D)
                d_weight += d_logits.T @ h[part]  # (V, D)
        if differentiate:
            ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(losses)
        return losses.mean(), losses

    @staticmethod
    def backward(ctx: FunctionCtx, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors  # (N, D), (V, D)
        scale = d_loss / len(d_hidden)  # ()
        return d_hidden * scale, d_weight * scale, None, None
