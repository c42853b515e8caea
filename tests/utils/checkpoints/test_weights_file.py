"""Weights in one file: released formats, damaged and untrusted files, misfits, hashes."""

import argparse
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import same_tensors
from utils.checkpoints import weights_file
from utils.checkpoints.folder import save_sharded, write_meta
from utils.checkpoints.weights_file import (
    HASH,
    export_checkpoint,
    export_to_hub_form,
    find_state_dict,
    load_checkpoint,
    load_strictly,
    require_facts,
    save_checkpoint,
    state_sha256,
)


@pytest.mark.parametrize("key", ["model", "module", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_released_formats(tmp_path, key, prefix):
    state = {prefix + "weight": torch.ones(2)}
    checkpoint = {key: state, "steps": 3, "args": argparse.Namespace(lr=1.0)} if key else state
    torch.save(checkpoint, tmp_path / "a.pt")
    loaded = load_checkpoint(tmp_path / "a.pt", "--gpt-ckpt")
    found = find_state_dict(loaded, ("model", "module", "state_dict"), "a.pt")
    assert list(found) == ["weight"] and torch.equal(found["weight"], torch.ones(2))


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("legacy", [True, False])
def test_checkpoint_cannot_run_code(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Hostile()}, "bad.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"--gpt-ckpt: .*bad\.pt is not a readable checkpoint"):
        load_checkpoint("bad.pt", "--gpt-ckpt")
    assert not os.path.exists("hacked")


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps([1, 2])])
def test_no_checkpoint_at_all(tmp_path, content):
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.pt"):
        load_checkpoint(tmp_path / "bad.pt", "--vq-ckpt")
    with pytest.raises(ValueError, match="--vq-ckpt: .*missing.pt does not exist"):
        load_checkpoint(tmp_path / "missing.pt", "--vq-ckpt")


def test_truncated_checkpoint(tmp_path):
    torch.save({"model": {"w": torch.randn(1000)}}, tmp_path / "a.pt")
    content = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "a.pt", "--gpt-ckpt")


def test_misfits_are_named():
    model = torch.nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"1 missing \(first: bias\), 1 unknown \(first: extra\)"):
        load_strictly(
            model, {"weight": torch.ones(3, 2), "extra": torch.ones(1)}, "x.pt", "the model"
        )
    with pytest.raises(ValueError, match=r"weight is \(5, 2\), expected \(3, 2\)"):
        load_strictly(
            model, {"weight": torch.ones(5, 2), "bias": torch.ones(3)}, "x.pt", "the model"
        )


def test_weights_hash_tells_weights_apart():
    a, b = {"w": torch.zeros(2, 3)}, {"w": torch.zeros(2, 3)}
    assert state_sha256(a) == state_sha256(b)
    for other in (
        {"v": a["w"]},
        {"w": torch.zeros(3, 2)},
        {"w": torch.tensor([[0, 0, 0], [0, 0, 1.0]])},
    ):
        assert state_sha256(other) != state_sha256(a)


def test_weights_of_other_programs_are_read_by_their_config(tmp_path):
    """Another program's model.safetensors has no facts in its header: those of config.json hold."""
    folder = tmp_path / "other"
    folder.mkdir()
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"steps": 3}))
    loaded = load_checkpoint(folder, "--gpt-ckpt")
    assert loaded["steps"] == 3 and torch.equal(loaded["model"]["w"], torch.ones(2))
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="--gpt-ckpt: .*other.* is not a readable checkpoint"):
        load_checkpoint(folder, "--gpt-ckpt")


FACTS = {"config": {"dim": 2, "mult": (1, 2)}, "steps": 3, "classes": ["a"], "git": None}


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "hub"])
def test_changed_bytes_of_exported_files_are_found(tmp_path, name):
    """Every kind of place: tensors, facts, the archive's own; what loads is what was saved."""
    folder, state = tmp_path / "0000003", {"w": torch.randn(20, 30), "b": torch.zeros(())}
    tensors = {f"{part}.{k}": v for part in ("model", "ema") for k, v in state.items()}
    write_meta(folder, FACTS | save_sharded(folder, tensors, None).result())
    if name == "hub":
        export_to_hub_form(folder, tmp_path / name)
        file = tmp_path / "hub" / "model.safetensors"
    else:
        export_checkpoint(folder, tmp_path / name, None if name == "a.pt" else False)
        file = tmp_path / name
    loaded = load_checkpoint(tmp_path / name, "--gpt-ckpt")
    assert HASH not in loaded and loaded["config"]["dim"] == 2
    assert same_tensors(loaded["model"], state)

    content, refused = file.read_bytes(), 0
    for position in range(0, len(content), len(content) // 60):
        changed = bytearray(content)
        changed[position] ^= 0x10
        file.write_bytes(changed)
        try:
            again = load_checkpoint(tmp_path / name, "--gpt-ckpt")
        except ValueError as error:
            assert str(error).startswith("--gpt-ckpt: ") and "\n" not in str(error)
            refused += 1
        else:  # padding, and fields of the archive that nobody reads
            assert same_tensors(again["model"], state) and again["config"] == loaded["config"]
    assert refused > 30


def test_files_without_a_hash_load_as_before(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}, "steps": 3}, tmp_path / "a.pt")
    assert load_checkpoint(tmp_path / "a.pt", "--gpt-ckpt")["steps"] == 3
    save_checkpoint({"w": torch.ones(2)}, tmp_path / "bare.pt")  # a bare state dict stays one
    assert torch.load(tmp_path / "bare.pt", weights_only=True).keys() == {"w"}


def test_a_damaged_checkpoint_is_not_exported(tmp_path):
    folder = tmp_path / "0000003"
    write_meta(folder, FACTS | save_sharded(folder, {"model.w": torch.ones(99)}, None).result())
    (file,) = folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="0000003 is damaged: the bytes of 00000-of-00001"):
        export_checkpoint(folder, tmp_path / "a.pt")
    assert not (tmp_path / "a.pt").exists()


def test_an_export_that_does_not_fit_says_how_much_room_there_is(tmp_path, monkeypatch):
    """torch.save says "unexpected pos 3159232 vs 3159184" of a full disk."""
    folder = tmp_path / "0000003"
    write_meta(folder, FACTS | save_sharded(folder, {"model.w": torch.ones(99)}, None).result())

    def full(*_: object) -> None:
        raise RuntimeError("unexpected pos")

    monkeypatch.setattr(weights_file, "save_checkpoint", full)
    with pytest.raises(ValueError, match=r"a\.pt could not be written \([0-9.,]+ [GK]iB free\)"):
        export_checkpoint(folder, tmp_path / "a.pt")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(1 << 40),  # a terabyte by one number
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, device="meta"),
        torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8),
    ],
)
def test_tensors_that_are_not_their_bytes_are_refused(tmp_path, tensor):
    """Hashing or copying the first asked for a terabyte of memory."""
    torch.save({"model": {"weight": tensor}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="weight is not a plain tensor"):
        load_checkpoint(tmp_path / "a.pt", "--gpt-ckpt")


@pytest.mark.parametrize("name", ["../../home/x", "/etc/x", "", ".ssh", "a b", "x" * 65])
def test_a_model_whose_name_leads_out_of_the_folder_is_refused(name):
    """Samples are named by it."""
    with pytest.raises(ValueError, match="gpt_model .* is not a name"):
        require_facts({"gpt_model": name}, "a.pt")
    require_facts({"gpt_model": "GPT-1B", "vq_model": "VQ-16"}, "a.pt")
