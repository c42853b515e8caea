"""Sharding within machines and replication across them, on a group of 16 processes in one.

Its collectives do nothing (torch's "fake" back-end), but they are called, by the groups they have.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from autoregressive.models.gpt import GPT
from autoregressive.train.train_c2i import initial_weights
from tests.helpers import random_codes, small_config
from utils import performance
from utils.distributed import World
from utils.parallel import fill, local, shard

RANK, RANKS, MACHINE = 13, 16, 8


@pytest.fixture
def world() -> Iterator[World]:
    """Rank 13 of 16: the sixth process of the second of two machines."""
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=RANKS)
    yield World(RANK, RANKS, torch.device("cpu"))
    dist.destroy_process_group()


class Collectives(TorchDispatchMode):
    """Lists collective operators with the ranks that take part."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[str, list[int]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            groups = [a for a in args if isinstance(a, torch.ScriptObject)]
            boxed = (dist.ProcessGroup.unbox(g) for g in groups if "ProcessGroup" in str(g._type()))
            for group in boxed:
                self.all.append((func._schema.name, dist.get_process_group_ranks(group)))
        return func(*args, **(kwargs or {}))


def sharded(world: World, monkeypatch, precision: str = "none") -> GPT:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(MACHINE))
    model = GPT(small_config(n_layer=3)).train()
    model.init_weights()
    return shard(world, model, model.layers, "hsdp", precision)


def test_weights_are_sharded_within_a_machine(world, monkeypatch):
    """Over its 8 processes, by --shard-size's default; the machines hold the same."""
    model = sharded(world, monkeypatch)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        mesh = parameter.device_mesh
        assert mesh.mesh_dim_names == ("replicate", "shard") and mesh.shape == (2, MACHINE)
        assert parameter.placements == (Replicate(), Shard(0)), name
        rows = -(-len(parameter) // MACHINE)
        held = min(rows, max(0, len(parameter) - rows * (RANK % MACHINE)))
        assert len(local(parameter)) == held, name


@pytest.mark.skipif(
    torch.__version__.startswith("2.7."), reason="torch 2.7 sums such gradients on GPUs alone"
)
def test_a_step_gathers_within_the_machine_and_sums_over_both(world, monkeypatch):
    """Traffic between machines is the sum of sharded gradients alone."""
    model = sharded(world, monkeypatch)
    with Collectives() as collectives:
        model(*random_codes(model.config))[0].backward()
    machine, twins = list(range(MACHINE, RANKS)), [RANK - MACHINE, RANK]
    groups: dict[str, set[tuple[int, ...]]] = {}
    for name, ranks in collectives.all:
        groups.setdefault(name, set()).add(tuple(ranks))
    gathers = [n for n, _ in collectives.all if "allgather" in n]
    scatters = [n for n, _ in collectives.all if "reduce_scatter" in n]
    sums = [n for n, _ in collectives.all if "allreduce" in n]
    # three blocks twice, the rest once; a gradient of each block and of the rest
    assert (len(gathers), len(scatters), len(sums)) == (7, 4, 4)
    for name, found in groups.items():
        assert found == {tuple(twins if "allreduce" in name else machine)}, name
    assert all(isinstance(p.grad, DTensor) for p in model.parameters())


def test_each_process_gets_its_part_of_new_weights(world, monkeypatch):
    """Made one after the other, never whole: the second machine as the first."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(MACHINE))
    with torch.device("meta"):
        model = GPT(small_config())
    reference = GPT(model.config)
    shard(world, model, model.layers, "hsdp", "none")
    torch.manual_seed(0)
    fill(model, initial_weights(reference, {}), world.device)
    torch.manual_seed(0)
    for (name, whole), parameter in zip(
        initial_weights(reference, {}), model.parameters(), strict=True
    ):
        rows = -(-len(whole) // MACHINE)
        part = whole[rows * (RANK % MACHINE) :][:rows]
        assert torch.equal(local(parameter), part), name


def test_a_group_that_does_not_divide_is_an_error(world):
    model = GPT(small_config())
    with pytest.raises(ValueError, match="--shard-size 6 does not divide 16"):
        shard(world, model, model.layers, "hsdp", "none", shard_size=6)


def test_ranks_wait_on_their_own_gpu(monkeypatch):
    """NCCL's barrier needs a device: torch guessed it, and warned."""
    seen = []
    monkeypatch.setattr(dist, "barrier", lambda device_ids=None: seen.append(device_ids))
    for device in (torch.device("cuda", 3), torch.device("cpu")):
        World(3, 4, device).barrier()
    assert seen == [[3], None]


@pytest.mark.parametrize("ranks, asked, workers", [(1, 24, 16), (8, 24, 2), (32, 24, 1), (8, 0, 0)])
def test_ranks_of_a_machine_share_its_cores(monkeypatch, ranks, asked, workers):
    """Each of eight took 16 processes to read images."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(performance, "usable_cores", lambda: 16)
    assert performance.worker_count(asked) == workers
