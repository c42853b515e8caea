"""Cached codes: shards, readers of both layouts, damage."""

import json
import os
import resource
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from dataset.codes import MixedCodes, open_codes
from dataset.shards import (
    finish_codes,
    shard_path,
    start_codes,
    write_shard,
)
from tests.helpers import make_plan, write_all, write_published_layout
from utils.records import read_sealed, write_sealed


@pytest.mark.parametrize("codebook_size", [70, 100_000])
def test_round_trip_and_gather(tmp_path, codebook_size):
    plan = make_plan(codebook_size=codebook_size)
    codes, labels = write_all(tmp_path, plan)
    reader = open_codes(tmp_path)
    assert (len(reader), reader.num_crops, reader.num_tokens, reader.num_classes) == (10, 2, 4, 3)
    assert np.array_equal(reader.labels, labels)
    images, crops = np.array([9, 0, 4, 3, 9, 7]), np.array([1, 0, 1, 1, 0, 0])
    assert np.array_equal(reader.gather(images, crops), codes[images, crops])
    loaded, batch_labels = reader.batch(images, crops)
    assert np.array_equal(loaded, codes[images, crops]) and np.array_equal(
        batch_labels, labels[images]
    )


def test_published_layout_reads_the_same(tmp_path):
    codes, labels = write_published_layout(tmp_path)
    ours, published = open_codes(tmp_path / "ours"), open_codes(tmp_path)
    images, crops = np.array([9, 0, 4]), np.array([1, 0, 1])
    assert np.array_equal(published.gather(images, crops), ours.gather(images, crops))
    assert np.array_equal(published.labels, labels)


def test_labels_of_the_published_layout_may_differ_in_type(tmp_path):
    """Their headers are compared instead of parsed; a damaged one is named."""
    labels = write_published_layout(tmp_path)[1]
    path = tmp_path / "imagenet384_labels" / "4.npy"
    np.save(path, labels[4:5].astype(np.uint8))
    assert open_codes(tmp_path).labels.tolist() == labels.tolist()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"4\.npy is missing or damaged"):
        open_codes(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"4\.npy is missing or damaged"):
        open_codes(tmp_path)


def test_too_many_shards_to_map_is_no_damage(tmp_path, monkeypatch):
    """Over vm.max_map_count; "delete it and extract again" would destroy good work."""
    write_all(tmp_path, make_plan())

    def from_file(*_, **__):
        raise RuntimeError("unable to mmap 520 bytes from file: Cannot allocate memory (12)")

    monkeypatch.setattr(torch, "from_file", from_file)
    with pytest.raises(ValueError, match=r"00000.npz cannot be mapped.*vm.max_map_count") as error:
        open_codes(tmp_path)
    assert "delete" not in str(error.value)


def test_a_shard_takes_one_map(tmp_path, monkeypatch):
    """With two, half as many shards can be opened."""
    write_all(tmp_path, make_plan())
    maps, from_file = [], torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *a, **k: maps.append(a) or from_file(*a, **k))
    open_codes(tmp_path)
    assert len(maps) == 3


def test_unfinished_empty_and_missing_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        open_codes(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no codes"):
        open_codes(tmp_path)
    start_codes(tmp_path, make_plan())
    with pytest.raises(ValueError, match="is not complete"):
        open_codes(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "missing", "wrong shape", "compressed"])
def test_damaged_shard_is_named(tmp_path, damage):
    write_all(tmp_path, make_plan())
    path = shard_path(tmp_path, 1)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "missing":
        path.unlink()
    elif damage == "wrong shape":
        np.savez(
            path,
            codes=np.zeros((3, 2, 4), np.uint16),
            labels=np.zeros(3, int),
            index=np.zeros(3, int),
        )
    else:
        np.savez_compressed(
            path,
            codes=np.zeros((4, 2, 4), np.uint16),
            labels=np.zeros(4, int),
            index=np.zeros(4, int),
        )
    with pytest.raises(ValueError, match=r"00001\.npz"):
        open_codes(tmp_path)


def test_meta_cannot_lead_out_of_the_folder(tmp_path):
    """A shard's name in meta.json is taken as a name, never as a path."""
    write_all(tmp_path / "codes", make_plan())
    (tmp_path / "outside.npz").write_bytes(shard_path(tmp_path / "codes", 1).read_bytes())
    meta = read_sealed(tmp_path / "codes" / "meta.json")
    meta["shards"][1]["file"] = "../../outside.npz"
    write_sealed(tmp_path / "codes" / "meta.json", meta)
    with pytest.raises(ValueError, match="codes/shards/outside.npz is missing"):
        open_codes(tmp_path / "codes")


