"""Files that appear whole, untrusted checkpoints, pixels, EMA, shared training helpers."""

import argparse
import logging
import os
import pickle
import resource
import shutil
import signal
import time
import zipfile

import numpy as np
import pytest
import torch
from tqdm import tqdm

from tests.helpers import same_tensors, small_state, take_step
from utils.checkpoints.weights_file import (
    export_checkpoint,
    find_state_dict,
    load_checkpoint,
    load_strictly,
    state_sha256,
)
from utils.distributed import World
from utils.files import atomic_path
from utils.images import image_grid, to_uint8
from utils.logger import progress
from utils.npz import SampleFile
from utils.training.log import Window
from utils.training.options import split_batch
from utils.training.run import prefetch
from utils.training.run_folder import RunFolder
from utils.training.state import Ema, Guard, make_adamw, seed_step

CPU = torch.device("cpu")


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


def test_pixels_are_golden(golden):
    file = golden("sampling.npz")
    pixels = to_uint8(torch.from_numpy(file["pixels_in"]), 64)
    assert np.array_equal(pixels.numpy(), file["pixels_uint8_64"])


def test_image_grid_places_images():
    pixels = (
        np.arange(3, dtype=np.uint8)[:, None, None, None].repeat(2, 1).repeat(2, 2).repeat(3, 3)
    )
    grid = image_grid(pixels, columns=2, padding=1)
    assert grid.shape == (7, 7, 3)
    assert grid[1:3, 4:6].max() == 1 and grid[4:6, 1:3].min() == 2 and grid[0].min() == 255


def no_bar() -> tqdm:
    return progress(World(1, 2, CPU), "", 1)


@pytest.mark.parametrize("chunk", [1, 3, 7, 9])
def test_samples_written_in_any_order_are_one_plain_npz(tmp_path, chunk):
    """Against numpy's reader and zip's checksums; the bytes depend on images and labels alone."""
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)
    labels = np.arange(7)
    file = SampleFile(tmp_path / "a.npz", "f", images.shape, chunk)
    file.create()
    for c in np.random.default_rng(chunk).permutation(file.num_chunks).tolist():
        assert c in file.missing()
        file.write(c, images[file.images_of(c)])
    file.finish(labels, no_bar())
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert archive.testzip() is None and archive.namelist() == ["arr_0.npy", "labels.npy"]
        assert [i.file_size for i in archive.infolist()] == [
            128 + images.nbytes,
            128 + labels.nbytes,
        ]
    with np.load(tmp_path / "a.npz", allow_pickle=False) as npz:
        assert np.array_equal(npz["arr_0"], images) and np.array_equal(npz["labels"], labels)
    content = (tmp_path / "a.npz").read_bytes()
    other = SampleFile(tmp_path / "b.npz", "f", images.shape, 7)
    other.create()
    other.write(0, images)
    other.finish(labels, no_bar())
    assert (tmp_path / "b.npz").read_bytes() == content


def test_samples_go_on_where_they_were_stopped(tmp_path):
    """Also when stopped in the middle of the end of the file."""
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    for name, stopped in (("a", False), ("b", True)):
        SampleFile(tmp_path / f"{name}.npz", "f", images.shape, 2).create()
        for chunk in (2, 0, 1):
            file = SampleFile(tmp_path / f"{name}.npz", "f", images.shape, 2)
            file.create()
            file.write(chunk, images[file.images_of(chunk)])
        if stopped:
            with open(file.partial, "ab") as f:
                f.write(b"half of the table of contents")
        file.finish(np.arange(5), no_bar())
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "b.npz", allow_pickle=False) as npz:
        assert np.array_equal(npz["arr_0"], images)


def test_samples_that_do_not_fit_the_disk_are_refused_at_once(tmp_path):
    file = SampleFile(tmp_path / "a.npz", "f", (10**12, 256, 256, 3), 32)
    with pytest.raises(ValueError, match=r" GiB free, a.npz needs 183105468.8 GiB"):
        file.create()
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_no_number_changes_nothing(bad, fp16):
    """Weights, moments, step counts after good, bad, good steps are those of the good ones."""
    states = []
    for losses in ([1.0, 2.0], [1.0, bad, 2.0]):
        state = small_state(1.0, fp16=fp16)
        for step, loss in enumerate(losses):
            take_step(state, step, loss)
        states.append(state)
    ours, expected = (
        {k: v for k, v in s.tensors().items() if not k.startswith("ema")} for s in states[::-1]
    )
    assert all(torch.equal(ours[k], expected[k]) for k in expected)
    assert states[1].guard.skipped == 1 and states[1].guard.in_a_row == 0


