"""Matrix products with few rows on the CPU, as decoding has them: their time is that of reading the weights once."""

from __future__ import annotations

import torch
from torch import nn


class FewRowsLinear(nn.Module):
    """y = x W^T without bias, W (out, in) laid out for products with about ``rows`` rows; inference only.

    bfloat16: as (W x^T)^T, which oneDNN reads as it lies, where x W^T is copied first (measured on AMX, 8 rows, 768 to
    16384: 1.05 against 1.88 ms). float32: in oneDNN's packed layout, if this torch has the operator (2.4 against 6.3
    ms), else as nn.Linear.
    """

    def __init__(self, weight: torch.Tensor, rows: int):
        super().__init__()
        self.out_features, self.transposed = len(weight), weight.dtype == torch.bfloat16
        self.packed = None if self.transposed else _pack(weight, rows)
        self.weight = None if self.packed is not None else nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)  # (R, in)
        if self.transposed:
            y = (self.weight @ rows.T).T  # (R, out)
        elif self.packed is not None:
            y = _packed_product(rows, self.packed)  # (R, out)
        else:
            y = rows @ self.weight.T  # (R, out)
        return y.view(*x.shape[:-1], self.out_features)  # (..., out)


@torch.compiler.disable  # the packed layout cannot go through torch.compile
def _packed_product(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """x (R, in) times packed weights of (out, in): (R, out)."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _pack(weight: torch.Tensor, rows: int) -> torch.Tensor | None:
    """``weight`` in oneDNN's own layout, tried on one row; None where torch has no such (private) operator."""
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        _packed_product(weight.new_zeros(1, weight.shape[1]), packed)
    except (AttributeError, RuntimeError, NotImplementedError):
        return None
    return packed


@torch.inference_mode()
def pack_linears(model: nn.Module, rows: int) -> None:
    """Replace every bias-free linear layer of a float32 or bfloat16 ``model`` on the CPU, in place, one by one.

    ``rows``: of the products to come. The old weights are let go: the model can no longer be trained or saved.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and child.bias is None and child.weight.dtype != torch.float16:
                setattr(module, name, FewRowsLinear(child.weight.detach(), rows))
