"""Training checkpoints: resharded to the bit, and folders that strangers hand around."""

import json
import math
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.helpers import ROOT, run_command, same_tensors
from utils.checkpoints import shard
from utils.checkpoints.folder import (
    check_bytes,
    load_sharded,
    read_contents,
    read_meta,
    read_sharded,
    save_sharded,
)
from utils.checkpoints.shard import Rows, write_shard
from utils.files import write_json
from utils.parallel import local

TENSORS = {
    "model.weight": torch.arange(12.0).view(3, 4),
    "model.half": torch.randn(5).bfloat16(),
    "model.flags": torch.tensor([True, False, True]),
    "model.codes": torch.arange(3),
    "model.empty": torch.zeros(0, 3),
    "ema.step": torch.tensor(7.0),
}
FILE = "00000-of-00001.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "0000001"
    write_json(path / "meta.json", save_sharded(path, TENSORS, None).result())
    return path


def update_meta(folder: Path) -> None:
    """Make ``meta.json`` agree with the files, as an attacker would."""
    files = {p.name: p.stat().st_size for p in folder.iterdir() if p.name != "meta.json"}
    write_json(folder / "meta.json", {"files": files})


def test_what_was_saved_is_read_here_and_by_the_package(folder):
    assert same_tensors(read_sharded(folder, ""), TENSORS)
    assert read_sharded(folder, "ema.").keys() == {"step"}
    with safe_open(folder / FILE, "pt") as file:
        assert same_tensors({k: file.get_tensor(k) for k in file.keys()}, TENSORS)  # noqa: SIM118
    assert read_contents(folder)["model.weight"] == (torch.Size((3, 4)), torch.float32)


def test_a_copy_is_saved_while_training_goes_on(tmp_path):
    for strided in (torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.ones(3)):
        before = strided.clone()
        future = save_sharded(tmp_path, {"a": strided}, None)
        strided.zero_()
        write_json(tmp_path / "meta.json", future.result())
        assert torch.equal(read_sharded(tmp_path, "")["a"], before)


def of_ranks(shape: tuple[int, ...], placements: list, save: Callable) -> list:
    """Return what ``save`` returns on each rank, for a tensor in parts; without communication."""
    values = torch.arange(21.0).view(7, 3)
    results = []
    for rank in range(math.prod(shape)):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=math.prod(shape))
        mesh = init_device_mesh("cpu", shape)
        # all made alike: torch remembers the mesh of a product's operands, of another rank here
        a, b = (
            distribute_tensor(v, mesh, placements, src_data_rank=None) for v in (values, -values)
        )
        try:
            results.append(save({"a": a, "b": b, "c": values.clone()}))
        finally:
            dist.destroy_process_group()
    return results


@pytest.mark.parametrize("shape, placements", [
    ((1,), [Shard(0)]), ((2,), [Shard(0)]), ((4,), [Shard(0)]), ((9,), [Shard(0)]),
    ((2, 2), [Replicate(), Shard(0)]), ((3,), [Replicate()]),
])  # fmt: skip
def test_any_sharding_is_read_under_any_other(tmp_path, monkeypatch, shape, placements):
    """FSDP, HSDP (each part written once) and more ranks than rows; uneven parts."""
    monkeypatch.setattr(dist, "all_gather_object", lambda *_: None)
    written = of_ranks(
        shape,
        placements,
        lambda tensors: save_sharded(tmp_path, tensors, dist.group.WORLD).result(),
    )
    names = sorted(p.name for p in tmp_path.iterdir())
    assert len(names) == len(written)
    update_meta(tmp_path)
    values = torch.arange(21.0).view(7, 3)
    assert same_tensors(read_sharded(tmp_path, ""), {"a": values, "b": -values, "c": values})

    def load(tensors: dict) -> list[bool]:
        expected = {k: local(v).clone() for k, v in tensors.items()}
        for tensor in tensors.values():
            local(tensor).zero_()
        load_sharded(tmp_path, tensors)
        return [torch.equal(local(v), expected[k]) for k, v in tensors.items()]

    for others in ((2,), (3,), (5,)):
        assert all(map(all, of_ranks(others, [Shard(0)], load)))


LOAD = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from utils.checkpoints.folder import check_bytes, load_sharded

