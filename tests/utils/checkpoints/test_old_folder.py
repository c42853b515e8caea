"""Checkpoint folders of earlier versions, with a pickle inside: nothing in one can run, or reach
outside of it.
"""

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from tests.helpers import run_command, same_tensors, small_state, train
from utils.checkpoints import old_folder
from utils.checkpoints.folder import (
    load_sharded,
    read_contents,
    read_meta,
    read_sharded,
)
from utils.distributed import World
from utils.training.run_folder import RunFolder

NAME = "model.weight"
TENSORS = {
    NAME: torch.arange(12.0).view(3, 4),
    "model.bias": torch.ones(3),
    "ema.step": torch.tensor(7),
}


class Hostile:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def mark(tmp_path) -> Path:
    return tmp_path / "hacked"


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "0000001"
    dcp.save(TENSORS, checkpoint_id=path, no_dist=True)
    update_meta(path, {})
    return path


def update_meta(folder: Path, facts: dict) -> None:
    """Make ``meta.json`` agree with the files, as an attacker would."""
    files = {p.name: p.stat().st_size for p in folder.iterdir() if p.name != "meta.json"}
    (folder / "meta.json").write_text(json.dumps(facts | {"files": files}))


def convert(source: Path, folder: Path) -> None:
    """Write a checkpoint of today as earlier versions did."""
    dcp.save(read_sharded(source, ""), checkpoint_id=folder, no_dist=True)
    update_meta(folder, read_meta(source) | {"sha256": {}})


def test_an_old_folder_is_read_and_said_to_be_old(tmp_path):
    run = RunFolder(World(0, 1, torch.device("cpu")), tmp_path, (tmp_path,), 9, 0)
    run.save(3, small_state(3.0), {"run": {}})
    run.wait()
    expected = read_sharded(tmp_path / "0000003", "")
    (tmp_path / "0000003").rename(tmp_path / "new")
    convert(tmp_path / "new", tmp_path / "0000003")
    assert same_tensors(read_sharded(tmp_path / "0000003", ""), expected)
    state = small_state(0.0)
    assert run.resume(state, {}) == 3 and state.model.weight[0, 0].item() == 3.0
    (note,) = run.notes
    assert "0000003 has the format of an earlier version, which holds a pickle" in note


def write_contents(folder: Path, metadata: Metadata) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    facts = json.loads((folder / "meta.json").read_text())
    update_meta(folder, facts)


def append(folder: Path, payload: bytes) -> _StorageInfo:
    """Add bytes to the checkpoint's file of tensors; their place."""
    (shard,) = folder.glob("*.distcp")
    offset = shard.stat().st_size
    with open(shard, "ab") as f:
        f.write(payload)
    return _StorageInfo(shard.name, offset, len(payload))


def contents_of(folder: Path) -> Metadata:
    return pickle.loads((folder / ".metadata").read_bytes())


def as_bytes(folder: Path, metadata: Metadata, name: str, mark: Path) -> None:
    """An entry read by a full unpickler, with the size and type of the tensor it stands for."""
    tensor = metadata.state_dict_metadata[name]
    entry = BytesStorageMetadata()
    vars(entry).update(size=tensor.size, properties=tensor.properties, chunks=tensor.chunks)
    metadata.state_dict_metadata[name] = entry
    metadata.storage_data[MetadataIndex(name)] = append(folder, pickle.dumps(Hostile(mark)))


def as_tensor(folder: Path, metadata: Metadata, name: str, mark: Path) -> None:
    """A tensor's entry, but where its bytes should be stands a pickle."""
    index = MetadataIndex(name, [0] * len(metadata.state_dict_metadata[name].size))
    metadata.storage_data[index] = append(folder, pickle.dumps(Hostile(mark)) + bytes(1000))


def as_archive(folder: Path, metadata: Metadata, name: str, mark: Path) -> None:
    """The same in torch's own format, and one of the transforms that torch applies on the way."""
    torch.save(Hostile(mark), folder / "a.pt")
    payload = (folder / "a.pt").read_bytes()
    (folder / "a.pt").unlink()
    index = MetadataIndex(name, [0] * len(metadata.state_dict_metadata[name].size))
    metadata.storage_data[index] = append(folder, payload)
    metadata.storage_data[index].transform_descriptors = ["zstd"]


@pytest.mark.parametrize("plant, message", [
    (
        as_bytes,
        "is not a readable checkpoint folder: model.weight is a BytesStorageMetadata, not "
        "a TensorStorageMetadata",
    ),
    (as_tensor, "cannot be read: bytes in place of a tensor are not a tensor"),
    (as_archive, "cannot be read: bytes in place of a tensor are not a tensor"),
])  # fmt: skip
def test_bytes_in_place_of_a_tensor_never_run(folder, mark, plant, message):
    metadata = contents_of(folder)
    plant(folder, metadata, NAME, mark)
    write_contents(folder, metadata)
    assert read_meta(folder)
    with pytest.raises(ValueError, match=re.escape(f"{folder} {message}")):
        read_sharded(folder, "model.")
    with pytest.raises(ValueError, match=re.escape(f"{folder} {message}")):
        load_sharded(folder, {NAME: torch.zeros(3, 4)})
    assert not mark.exists()


