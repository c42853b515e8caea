"""Conversion of the published layout of codes."""

import numpy as np

from scripts import convert_codes
from tests.helpers import quietly, shard_digests


def test_published_layout_converts_to_the_same_shards(work, tmp_path, capfd, monkeypatch):
    from dataset.codes import open_codes

    codes = open_codes(work / "codes")
    for kind in ("codes", "labels"):
        (tmp_path / "old" / f"imagenet32_{kind}").mkdir(parents=True)
    for i in range(24):
        np.save(
            tmp_path / f"old/imagenet32_codes/{i}.npy",
            codes.gather(np.full(10, i), np.arange(10))[None],
        )
        np.save(tmp_path / f"old/imagenet32_labels/{i}.npy", codes.labels[i : i + 1])
    options = ("--code-path", tmp_path / "old", "--vq-ckpt", work / "vq.pt", "--shard-size", 5)
    main = convert_codes.main
    quietly(capfd, monkeypatch, *options, "--output", tmp_path / "new", main=main)
    assert shard_digests(tmp_path / "new") == shard_digests(work / "codes")
    other = ("--output", tmp_path / "other", "--image-size", 384)
    log = quietly(capfd, monkeypatch, *options, *other, main=main)
    assert "error: " in log and "holds 8x8 codes, which VQ-4 makes of 32 pixels" in log


def test_a_folder_that_cannot_be_written_to_is_named_with_its_option(tmp_path, capfd, monkeypatch):
    (tmp_path / "old.jsonl").write_text('{"class_id": 0, "tokens": [1, 2, 3, 4]}\n')
    (tmp_path / "file").write_text("")
    options = ("--code-path", tmp_path / "old.jsonl", "--codebook-size", 8)
    log = quietly(
        capfd, monkeypatch, *options, "--output", tmp_path / "file", main=convert_codes.main
    )
    assert f"error: --output: cannot write in {tmp_path / 'file'}" in log
