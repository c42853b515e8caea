"""Weights in one file: released formats, damaged and untrusted files, misfits, hashes."""

import argparse
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from utils.checkpoints.weights_file import (
    find_state_dict,
    load_checkpoint,
    load_strictly,
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