def test_spikes_are_skipped_once_the_loss_has_settled():
    """Rule: above the running mean by the threshold, after 100 steps; before, only non-finite."""
    guard = Guard(CPU, spike=0.5, patience=3)
    norm = torch.ones(())
    assert not guard.should_skip(torch.tensor(1.0), norm) and not guard.should_skip(
        torch.tensor(99.0), norm
    )
    guard = Guard(CPU, spike=0.5, patience=3)
    losses = np.random.default_rng(0).normal(2.0, 0.05, 100).astype(np.float32)
    mean = 0.0
    for taken, loss in enumerate(losses):
        assert not guard.should_skip(torch.tensor(loss), norm)
        mean += (loss - mean) * max(0.01, 1 / (taken + 1))
    assert (
        guard.state[0].item()
        == pytest.approx(losses.mean(), abs=1e-5)
        == pytest.approx(mean, abs=1e-5)
    )
    assert not guard.should_skip(torch.tensor(mean + 0.45), norm)
    mean += 0.45 * 0.01
    for count in (1, 2, 3):
        assert guard.healthy and guard.should_skip(torch.tensor(mean + 0.55), norm)
        assert (guard.skipped, guard.in_a_row) == (count, count)
        assert guard.state[0].item() == pytest.approx(mean, abs=1e-5)
    assert not guard.healthy
    with pytest.raises(ValueError, match="the last 3 steps up to 103 were all skipped"):
        guard.check(103, 1e-4)
    assert not guard.should_skip(torch.tensor(mean), norm) and guard.in_a_row == 0
    guard.check(104, 1e-4)
    never = Guard(CPU, spike=0.0, patience=3)
    assert not any(never.should_skip(torch.tensor(x), norm) for x in [1.0] * 150 + [1e9])


def test_clipping_is_by_the_norm_over_all_parameters():
    """Adam's first step ignores a gradient's scale, so see its moment: 0.1 of the clipped one."""
    state = small_state(0.0)
    take_step(state, 0, 3.0, max_norm=1.0)
    moment = state.tensors()["optimizer.weight.exp_avg"]
    torch.testing.assert_close(moment, torch.full((1, 2), 0.1 * 2**-0.5), atol=1e-5, rtol=0)


def test_batches_made_ahead_come_in_order():
    made = []
    for step, value in prefetch(lambda step: made.append(step) or step**2, range(3, 8)):
        assert value == step**2
        assert max(made) <= step + 2
    assert made == [3, 4, 5, 6, 7]
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda step: 1 // step, range(2)))


def run_folder(
    tmp_path, keep_last: int = 9, keep_every: int = 0, no_local_save: bool = False
) -> RunFolder:
    args = argparse.Namespace(
        results_dir=str(tmp_path / "results"), cloud_save_path=str(tmp_path / "cloud")
    )
    args.no_local_save, args.keep_last, args.keep_every = no_local_save, keep_last, keep_every
    return RunFolder.of(args, World(0, 1, CPU), "run")


def test_run_folders_save_and_resume(tmp_path):
    run = {"epochs": 3}
    folder = run_folder(tmp_path)
    folder.make()
    assert folder.resume(small_state(0.0), run) == 0
    saved = small_state(1.0)
    for step in range(3):
        take_step(saved, step, 0.5)
    folder.save(3, saved, {"run": run})
    before = {k: v.clone() for k, v in saved.tensors().items()}
    take_step(saved, 3, 0.5)  # training goes on while the copy is written
    folder.wait()
    shutil.rmtree(tmp_path / "results/run/checkpoints/0000003")
    state = small_state(0.0)
    assert folder.resume(state, run) == 3
    assert same_tensors(state.tensors(), before)
    assert state.guard.state.tolist() == [0.5, 3.0, 0.0, 0.0]
    with pytest.raises(
        ValueError, match=r"0000003 is of a run with another epochs \(epochs: 3 there, 4 now\)"
    ):
        folder.resume(state, {"epochs": 4})
    assert run_folder(tmp_path, no_local_save=True).folder == tmp_path / "cloud/run"


def test_resuming_takes_the_newest_whole_checkpoint(tmp_path):
    """Half-written, truncated and lacking ones are passed over, and said so."""
    folder = run_folder(tmp_path, no_local_save=True)
    folder.make()
    for step in (3, 5, 6):
        folder.save(step, small_state(float(step)), {"run": {}})
    folder.wait()
    place = folder.checkpoint_folders[0]
    shutil.copytree(place / "0000006", place / "0000009.tmp")
    shard = next((place / "0000006").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:100])
    (place / "0000005" / "meta.json").unlink()
    state = small_state(0.0)
    assert folder.resume(state, {}) == 3
    assert state.model.weight[0, 0].item() == 3.0
    first, second = folder.notes
    assert (
        "0000006 is damaged: __0_0.distcp has 100 bytes, expected" in first
        and "an older one is taken" in first
    )
    assert "0000005 is not a whole checkpoint: meta.json is missing" in second
    folder.save(6, small_state(6.5), {"run": {}})  # made again, it takes the damaged one's place
    folder.wait()
    assert folder.resume(state, {}) == 6 and state.model.weight[0, 0].item() == 6.5


def test_old_checkpoints_are_removed(tmp_path):
    folder = run_folder(tmp_path, keep_last=2, keep_every=4)
    folder.make()
    for step in range(1, 10):
        folder.save(step, small_state(0.0), {"run": {}})
    folder.wait()
    for place in folder.checkpoint_folders:
        assert sorted(p.name for p in place.iterdir()) == ["0000004", "0000008", "0000009"]


