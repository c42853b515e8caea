"""Sharded weights: how often and in which type they are gathered."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from autoregressive.models.gpt import GPT
from tests.helpers import random_codes, small_config
from utils.distributed import World
from utils.parallel import shard
from utils.precision import autocast


def sharded_gpt(world: World, mode: str, precision: str = "none", layers: int = 3) -> GPT:
    model = GPT(small_config(n_layer=layers)).train()
    model.init_weights()
    return shard(world, model, model.layers, mode, precision)


class Collectives(TorchDispatchMode):
    """Lists collective operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode, gathers", [("fsdp", 7), ("sdp", 4)])
def test_weights_outside_the_blocks_are_gathered_once(two_ranks, mode, gathers):
    """Three blocks twice, or once; the rest was gathered again at the start of backward."""
    model = sharded_gpt(two_ranks, mode)
    for _ in range(2):
        with Collectives() as collectives:
            model(*random_codes(model.config))[0].backward()
        assert len([name for name in collectives.names if "allgather" in name]) == gathers


def test_sharded_norms_are_as_under_autocast(two_ranks):
    """They were gathered in bfloat16, and so rounded; matrices still are, names are as before."""
    model = sharded_gpt(two_ranks, "fsdp", "bf16", layers=2)
    assert set(model.state_dict()) == set(GPT(small_config()).state_dict())
    assert all(isinstance(p, DTensor) for p in model.parameters())
    seen = {}

    def look(name: str, module: nn.Module, *_: Any) -> None:
        seen[name] = module.weight.dtype, type(module.weight)

    for name, module in model.named_modules():
        if hasattr(module, "weight"):
            module.register_forward_pre_hook(partial(look, name))
    with autocast(torch.device("cpu"), "bf16"):
        loss, _ = model(*random_codes(model.config))
    loss.backward()
    types = {name: dtype for name, (dtype, _) in seen.items()}
    assert types["layers.1.attention_norm"] == types["layers.0.ffn_norm"] == torch.float32
    assert types["layers.1.attention.wqkv"] == torch.bfloat16
    assert all(kind is not DTensor for _, kind in seen.values())
    assert all(isinstance(p.grad, DTensor) for p in model.parameters())
