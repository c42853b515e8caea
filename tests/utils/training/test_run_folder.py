"""Folders of training runs: saved, resumed, pruned, copied, exported."""

import argparse
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers import same_tensors, small_state, take_step
from utils.checkpoints.weights_file import export_checkpoint, find_state_dict, load_checkpoint
from utils.distributed import World
from utils.training.run_folder import RunFolder

CPU = torch.device("cpu")


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
    shard = next((place / "0000006").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    (place / "0000005" / "meta.json").unlink()
    state = small_state(0.0)
    assert folder.resume(state, {}) == 3
    assert state.model.weight[0, 0].item() == 3.0
    first, second = folder.notes
    assert (
        "0000006 is damaged: 00000-of-00001.safetensors has 100 bytes, expected" in first
        and "an older one is taken" in first
    )
    assert "0000005 is not a whole checkpoint: meta.json is missing" in second
    folder.save(6, small_state(6.5), {"run": {}})  # made again, it takes the damaged one's place
    folder.wait()
    assert folder.resume(state, {}) == 6 and state.model.weight[0, 0].item() == 6.5


def change_a_byte(checkpoint: Path) -> None:
    """Change a tensor's byte: the size stays."""
    (shard,) = checkpoint.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def test_changed_bytes_are_found_and_the_checkpoint_before_is_taken(tmp_path):
    folder = run_folder(tmp_path, keep_last=1, no_local_save=True)
    folder.make()
    folder.save(9, small_state(9.0), {"run": {}})
    change_a_byte(folder.wait())
    place = folder.checkpoint_folders[0]
    shutil.copytree(place / "0000009", tmp_path / "0000009")
    assert folder.resume(small_state(0.0), {}) == 0
    (note,) = folder.notes
    assert "0000009 is damaged: the bytes of 00000-of-00001.safetensors have changed; an" in note
    for step in (3, 5):  # not pruned for the damaged one's sake
        folder.save(step, small_state(float(step)), {"run": {}})
        assert folder.wait().name == f"{step:07d}"
    again = run_folder(tmp_path, keep_last=1, no_local_save=True)
    assert again.resume(small_state(0.0), {}) == 5
    with pytest.raises(ValueError, match="0000009 is damaged: the bytes of"):
        run_folder(tmp_path / "new").resume(small_state(0.0), {}, tmp_path / "0000009")


def test_a_damaged_checkpoint_is_not_copied_to_the_other_place(tmp_path):
    folder = run_folder(tmp_path)
    folder.make()
    for step in (3, 5):
        folder.save(step, small_state(float(step)), {"run": {}})
        folder.wait()
    local, cloud = folder.checkpoint_folders
    change_a_byte(local / "0000005")
    shutil.rmtree(cloud)
    again = run_folder(tmp_path)
    again.make()
    assert [p.name for p in cloud.iterdir()] == ["0000003"]
    assert again.resume(small_state(0.0), {}) == 3 and "0000005 is damaged" in again.notes[0]


def test_changed_facts_are_found(tmp_path):
    folder = run_folder(tmp_path, no_local_save=True)
    folder.make()
    folder.save(3, small_state(3.0), {"run": {}})
    meta = folder.wait() / "meta.json"
    meta.write_text(meta.read_text().replace('"steps": 3', '"steps": 4'))
    assert folder.resume(small_state(0.0), {}) == 0 and "its bytes have changed" in folder.notes[0]


def test_old_checkpoints_are_removed(tmp_path):
    folder = run_folder(tmp_path, keep_last=2, keep_every=4)
    folder.make()
    for step in range(1, 10):
        folder.save(step, small_state(0.0), {"run": {}})
    folder.wait()
    for place in folder.checkpoint_folders:
        assert sorted(p.name for p in place.iterdir()) == ["0000004", "0000008", "0000009"]


def test_what_a_killed_run_had_no_time_to_remove_is_removed_by_the_next(tmp_path):
    folder = run_folder(tmp_path)
    folder.make()
    for step in (3, 5):
        folder.save(step, small_state(float(step)), {"run": {}})
    folder.wait()
    again = run_folder(tmp_path, keep_last=1)
    assert again.resume(small_state(0.0), {}) == 5
    again.make()
    for place in again.checkpoint_folders:
        assert [p.name for p in place.iterdir()] == ["0000005"]


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
