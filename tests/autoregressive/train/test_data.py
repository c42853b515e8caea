"""Batches of codes for training."""

import shutil

import numpy as np
import pytest
import torch

from autoregressive.train import data
from autoregressive.train.data import CodeBatches, check_shards
from dataset.codes import MixedCodes, open_codes
from dataset.shards import shard_path
from tests.helpers import digest, make_plan, write_all, write_published_layout
from utils.distributed import World


@pytest.mark.parametrize("weight, expected", [(0.0, range(10)), (1.0, range(10, 20))])
def test_mixing_weight_says_which_crops_are_drawn(weight, expected):
    """Both sets code every image with its crop's number, so a batch shows what was drawn."""

    class Numbered:
        labels, meta, num_crops, num_tokens, num_classes = np.zeros(64, int), {}, 10, 4, 1

        def __init__(self, first: int):
            self.first = first

        def __len__(self) -> int:
            return 64

        def gather(self, images: np.ndarray, crops: np.ndarray) -> np.ndarray:
            return np.repeat(crops[:, None] + self.first, 4, axis=1)

    alone = World(0, 1, torch.device("cpu"))
    batches = CodeBatches(
        MixedCodes(Numbered(0), Numbered(10), weight), vocab_size=20, batch=32, seed=0
    )
    drawn = {int(c) for step in range(20) for c in batches.rank_slice(step, alone)[0][:, 0]}
    assert drawn == set(expected)


def test_a_damaged_shard_is_found_at_the_start(tmp_path, monkeypatch):
    write_all(tmp_path, make_plan())
    alone = World(0, 1, torch.device("cpu"))
    codes = open_codes(tmp_path)
    check_shards(tmp_path, "--code-path", codes, alone)
    path = shard_path(tmp_path, 1)
    content = bytearray(path.read_bytes())
    content[content.index(codes.gather([4], [0]).astype(np.uint16).tobytes())] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr(data, "CHECKED_SHARDS", 9)
    with pytest.raises(ValueError, match=r"--code-path: .*00001.npz is damaged: its sha256 is not"):
        check_shards(tmp_path, "--code-path", codes, alone)


def test_a_start_looks_at_few_shards_and_at_all_in_time(tmp_path, monkeypatch):
    write_all(tmp_path, make_plan(num_images=40))
    seen: list[str] = []
    monkeypatch.setattr(data, "sha256_file", lambda path: seen.append(path) or digest(path))
    for _ in range(60):
        check_shards(tmp_path, "", open_codes(tmp_path), World(0, 1, torch.device("cpu")))
    assert len(seen) == 120 and len(set(seen)) == 10


def test_rank_0_reads_the_labels_of_the_published_layout_for_all(tmp_path):
    """At ImageNet's size a file per label takes a minute on every process."""
    folder = tmp_path / "codes"
    labels = write_published_layout(folder)[1]
    said = []

    class Rank(World):
        def broadcast(self, value):
            return said[0] if not self.is_main else said.insert(0, value) or value

    ranks = [Rank(r, 2, torch.device("cpu")) for r in range(2)]
    first = data.open_on_all(str(folder), "--code-path", ranks[0])
    shutil.rmtree(folder / "imagenet384_labels")
    second = data.open_on_all(str(folder), "--code-path", ranks[1])
    assert first.labels.tolist() == second.labels.tolist() == labels.tolist()
    assert np.array_equal(first.gather([3, 0], [1, 0]), second.gather([3, 0], [1, 0]))
    for rank in ranks:
        with pytest.raises(ValueError, match="--code-path: .* does not exist"):
            data.open_on_all(str(tmp_path / "nowhere"), "--code-path", rank)


@pytest.mark.parametrize("codes, labels", [(np.float32, np.int64), (np.uint16, np.float64)])
def test_shards_of_other_types_are_refused(tmp_path, codes, labels):
    write_all(tmp_path, make_plan())
    with np.load(shard_path(tmp_path, 0)) as arrays:
        content = dict(arrays)
    content |= {"codes": content["codes"].astype(codes), "labels": content["labels"].astype(labels)}
    np.savez(shard_path(tmp_path, 0), **content)
    with pytest.raises(ValueError, match="expected whole numbers; extract again"):
        open_codes(tmp_path)
