"""This process and its peers: rank, device, and the few collectives that scripts use."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
# others wait while rank 0 copies a checkpoint, tens of GB for the largest models
TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """This process among its peers: ``rank`` of ``size``, computing on ``device``."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes shared files."""
        return self.rank == 0

    def worker(self) -> ThreadPoolExecutor:
        """Return a thread that works on this process's device.

        A new thread's current CUDA device is 0: switching streams there would open a context of
        half a GB on GPU 0 for each rank.
        """
        if self.device.type != "cuda":
            return ThreadPoolExecutor(1)
        return ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(self.device,))

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:  # NCCL's is a sum on a GPU, and torch would guess which
            on_gpu = self.device.type == "cuda"
            dist.barrier(device_ids=[self.device.index] if on_gpu else None)

    def mean(self, x: Tensor) -> Tensor:
        """Return the average of ``x`` over the ranks, a new tensor."""
        x = x.detach().clone()
        if self.size > 1:
            dist.all_reduce(x)
            x /= self.size
        return x

    def gather_objects(self, value: object) -> list | None:
        """Return all ranks' ``value`` (picklable) in order on rank 0; None elsewhere."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.is_main else None
        dist.gather_object(value, values)
        return values

    def first(self, value: T | None) -> T | None:
        """Return on every rank the value of the first rank that has one; None if none has."""
        values = self.gather_objects(value) or []
        return self.broadcast(next((v for v in values if v is not None), None))

    def gather(self, x: Tensor) -> Tensor:
        """Return ``x`` of every rank, of one shape, concatenated in the order of ranks."""
        if self.size == 1:
            return x
        parts = [
            torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)
        ]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def broadcast(self, value: T) -> T:
        """Return rank 0's ``value`` (anything that can be pickled) on every rank."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]


def init_distributed(connect: bool = True, alone: bool = False) -> World:
    """Join the job that torchrun's environment describes; without one, be the only process.

    nccl for CUDA tensors, gloo for the CPU's; each local rank takes its own GPU. connect: False for
    work that needs no communication, then the processes know their rank only. alone: a single
    process makes a process group of itself, which sharding needs.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"nproc_per_node asks for at least {local_rank + 1} GPUs, "
                f"{torch.cuda.device_count()} are visible"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    elif torch.backends.mps.is_available() and size == 1:
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
    if size > 1 and connect:
        dist.init_process_group(_backend(device), timeout=TIMEOUT)
    elif alone:
        dist.init_process_group(_backend(device), store=dist.HashStore(), rank=0, world_size=1)
    return World(rank, size, device)


def _backend(device: torch.device) -> str:
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
