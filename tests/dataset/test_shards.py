"""Shards: whole or not at all, every damage seen, records of what was written."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dataset import shards
from dataset.claims import Claims
from dataset.shard_records import Records
from dataset.shards import (
    CodesPlan,
    check_shard,
    finish_codes,
    shard_damage,
    shard_path,
    start_codes,
    write_shard,
)
from tests.helpers import digest, make_plan, write_all


def test_shards_are_small_and_plain(tmp_path):
    """Two bytes a code, and any numpy reads them."""
    codes, _ = write_all(tmp_path, make_plan())
    with np.load(shard_path(tmp_path, 1), allow_pickle=False) as shard:
        assert shard["codes"].dtype == np.uint16
        assert np.array_equal(shard["codes"], codes[4:8])
        assert shard["index"].tolist() == [4, 5, 6, 7]


def test_another_plan_in_the_same_folder_is_refused(tmp_path):
    start_codes(tmp_path, make_plan())
    start_codes(tmp_path, make_plan())
    with pytest.raises(ValueError, match="tokenizer_sha256: t there, other now"):
        start_codes(tmp_path, make_plan(tokenizer_sha256="other"))


def test_every_kind_of_damage_is_seen(tmp_path):
    plan = make_plan()
    codes, labels = write_all(tmp_path, plan)
    path = shard_path(tmp_path, 1)
    good = path.read_bytes()
    assert shard_damage(tmp_path, plan, 1) is None
    for place in range(
        0, len(good), 97
    ):  # one flipped bit anywhere that matters is seen; headers may not matter
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        if shard_damage(tmp_path, plan, 1) is None:
            with np.load(path, allow_pickle=False) as arrays:
                assert np.array_equal(arrays["codes"], codes[4:8]) and np.array_equal(
                    arrays["labels"], labels[4:8]
                )
    path.write_bytes(good[:-10])
    assert shard_damage(tmp_path, plan, 1)
    write_shard(tmp_path, plan, 1, codes[4:7], labels[4:7], np.arange(4, 7))
    assert "each of its images once" in shard_damage(tmp_path, plan, 1)
    write_shard(tmp_path, plan, 1, codes[4:7], labels[4:7], np.arange(4, 7), [(7, "unreadable")])
    assert shard_damage(tmp_path, plan, 1) is None


def test_two_plans_at_once_and_one_wins(tmp_path):
    plans = [make_plan(tokenizer_sha256=str(i)) for i in range(8)]

    def start(plan: CodesPlan) -> bool:
        try:
            start_codes(tmp_path, plan)
        except ValueError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(start, plans))
    assert sum(won) == 1
    assert json.loads((tmp_path / "plan.json").read_text())["tokenizer_sha256"] == str(
        won.index(True)
    )
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_finishing_reads_no_shard_that_is_as_it_was_written(tmp_path, monkeypatch):
    """What was changed since, or has lost its record, is read once."""
    plan = make_plan()
    codes, labels = write_all(tmp_path, plan)
    good = [digest(shard_path(tmp_path, s)) for s in range(plan.num_shards)]
    read, examine = [], shards._examine
    monkeypatch.setattr(shards, "_examine", lambda *a: read.append(a[2]) or examine(*a))
    assert [s["sha256"] for s in finish_codes(tmp_path, plan, [""] * 10)["shards"]] == good
    assert read == []
    os.utime(shard_path(tmp_path, 1), ns=(0, 0))
    with open(tmp_path / "records.jsonl") as file:
        lines = file.readlines()
    (tmp_path / "records.jsonl").write_text("".join(lines[:2]) + lines[2][:20])  # killed there
    assert [s["sha256"] for s in finish_codes(tmp_path, plan, [""] * 10)["shards"]] == good
    assert read == [1, 2]
    finish_codes(tmp_path, plan, [""] * 10)
    assert read == [1, 2]
    write_shard(tmp_path, plan, 1, codes[4:7], labels[4:7], np.arange(4, 7), [(7, "unreadable")])
    assert finish_codes(tmp_path, plan, [""] * 10)["num_skipped_images"] == 1
    assert read == [1, 2]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "meta.json", "plan.json", "records.jsonl", "shards", "skipped.json",
    ]  # fmt: skip


def test_a_change_that_keeps_size_and_time_is_seen_by_reading(tmp_path):
    """Its CRCs may even be right: another set of codes under the same name."""
    plan = make_plan()
    codes, labels = write_all(tmp_path, plan)
    path = shard_path(tmp_path, 1)
    before, stat = Records(tmp_path).find(1, path), path.stat()
    assert check_shard(tmp_path, plan, 1, before) == (before, None)
    write_shard(tmp_path / "other", plan, 1, (codes[4:8] + 1) % 70, labels[4:8], np.arange(4, 8))
    path.write_bytes(shard_path(tmp_path / "other", 1).read_bytes())
    os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    record = Records(tmp_path).find(1, path)
    assert record == before and check_shard(tmp_path, plan, 1, record) == (None, shards.CHANGED)


def test_writing_a_shard_takes_as_long_beside_many_others(tmp_path, monkeypatch):
    """Neither a claim nor a write may list the folder, or all shards together take the square."""
    plan = make_plan()
    (tmp_path / "shards").mkdir()
    monkeypatch.setattr(os, "scandir", lambda *_: pytest.fail("listed"))
    monkeypatch.setattr(os, "listdir", lambda *_: pytest.fail("listed"))
    with Claims(tmp_path) as claims:
        assert claims.take(0)
        index = np.arange(4)
        write_shard(tmp_path, plan, 0, np.zeros((4, 2, 4)), index % 3, index)
        claims.release(0)


def test_a_writer_whose_shard_another_has_made_goes_on(tmp_path, monkeypatch):
    """Its temporary file may be cleared away then, where a disk has no locks to claim by."""
    plan, index = make_plan(), np.arange(4)
    (tmp_path / "shards").mkdir()

    def clear(folder, record):
        for leftover in (tmp_path / "shards").iterdir():
            leftover.rename(shard_path(tmp_path, 0)) if made else leftover.unlink()

    monkeypatch.setattr(shards, "add_record", clear)
    made = False
    with pytest.raises(FileNotFoundError):
        write_shard(tmp_path, plan, 0, np.zeros((4, 2, 4)), index % 3, index)
    made = True
    write_shard(tmp_path, plan, 0, np.zeros((4, 2, 4)), index % 3, index)
    assert shard_damage(tmp_path, plan, 0) is None


def test_shards_of_an_unknown_plan_are_not_taken_for_those_of_a_new_one(tmp_path):
    """After plan.json was lost, a rerun with another tokenizer kept the shards of the first."""
    write_all(tmp_path, make_plan())
    (tmp_path / "plan.json").unlink()
    with pytest.raises(ValueError, match="holds shards but no plan.json"):
        start_codes(tmp_path, make_plan(tokenizer_sha256="another"))
    assert not (tmp_path / "plan.json").exists()


def test_codes_and_labels_outside_of_the_plan_are_damage(tmp_path):
    plan = make_plan()
    codes, labels = write_all(tmp_path, plan)
    index = np.array(plan.shard_images(0))
    for largest, shift, said in (
        (70, 0, "code 70 of 70"),
        (69, -1, "a label outside of 3 classes"),
        (69, 1, "a label outside of 3 classes"),
    ):
        changed = codes[index].copy()
        changed[0, 0, 0] = largest
        write_shard(tmp_path, plan, 0, changed, labels[index] + shift, index)
        assert said in shard_damage(tmp_path, plan, 0)