def test_commands_refuse_a_folder_that_would_run_code(work, trained, tmp_path, mark):
    folder = tmp_path / "0000008"
    convert(trained.parent / "0000008", folder)
    metadata = contents_of(folder)
    as_bytes(folder, metadata, "model.norm.weight", mark)
    write_contents(folder, metadata)
    export = ("--checkpoint", folder, "--output", tmp_path / "a.pt")
    refused = [
        run_command("python3", "scripts/export_checkpoint.py", *export, check=False),
        train(work, tmp_path / "out", "--gpt-resume", folder, check=False),
    ]
    for done in refused:
        (line,) = [x for x in done.stderr.splitlines() if x.startswith("error")]
        assert (
            done.returncode == 2
            and "0000008 is not a readable checkpoint folder: model.norm.weight is a " in line
        )
        assert "Traceback" not in done.stderr
    assert not mark.exists() and not (tmp_path / "a.pt").exists()


def test_contents_that_change_after_they_were_approved_are_not_read_again(
    folder, mark, monkeypatch
):
    read = old_folder._read_metadata

    def swap(path: Path) -> Metadata:
        approved = read(path)
        (path / ".metadata").write_bytes(pickle.dumps(Hostile(mark)))
        return approved

    monkeypatch.setattr(old_folder, "_read_metadata", swap)
    assert same_tensors(read_sharded(folder, ""), TENSORS)
    assert not mark.exists()


def test_a_rank_s_own_contents_do_not_serve_in_place_of_the_whole(folder, mark):
    """torch falls back to a file of each rank where the one of all is missing, and unpickles it."""
    (folder / ".metadata").unlink()
    (folder / "__0.metadata").write_bytes(pickle.dumps(Hostile(mark)))
    with pytest.raises(ValueError, match="is not a readable checkpoint folder: .*No such file"):
        load_sharded(folder, {NAME: torch.zeros(3, 4)})
    assert not mark.exists()


@pytest.mark.parametrize("name", ["os system", "builtins eval", "torch load", "pathlib os.system"])
def test_contents_that_name_other_classes_are_refused(folder, name):
    hostile = f"c{name}\n(S'true'\ntR.".replace(" ", "\n", 1).encode()
    (folder / ".metadata").write_bytes(hostile)
    with pytest.raises(ValueError, match=f"it names {name.replace(' ', '.')}"):
        read_contents(folder)


def test_contents_cannot_change_torch_s_classes(folder):
    """A pickle may set attributes of what it names; a later reader here would meet them."""
    module = TensorStorageMetadata.__module__
    state = b"(N}S'chunks'\nS'poison'\nst"  # (None, {"chunks": "poison"}): set on the class itself
    (folder / ".metadata").write_bytes(
        f"c{module}\nTensorStorageMetadata\n".encode() + state + b"b."
    )
    with pytest.raises(ValueError, match="is not a readable checkpoint folder"):
        read_contents(folder)
    assert not hasattr(TensorStorageMetadata, "chunks")


def lie(**values: object):
    def edit(folder: Path, metadata: Metadata) -> None:
        index = MetadataIndex(NAME, (0, 0))
        place = {**vars(metadata.storage_data[index]), **values}
        metadata.storage_data[index] = _StorageInfo(**place)

    return edit


def escape_by_link(folder: Path, metadata: Metadata) -> None:
    (folder / "link.distcp").symlink_to(folder.parent / "secret")
    lie(relative_path="link.distcp", offset=0)(folder, metadata)


def larger_tensor(folder: Path, metadata: Metadata) -> None:
    metadata.state_dict_metadata[NAME].size = torch.Size((1 << 20, 1 << 20))


def larger_chunk(folder: Path, metadata: Metadata) -> None:
    metadata.state_dict_metadata[NAME].chunks[0].sizes = torch.Size((1 << 20, 4))


def claims_of_both(folder: Path, metadata: Metadata) -> None:
    larger_chunk(folder, metadata)
    metadata.state_dict_metadata[NAME].size = torch.Size((1 << 20, 4))


def no_numbers(folder: Path, metadata: Metadata) -> None:
    metadata.state_dict_metadata[NAME].size = (3, True)


def no_type(folder: Path, metadata: Metadata) -> None:
    metadata.state_dict_metadata[NAME].properties.dtype = "float32"


OUTSIDE = "which is not a file of the folder"


@pytest.mark.parametrize("edit, message", [
    (lie(relative_path="../secret"), f"model.weight lies in '../secret', {OUTSIDE}"),
    (lie(relative_path="/etc/passwd"), f"model.weight lies in '/etc/passwd', {OUTSIDE}"),
    (escape_by_link, f"model.weight lies in 'link.distcp', {OUTSIDE}"),
    (lie(offset=-1), "model.weight lies at -1, "),
    (lie(length=1 << 40), f"model.weight lies at 0, {1 << 40} bytes, outside of __0_0.distcp"),
    (lie(length=3), "model.weight takes fewer than its 48 bytes"),
    (lie(offset="0"), "model.weight lies at '0', "),
    (larger_tensor, "the chunks of model.weight are not the whole of it"),
    (larger_chunk, "a chunk of model.weight reaches out of it"),
    (claims_of_both, "model.weight takes fewer than its"),
    (no_numbers, "(3, True) is not a tuple of sizes"),
    (no_type, "model.weight has no type"),
])  # fmt: skip
def test_contents_that_lie_are_refused(folder, edit, message):
    (folder.parent / "secret").write_bytes(bytes(10_000))
    metadata = contents_of(folder)
    edit(folder, metadata)
    write_contents(folder, metadata)
    with pytest.raises(
        ValueError, match=re.escape(f"{folder} is not a readable checkpoint folder: ") + ".*"
    ) as error:
        read_contents(folder)
    assert message in str(error.value) and "\n" not in str(error.value)