dist.init_process_group("gloo")
rank, work = dist.get_rank(), Path(sys.argv[1])
expected = torch.load(work / "expected.pt", weights_only=True)
tensors = {k: torch.zeros_like(v) for k, v in expected.items()}
mesh = init_device_mesh("cpu", (2,))
tensors["fsdp"] = distribute_tensor(tensors["fsdp"], mesh, [Shard(0)])
check_bytes(work / str(rank), rank, 2)
load_sharded(work / str(rank), tensors, rank, 2)
tensors["fsdp"] = tensors["fsdp"].full_tensor()
torch.save(tensors, work / f"{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_read_every_byte_once(tmp_path):
    """Every process read and copied all of a replicated model's checkpoint: here each sees zeros
    in place of the tensors of the file that is the other's to check and to read.
    """
    a, fsdp = torch.randn(7, 3, 2, 2), torch.randn(8, 3)
    files: list[dict[str, Rows]] = [
        {"a": Rows(a[:3], 0, 7), "fsdp": Rows(fsdp[:4], 0, 8)},
        {"a": Rows(a[3:], 3, 7), "fsdp": Rows(fsdp[4:], 4, 8)},
    ]
    for i, (name, tensor) in enumerate(TENSORS.items()):
        files[i % 2][name] = Rows.whole(tensor)
    paths = [tmp_path / "0" / f"{i:05d}-of-00002.safetensors" for i in range(2)]
    paths[0].parent.mkdir()
    hashes = {p.name: write_shard(p, parts) for p, parts in zip(paths, files, strict=True)}
    sizes = {p.name: p.stat().st_size for p in paths}
    write_json(tmp_path / "0" / "meta.json", {"files": sizes, "sha256": hashes})
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    for rank, other in enumerate((paths[1].name, paths[0].name)):
        content = (tmp_path / str(rank) / other).read_bytes()
        header = content[: 8 + struct.unpack("<Q", content[:8])[0]]
        (tmp_path / str(rank) / other).write_bytes(header.ljust(len(content), b"\0"))

    expected = {"a": a.to(memory_format=torch.channels_last), "fsdp": fsdp, **TENSORS}
    torch.save(expected, tmp_path / "expected.pt")
    (tmp_path / "load.py").write_text(LOAD)
    launch = ("bash", "scripts/launch.sh", tmp_path / "load.py", tmp_path)
    run_command(*launch, nproc=2, PYTHONPATH=str(ROOT))
    for rank in range(2):
        assert same_tensors(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected)


def test_all_ranks_are_told_that_one_cannot_write(tmp_path, two_ranks, monkeypatch):
    def gather(values: list, ours: tuple, group: object) -> None:
        values[:] = [ours, ("00001-of-00002.safetensors", 0, None, "No space left on device")]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(OSError, match="No space left on device"):
        save_sharded(tmp_path, TENSORS, dist.group.WORLD).result()


def write_parts(folder: Path, tensor: torch.Tensor, ranges: list[tuple[int, int]]) -> None:
    folder.mkdir(exist_ok=True)
    for i, (start, stop) in enumerate(ranges):
        write_shard(folder / f"{i}.safetensors", {"a": Rows(tensor[start:stop], start, 10)})
    update_meta(folder)


def test_parts_of_any_number_of_ranks_are_joined(tmp_path):
    tensor = torch.randn(10, 3)
    for ranges in ([(0, 10)], [(0, 5), (5, 10)], [(4, 8), (8, 10), (0, 4), (10, 10)]):
        write_parts(tmp_path / "a", tensor, ranges)
        assert torch.equal(read_sharded(tmp_path / "a", "")["a"], tensor)


@pytest.mark.parametrize("ranges", [
    [(0, 5), (6, 10)], [(0, 5), (4, 10)], [(0, 9)], [(1, 10)], [(0, 10), (0, 10)],
    [(0, 5), (0, 5)],
])  # fmt: skip
def test_gaps_and_overlaps_are_refused(tmp_path, ranges):
    write_parts(tmp_path / "a", torch.randn(10, 3), ranges)
    with pytest.raises(ValueError, match="the parts of a leave gaps or overlap"):
        read_contents(tmp_path / "a")


def test_parts_of_different_tensors_are_refused(tmp_path):
    for other in (torch.ones(5, 4), torch.ones(5), torch.ones(5, 3).double()):
        write_parts(tmp_path, torch.ones(10, 3), [(0, 5)])
        write_shard(tmp_path / "1.safetensors", {"a": Rows(other, 5, 10)})
        update_meta(tmp_path)
        with pytest.raises(ValueError, match="the parts of a "):
            read_contents(tmp_path)


def lie(**values: object):
    """Change the entry of model.weight in the header."""
    return lambda header: header["model.weight"].update(values)


def of_rows(value: object):
    def edit(header: dict) -> None:
        rows = json.loads(header["__metadata__"]["rows"]) | {"model.weight": value}
        header["__metadata__"]["rows"] = json.dumps(rows)

    return edit


def unnamed(header: dict) -> None:
    header["other"] = header.pop("model.weight")


def aliased(header: dict) -> None:
    header["other"] = header["model.weight"]
    rows = json.loads(header["__metadata__"]["rows"])
    header["__metadata__"]["rows"] = json.dumps(rows | {"other": [0, 3]})


@pytest.mark.parametrize("edit, message", [
    (lie(shape=[1 << 20, 1 << 20]), "model.weight does not lie where it should"),
    (lie(shape=[3.0, 4]), "model.weight has sizes that are not whole numbers"),
    (lie(shape=[True, 12]), "model.weight has sizes that are not whole numbers"),
    (lie(shape=[-3, -4]), "model.weight has sizes that are not whole numbers"),
    (lie(shape=None), "model.weight has sizes that are not whole numbers"),
    (lie(dtype="F33"), "damaged header"),
    (lie(dtype=["F32"]), "damaged header"),
    (lie(data_offsets=[0, 1 << 40]), "does not lie where it should"),
    (lie(data_offsets=[1 << 60, (1 << 60) + 48]), "does not lie where it should"),
    (lie(data_offsets=[-48, 0]), "not whole numbers"),
    (lie(data_offsets=["0", "48"]), "damaged header"),
    (lie(data_offsets=[]), "damaged header"),
    (of_rows([0, 1 << 40]), "the parts of model.weight leave gaps or overlap"),
    (of_rows([1 << 40, 1 << 41]), "the parts of model.weight leave gaps or overlap"),
    (of_rows([1, 3]), "the rows of model.weight reach out of it"),
    (of_rows([0]), "damaged header"),
    (of_rows({}), "not whole numbers"),
    (unnamed, "tensors and ranges of rows have other names"),
    (aliased, "does not lie where it should"),
    (lambda header: header.pop("__metadata__"), "damaged header"),
    (lambda header: header.update(__metadata__=3), "damaged header"),
])  # fmt: skip
def test_headers_that_lie_are_refused(folder, edit, message):
    content = (folder / FILE).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / FILE).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    update_meta(folder)
    with pytest.raises(ValueError) as error:
        read_sharded(folder, "")
    assert str(error.value).startswith(f"{folder} is not a readable checkpoint folder: ")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", [
    b"", b"\0" * 7, struct.pack("<Q", 1 << 63), struct.pack("<Q", 9) + b"{}",
    struct.pack("<Q", 100_000) + b"[" * 100_000, struct.pack("<Q", 9000) + b"9" * 9000,
    struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 2) + b"\xff\xff",
    struct.pack("<Q", 15) + b'{"a":1,"a":123}',
])  # fmt: skip
def test_files_that_are_none_are_refused(folder, text):
    (folder / FILE).write_bytes(text)
    update_meta(folder)
    with pytest.raises(ValueError, match="is not a readable checkpoint folder: 00000-of") as error:
        read_contents(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [1 << 63, 1000, shard.MAX_HEADER + 1])
