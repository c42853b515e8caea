"""Parallelism over ranks: replicated (DDP), sharded (FSDP2), or sharded within groups (HSDP).

All that differs between them is in this file; a training loop has one module and one gradient norm.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_hook,
    fp16_compress_hook,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from utils.distributed import World
from utils.precision import AUTOCAST_DTYPE

_COMPRESS_HOOK = {torch.bfloat16: bf16_compress_hook, torch.float16: fp16_compress_hook}


def replicate(world: World, model: nn.Module, grad_dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return ``model`` under DDP, gradients averaged in ``grad_dtype``; itself on one rank."""
    if world.size == 1:
        return model
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    names = signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    ddp = DistributedDataParallel(  # torch 2.13 renamed the option and warns of its old name
        model, device_ids=device_ids, gradient_as_bucket_view=True, **{sync: False}
    )
    if grad_dtype in _COMPRESS_HOOK:
        ddp.register_comm_hook(None, _COMPRESS_HOOK[grad_dtype])
    return ddp


def shard(
    world: World,
    model: nn.Module,
    blocks: Sequence[nn.Module],
    mode: str,
    precision: str,
    grad_dtype: torch.dtype = torch.float32,
    shard_size: int | None = None,
    cpu_offload: bool = False,
    forward_methods: Sequence[str] = (),
) -> nn.Module:
    """Shard ``model`` and each of ``blocks`` in place by FSDP2; called under autocast as before.

    mode: ``fsdp`` gathers a block's weights anew for backward, ``sdp`` keeps them, ``hsdp`` shards
    within groups of ``shard_size`` ranks (default: those of one machine) and replicates over the
    groups. precision: matrices of blocks are gathered in that type, so the same products see the
    same operands as autocast's; norms, embeddings and the output layer are gathered in float32.
    Gradients are summed in ``grad_dtype``. ``forward_methods``: further methods, besides
    ``forward``, that use the weights.
    """
    mesh = _make_mesh(world, mode, shard_size)
    offload = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    reshard = mode != "sdp"
    outer = MixedPrecisionPolicy(reduce_dtype=grad_dtype, cast_forward_inputs=False)
    dtype = AUTOCAST_DTYPE[precision]
    inner = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=grad_dtype, cast_forward_inputs=False
    )
    options = dict(mesh=mesh, offload_policy=offload, reshard_after_forward=reshard)
    # norms' weights stay float32, as under autocast: they go with what is outside the blocks, whose
    # group takes only parameters found in modules that no block has
    vectors = [p for block in blocks for p in block.parameters() if p.ndim < 2]
    for block in blocks:
        fully_shard(block, mp_policy=inner, ignored_params=set(vectors), **options)
    model.vectors = nn.ParameterList(vectors)
    # backward begins with what is outside the blocks: freed after forward, it would be gathered
    # again at once
    fully_shard(model, mp_policy=outer, **options | {"reshard_after_forward": False})
    del model.vectors  # they keep their names in the blocks
    for method in forward_methods:
        register_fsdp_forward_method(model, method)
    return model


def fill(
    model: nn.Module,
    weights: Iterable[tuple[str, Tensor]],
    device: torch.device,
    cpu_offload: bool = False,
) -> None:
    """Give the parameters of ``model``, on the meta device so far, their values on ``device``.

    weights: (name, whole tensor) of every parameter, the same on all ranks, made one at a time:
    sharded parameters keep this rank's part, so no rank ever holds all of them.
    """
    state = {}
    for name, weight in weights:
        parameter, value = model.get_parameter(name), weight.to(device)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            value = distribute_tensor(value, mesh, placements, src_data_rank=None)
            value = value.cpu() if cpu_offload else value
        state[name] = value
    model.load_state_dict(state, assign=True)


def _make_mesh(world: World, mode: str, shard_size: int | None) -> DeviceMesh:
    if mode != "hsdp":
        return init_device_mesh(world.device.type, (world.size,))
    shard_size = shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if world.size % shard_size:
        raise ValueError(
            f"--shard-size {shard_size} does not divide {world.size} processes into equal groups"
        )
    groups = (world.size // shard_size, shard_size)
    return init_device_mesh(world.device.type, groups, mesh_dim_names=("replicate", "shard"))


def delay_sync(forward: nn.Module, delay: bool) -> AbstractContextManager:
    """Return a context in which DDP delays averaging; sharded gradients are always reduced."""
    replicated = isinstance(forward, DistributedDataParallel)
    return forward.no_sync() if delay and replicated else nullcontext()


def gradient_norm(model: nn.Module) -> Tensor:
    """Return the 2-norm of all gradients over all ranks, a scalar on the device."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, sharing memory; other tensors unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
