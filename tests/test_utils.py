"""Files that appear whole, untrusted checkpoints, pixels, EMA, shared training helpers."""

import argparse
import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from utils.checkpoint import find_state_dict, load_checkpoint, load_strictly, newest_checkpoint, state_sha256
from utils.distributed import World
from utils.files import atomic_path
from utils.images import image_grid, to_uint8
from utils.logger import progress
from utils.samples import pack_chunks, write_chunk
from utils.training import Ema, RunFolder, TrainingState, make_adamw, seed_step, split_batch


def test_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(OSError, match="full"), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


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
    with pytest.raises(ValueError, match=r"--gpt-ckpt: .*bad\.pt is no readable checkpoint"):
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
    with pytest.raises(ValueError, match="no readable checkpoint"):
        load_checkpoint(tmp_path / "a.pt", "--gpt-ckpt")


def test_misfits_are_named():
    model = torch.nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"1 missing \(first: bias\), 1 unknown \(first: extra\)"):
        load_strictly(model, {"weight": torch.ones(3, 2), "extra": torch.ones(1)}, "x.pt", "the model")
    with pytest.raises(ValueError, match=r"weight is \(5, 2\), expected \(3, 2\)"):
        load_strictly(model, {"weight": torch.ones(5, 2), "bias": torch.ones(3)}, "x.pt", "the model")


def test_weights_hash_tells_weights_apart():
    a, b = {"w": torch.zeros(2, 3)}, {"w": torch.zeros(2, 3)}
    assert state_sha256(a) == state_sha256(b)
    for other in ({"v": a["w"]}, {"w": torch.zeros(3, 2)}, {"w": torch.tensor([[0, 0, 0], [0, 0, 1.0]])}):
        assert state_sha256(other) != state_sha256(a)


def test_newest_checkpoint_is_by_step_and_ignores_partial_files(tmp_path):
    for name in ("0000010.pt", "0000100.pt", "0000900.pt.tmp-12", "notes.txt"):
        (tmp_path / name).touch()
    assert newest_checkpoint(tmp_path, tmp_path / "nowhere").name == "0000100.pt"
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_pixels_are_golden(golden):
    file = golden("sampling.npz")
    pixels = to_uint8(torch.from_numpy(file["pixels_in"]), 64)
    assert np.array_equal(pixels.numpy(), file["pixels_uint8_64"])


def test_image_grid_places_images():
    pixels = np.arange(3, dtype=np.uint8)[:, None, None, None].repeat(2, 1).repeat(2, 2).repeat(3, 3)
    grid = image_grid(pixels, columns=2, padding=1)
    assert grid.shape == (7, 7, 3)
    assert grid[1:3, 4:6].max() == 1 and grid[4:6, 1:3].min() == 2 and grid[0].min() == 255


def test_packed_chunks_are_one_plain_npz(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    labels = np.arange(7)

    def pack(sizes, name):
        paths, first = [], 0
        for size in sizes:
            paths.append(tmp_path / f"{name}-{first}.npz")
            write_chunk(paths[-1], images[first : first + size], labels[first : first + size])
            first += size
        bar = progress(World(1, 2, torch.device("cpu")), "", len(paths))
        pack_chunks(tmp_path / f"{name}.npz", paths, bar)
        return (tmp_path / f"{name}.npz").read_bytes()

    content = pack([3, 3, 1], "a")
    assert content == pack([7], "b")
    with np.load(io.BytesIO(content), allow_pickle=False) as npz:
        assert np.array_equal(npz["arr_0"], images) and np.array_equal(npz["labels"], labels)
    assert zipfile.ZipFile(io.BytesIO(content)).testzip() is None


def test_ema_closed_form():
    """After k steps at a constant new value: 1 - decay^k of the way."""
    model = torch.nn.Linear(1, 1)
    model.weight.data.fill_(0.0)
    ema = Ema(model, decay=0.9)
    model.weight.data.fill_(1.0)
    for step in range(1000, 1005):  # the decay has grown to its full value
        ema.update(model, step)
    assert ema.state_dict(model)["weight"].item() == pytest.approx(1 - 0.9**5, rel=1e-5)
    ema = Ema(model, decay=0.9999)
    model.weight.data.fill_(3.0)
    ema.update(model, 0)  # decay 0.1: the first weights fade at once
    assert ema.state_dict(model)["weight"].item() == pytest.approx(3 - 0.1 * 2, rel=1e-5)


def test_weight_decay_is_for_matrices():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    optimizer = make_adamw(model, 0.1, 0.5, (0.9, 0.95))
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for old, new in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old * (0.95 if old.ndim == 2 else 1.0))


def test_step_seeds_differ_by_step_and_rank():
    def draw(*key):
        seed_step(*key)
        return torch.rand(1).item()

    assert draw(0, 5, 1) == draw(0, 5, 1)
    assert len({draw(*k) for k in [(0, 5, 1), (0, 5, 0), (0, 6, 1), (1, 5, 1)]}) == 4


def test_batch_that_does_not_split_is_named():
    assert split_batch(64, 4, 2) == 8
    with pytest.raises(ValueError, match="--global-batch-size 10 does not split over 4 processes"):
        split_batch(10, 4, 1)


def small_state(value: float) -> TrainingState:
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(value)
    return TrainingState(model, make_adamw(model, 0.1, 0.0, (0.9, 0.95)), torch.amp.GradScaler(enabled=False), None)


def test_run_folders(tmp_path):
    alone, run = World(0, 1, torch.device("cpu")), {"epochs": 3}
    both = RunFolder.of(str(tmp_path / "results"), str(tmp_path / "cloud"), False, "run")
    both.make()
    assert both.resume(alone, small_state(0.0), run) == 0
    both.save(3, small_state(1.0).checkpoint(3, run=run))
    (tmp_path / "results/run/checkpoints/0000003.pt").unlink()
    state = small_state(0.0)
    assert both.resume(alone, state, run) == 3
    assert state.model.weight.item() == 1.0
    with pytest.raises(ValueError, match=r"0000003\.pt is of a run with another epochs \(epochs: 3 there, 4 now\)"):
        both.resume(alone, state, {"epochs": 4})
    (tmp_path / "cloud/run/checkpoints/0000004.pt").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"0000004\.pt .*delete it to resume from the checkpoint before it"):
        both.resume(alone, state, run)
    only_cloud = RunFolder.of(str(tmp_path / "results"), str(tmp_path / "cloud"), True, "run")
    assert only_cloud.folder == tmp_path / "cloud/run"