def test_a_header_is_no_longer_than_the_file_and_the_format_s_limit(folder, monkeypatch, length):
    if length > shard.MAX_HEADER:
        monkeypatch.setattr(shard, "MAX_HEADER", 50)
        length = 60
    (folder / FILE).write_bytes(struct.pack("<Q", length) + b"{}" + b" " * 100)
    update_meta(folder)
    with pytest.raises(ValueError, match=f"has 110 bytes, its header claims to have {length}"):
        read_contents(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "", ".", "..", "link", "a/b"])
def test_names_that_lead_out_of_the_folder_are_refused(folder, name):
    (folder.parent / "secret").write_bytes(b"1234567")
    (folder / "link").symlink_to(folder.parent / "secret")
    write_json(folder / "meta.json", {"files": {name: 7}})
    with pytest.raises(ValueError, match=re.escape(f"{folder} is damaged: {name!r}")):
        read_meta(folder)


@pytest.mark.parametrize("meta", [
    [], {}, {"files": []}, {"files": {FILE: None}}, {"files": {FILE: "x"}},
    {"files": {FILE: 1}, "sha256": []}, {"files": {FILE: 1}, "sha256": {FILE: 3}},
    {"files": {FILE: 1}, "sha256": {"../secret": "0"}},
])  # fmt: skip
def test_meta_of_wrong_types_is_refused(folder, meta):
    write_json(folder / "meta.json", meta)
    with pytest.raises(ValueError, match="is not a whole checkpoint: meta.json"):
        read_meta(folder)


def test_tensors_that_are_not_there_or_do_not_fit_are_named(folder):
    with pytest.raises(ValueError, match="lacks model.other"):
        load_sharded(folder, {"model.other": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"model.weight is \(3, 4\), expected \(4, 3\)"):
        load_sharded(folder, {"model.weight": torch.zeros(4, 3)})


def test_every_changed_byte_is_found(folder):
    check_bytes(folder)
    content = (folder / FILE).read_bytes()
    for position in range(0, len(content), math.ceil(len(content) / 20)):
        changed = bytearray(content)
        changed[position] ^= 1
        (folder / FILE).write_bytes(changed)
        with pytest.raises(ValueError, match="0000001 is damaged: the bytes of 00000-of-00001"):
            check_bytes(folder)
