"""Cached codes: shards, readers of both layouts, damage; epochs and batches."""

import json

import numpy as np
import pytest

from dataset.codes import CodesPlan, finish_codes, open_codes, shard_path, start_codes, write_shard
from dataset.epochs import EpochOrder


def make_plan(**changes) -> CodesPlan:
    base = dict(classes=["a", "b", "c"], num_images=10, source_sha256="s", image_size=8, grid=[2, 2])
    base |= dict(crops=["center", "center_of_flipped"], crop_range=1.0, codebook_size=70, tokenizer="VQ-4")
    base |= dict(tokenizer_sha256="t", precision="none", shard_size=4)
    return CodesPlan(**base | changes)


def write_all(folder, plan: CodesPlan) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, plan.codebook_size, (plan.num_images, len(plan.crops), plan.num_tokens))
    labels = np.arange(plan.num_images) % 3
    start_codes(folder, plan)
    for shard in range(plan.num_shards):
        index = np.array(plan.shard_images(shard))
        write_shard(folder, plan, shard, codes[index], labels[index], index)
    finish_codes(folder, plan)
    return codes, labels


@pytest.mark.parametrize("codebook_size", [70, 100_000])
def test_round_trip_and_gather(tmp_path, codebook_size):
    plan = make_plan(codebook_size=codebook_size)
    codes, labels = write_all(tmp_path, plan)
    reader = open_codes(tmp_path)
    assert (len(reader), reader.num_crops, reader.num_tokens, reader.num_classes) == (10, 2, 4, 3)
    assert np.array_equal(reader.labels, labels)
    images, crops = np.array([9, 0, 4, 3, 9, 7]), np.array([1, 0, 1, 1, 0, 0])
    assert np.array_equal(reader.gather(images, crops), codes[images, crops])


def test_shards_are_small_and_plain(tmp_path):
    """Two bytes a code, and any numpy reads them."""
    codes, _ = write_all(tmp_path, make_plan())
    with np.load(shard_path(tmp_path, 1), allow_pickle=False) as shard:
        assert shard["codes"].dtype == np.uint16
        assert np.array_equal(shard["codes"], codes[4:8])
        assert shard["index"].tolist() == [4, 5, 6, 7]


def test_published_layout_reads_the_same(tmp_path):
    ours, published = tmp_path / "ours", tmp_path / "published"
    codes, labels = write_all(ours, make_plan())
    for kind, values in (("codes", codes[:, None]), ("labels", labels[:, None])):
        (published / f"imagenet384_{kind}").mkdir(parents=True)
        for i, value in enumerate(values):
            np.save(published / f"imagenet384_{kind}" / f"{i}.npy", value)
    images, crops = np.array([9, 0, 4]), np.array([1, 0, 1])
    assert np.array_equal(open_codes(published).gather(images, crops), open_codes(ours).gather(images, crops))
    assert np.array_equal(open_codes(published).labels, labels)


def test_another_plan_in_the_same_folder_is_refused(tmp_path):
    start_codes(tmp_path, make_plan())
    start_codes(tmp_path, make_plan())
    with pytest.raises(ValueError, match="tokenizer_sha256: t there, other now"):
        start_codes(tmp_path, make_plan(tokenizer_sha256="other"))


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
        np.savez(path, codes=np.zeros((3, 2, 4), np.uint16), labels=np.zeros(3, int), index=np.zeros(3, int))
    else:
        np.savez_compressed(path, codes=np.zeros((4, 2, 4), np.uint16), labels=np.zeros(4, int), index=np.zeros(4, int))
    with pytest.raises(ValueError, match=r"00001\.npz"):
        open_codes(tmp_path)


def test_meta_cannot_lead_out_of_the_folder(tmp_path):
    """A shard's name in meta.json is taken as a name, never as a path."""
    write_all(tmp_path / "codes", make_plan())
    (tmp_path / "outside.npz").write_bytes(shard_path(tmp_path / "codes", 1).read_bytes())
    meta = json.loads((tmp_path / "codes" / "meta.json").read_text())
    meta["shards"][1]["file"] = "../../outside.npz"
    (tmp_path / "codes" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="codes/shards/outside.npz is missing"):
        open_codes(tmp_path / "codes")


def test_every_epoch_sees_every_item_once_in_another_order():
    order = EpochOrder(length=103, batch=10, seed=0)
    epochs = [np.concatenate([order.indices(10 * e + i)[1] for i in range(10)]) for e in range(2)]
    for seen in epochs:
        assert len(set(seen)) == 100
    assert not np.array_equal(*epochs)
    assert [order.indices(s)[0] for s in (9, 10, 29)] == [0, 1, 2]


def test_any_number_of_ranks_sees_the_same_global_batches():
    order = EpochOrder(length=50, batch=12, seed=3)
    for size in (1, 2, 3, 4):
        parts = [list(order.rank_keys(2, 6, rank, size)) for rank in range(size)]
        for i, step in enumerate(range(2, 6)):
            together = [key for part in parts for key in part[i]]
            epoch, indices = order.indices(step)
            assert together == [(index, epoch) for index in indices]


def test_batch_larger_than_the_data_is_named():
    with pytest.raises(ValueError, match="--global-batch-size 60 is larger than the data set, 50 items"):
        EpochOrder(50, 60, 0)