def test_damaged_checkpoints_do_not_count_among_those_kept(tmp_path):
    """A newer one that is damaged was passed over; the one just saved must not be pruned for it."""
    folder = run_folder(tmp_path, keep_last=1, no_local_save=True)
    folder.make()
    folder.save(9, small_state(9.0), {"run": {}})
    (folder.wait() / "meta.json").unlink()
    for step in (3, 5):
        folder.save(step, small_state(float(step)), {"run": {}})
        assert folder.wait().name == f"{step:07d}"
    assert folder.resume(small_state(0.0), {}) == 5
    assert sorted(p.name for p in folder.checkpoint_folders[0].iterdir()) == ["0000005", "0000009"]


def test_a_place_that_lost_its_checkpoints_gets_them_again(tmp_path):
    folder = run_folder(tmp_path)
    folder.make()
    folder.save(3, small_state(3.0), {"run": {}})
    folder.wait()
    local, cloud = folder.checkpoint_folders
    shutil.rmtree(cloud)
    again = run_folder(tmp_path)
    assert again.resume(small_state(0.0), {}) == 3
    again.make()
    assert (cloud / "0000003" / "meta.json").read_bytes() == (
        local / "0000003" / "meta.json"
    ).read_bytes()
    again.finish(3, False, "safetensors", logging.getLogger("test"))
    assert (local / "0000003-ema.safetensors").exists() and (cloud / "0000003.safetensors").exists()


def test_an_export_of_an_earlier_run_is_replaced(tmp_path):
    folder = run_folder(tmp_path, no_local_save=True)
    folder.make()
    for value in (1.0, 2.0):
        folder.save(3, small_state(value), {"run": {}})
        folder.finish(3, False, "pt", logging.getLogger("test"))
        path = folder.checkpoint_folders[0] / "0000003.pt"
        assert load_checkpoint(path, "")["model"]["weight"][0, 0].item() == value
        os.utime(path, (0, 0))


def test_a_failed_write_leaves_the_checkpoints_before_it(tmp_path, monkeypatch):
    folder = run_folder(tmp_path)
    folder.make()
    folder.save(1, small_state(1.0), {"run": {}})
    folder.wait()

    def no_space(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.training.run_folder.shutil.copytree", no_space)
    folder.save(2, small_state(2.0), {"run": {}})
    with pytest.raises(ValueError, match="could not be written to .*No space left on device"):
        folder.wait()
    local, cloud = folder.checkpoint_folders
    assert [p.name for p in sorted(local.iterdir())] == ["0000001", "0000002"]
    assert [p.name for p in cloud.iterdir()] == ["0000001"]


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_exported_files_hold_the_weights_and_facts(tmp_path, suffix, ema):
    folder = run_folder(tmp_path, no_local_save=True)
    folder.make()
    state = small_state(1.0)
    for step in range(3):
        take_step(state, step, 0.5)
    folder.save(3, state, {"run": {}, "config": {"dim": 2}})
    export_checkpoint(folder.wait(), tmp_path / f"a{suffix}", ema)
    loaded = load_checkpoint(tmp_path / f"a{suffix}", "--gpt-ckpt")
    expected = state.ema.average["weight"] if ema else state.model.weight
    assert not torch.equal(state.ema.average["weight"], state.model.weight)
    assert torch.equal(find_state_dict(loaded, ("model",), "a")["weight"], expected)
    assert loaded["config"] == {"dim": 2} and loaded["steps"] == 3
    with pytest.raises(
        ValueError, match="--gpt-ckpt: .*0000003 is a training checkpoint; python3 scripts/export"
    ):
        load_checkpoint(tmp_path / "cloud/run/checkpoints/0000003", "--gpt-ckpt")


def test_speed_is_that_of_the_time_not_paused():
    window = Window(("loss",), CPU)
    for loss in (1.0, 3.0, float("nan"), 4.0):
        window.add({"loss": torch.tensor(loss)})
        time.sleep(0.05)
    with window.paused():
        time.sleep(1.0)
    figures = window.read(images=8)
    assert figures["loss"] == pytest.approx(8 / 3)  # the nan is left out
    assert 0.05 <= figures["seconds/step"] < 0.2
    assert figures["images/s"] == pytest.approx(8 / figures["seconds/step"])


def test_a_record_of_another_length_starts_samples_anew(tmp_path):
    """As a disk may leave it after a power cut: the full length, and anything in it."""
    file = SampleFile(tmp_path / "s.npz", "f", (5, 2, 2, 3), chunk=2)
    file.create()
    file.write(1, np.ones((2, 2, 2, 3), np.uint8))
    assert file.missing() == [0, 2]
    file.create()
    assert file.missing() == [0, 2]
    file.record.write_bytes(b"")
    file.create()
    assert file.missing() == [0, 1, 2]


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    file = SampleFile(tmp_path / "s.npz", "f", (4, 2, 2, 3), chunk=2)
    file.create()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, hard))
    try:
        with pytest.raises(ValueError, match="s.npz.f.partial cannot be written: File too large"):
            file.write(1, np.ones((2, 2, 2, 3), np.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.missing() == [0, 1]
