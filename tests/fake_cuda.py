"""Fake tensors on CUDA, and modes that list what is done with them.

Fake tensors have shapes, types and devices but no values. torch refuses operators over two devices
there, and what reads values on the host is seen by a dispatch mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autoregressive.models.gpt import GPT
from tests.helpers import small_config

CUDA = torch.device("cuda", 0)
# operators that read values on the host, or whose result has as many elements as values say
WAITING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero")
WAITING += ("unique", "_unique2", "bincount", "repeat_interleave")


class Operations(TorchDispatchMode):
    """Lists operators with shapes and types, and those that would make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name.startswith("prim::"):  # asks for a property
            return out
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
        seen = [(tuple(t.shape), t.dtype) for t in tensors]
        numbers = [a for a in tree_leaves(args) if isinstance(a, (int, float, bool))]
        self.all.append((name, seen, numbers))
        # a number on the host goes along with a kernel's arguments; more than one must be copied
        devices = {t.device.type for t in tensors if t.ndim > 0}
        by_bool = name in ("index", "index_put", "index_put_") and any(
            t.dtype in (torch.bool, torch.uint8) for t in tensors[1:-1]
        )
        if name in WAITING or by_bool or devices - {"cuda"}:
            self.waits.append(f"{name} {seen} {devices}")
        return out


@dataclass
class Call:
    """Arguments of one call of scaled_dot_product_attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    cudnn: bool = field(default_factory=torch.backends.cuda.cudnn_sdp_enabled)


@dataclass
class AttentionCalls(TorchFunctionMode):
    """Keeps what reaches torch's attention."""

    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.calls.append(Call(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_cuda() -> Iterator[None]:
    """A context in which tensors have no values, those of "cuda" neither."""
    if (
        torch.__version__.startswith("2.7.")
        and torch.version.cuda
        and not torch.cuda.is_available()
    ):
        pytest.skip("torch 2.7 asks the driver about fake tensors, and aborts without one")
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def place(model: nn.Module) -> nn.Module:
    """Give ``model`` fake parameters and buffers on CUDA; within ``fake_cuda`` only."""
    place_parameters(model, CUDA)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                fake = torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA)
                module._buffers[name] = fake
    return model


def place_parameters(model: nn.Module, device: torch.device) -> None:
    """Give ``model`` fake parameters on ``device``."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                module._parameters[name] = nn.Parameter(fake, parameter.requires_grad)


def bare_gpt(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> GPT:
    """Return a GPT without values, in ``eval()`` mode; to be placed within ``fake_cuda``."""
    with torch.device("meta"):
        model = GPT(small_config(**changes))
    return model.cast_weights(dtype).eval()