def test_threads_may_share_a_reader(tmp_path):
    codes, _ = write_all(tmp_path, make_plan(num_images=64))
    reader, rng = open_codes(tmp_path), np.random.default_rng(1)
    requests = [(rng.integers(64, size=50), rng.integers(2, size=50)) for _ in range(40)]
    with ThreadPoolExecutor(8) as pool:
        for (images, crops), got in zip(
            requests, pool.map(lambda r: reader.gather(*r), requests), strict=True
        ):
            assert np.array_equal(got, codes[images, crops])


def test_more_shards_than_open_files(tmp_path):
    """numpy.memmap keeps a descriptor per map: ImageNet's 1,252 shards exceed a limit of 1,024."""
    codes, _ = write_all(tmp_path, make_plan(num_images=200, shard_size=1))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    # other tests of this process may have files open
    highest = max(int(name) for name in os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 60, before[1]))
    try:
        reader = open_codes(tmp_path)
        assert np.array_equal(reader.gather(np.arange(200), np.zeros(200, int)), codes[:, 0])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_skipped_images_never_misalign(tmp_path):
    """Images 2, 3 and all of shard 1 are unreadable: the others keep their codes and labels."""
    plan = make_plan()
    rng = np.random.default_rng(0)
    codes, labels = rng.integers(0, 70, (10, 2, 4)), np.arange(10) % 3
    start_codes(tmp_path, plan)
    for shard, good in enumerate([[0, 1], [], [8, 9]]):
        bad = [(i, f"reason {i}") for i in plan.shard_images(shard) if i not in good]
        good = np.array(good, np.int64)
        write_shard(tmp_path, plan, shard, codes[good], labels[good], good, bad)
    meta = finish_codes(tmp_path, plan, [f"image {i}" for i in range(10)])
    assert (meta["num_coded_images"], meta["num_skipped_images"]) == (4, 6)
    skipped = json.loads((tmp_path / "skipped.json").read_text())
    assert skipped[0] == {"index": 2, "path": "image 2", "reason": "reason 2"}
    reader = open_codes(tmp_path)
    assert np.array_equal(reader.gather(np.arange(4), np.ones(4, int)), codes[[0, 1, 8, 9], 1])
    assert reader.labels.tolist() == labels[[0, 1, 8, 9]].tolist()


def test_mixed_sets(tmp_path):
    first, labels = write_all(tmp_path / "a", make_plan())
    plan = make_plan(crops=["x", "y", "z"], crop_range=1.05)
    second = np.random.default_rng(5).integers(0, 70, (10, 3, 4))
    start_codes(tmp_path / "b", plan)
    for shard in range(plan.num_shards):
        index = np.array(plan.shard_images(shard))
        write_shard(tmp_path / "b", plan, shard, second[index], labels[index], index)
    finish_codes(tmp_path / "b", plan, [""] * 10)
    mixed = MixedCodes(open_codes(tmp_path / "a"), open_codes(tmp_path / "b"), weight=0.25)
    images, crops = np.array([0, 5, 5, 9, 2]), np.array([1, 2, 0, 4, 3])
    expected = np.concatenate([first, second], axis=1)[images, crops]
    assert np.array_equal(mixed.gather(images, crops), expected)
    assert mixed.crop_weights == pytest.approx([0.375, 0.375, 0.25 / 3, 0.25 / 3, 0.25 / 3])
    write_all(tmp_path / "c", make_plan(tokenizer_sha256="other"))
    with pytest.raises(ValueError, match="--mix-code-path: its tokenizer_sha256 differs"):
        MixedCodes(open_codes(tmp_path / "a"), open_codes(tmp_path / "c"), 0.5)
    write_all(tmp_path / "d", make_plan(num_images=9))
    with pytest.raises(ValueError, match="other images"):
        MixedCodes(open_codes(tmp_path / "a"), open_codes(tmp_path / "d"), 0.5)


@pytest.mark.parametrize("content", ["", "[]", "{}", "not json"])
def test_damaged_meta_is_named(tmp_path, content):
    write_all(tmp_path, make_plan())
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(ValueError, match=r"meta\.json(:| is)"):
        open_codes(tmp_path)
