"""Conversion of the published layout of codes."""

import numpy as np

from tests.helpers import run_command, shard_digests


def test_published_layout_converts_to_the_same_shards(work, tmp_path):
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
    options = ("--vq-ckpt", work / "vq.pt", "--shard-size", 5)
    command = ("python3", "scripts/convert_codes.py", "--code-path", tmp_path / "old", *options)
    run_command(*command, "--output", tmp_path / "new")
    assert shard_digests(tmp_path / "new") == shard_digests(work / "codes")
    other = ("--output", tmp_path / "other", "--image-size", 384)
    done = run_command(*command, *other, check=False)
    assert done.returncode == 2 and "holds 8x8 codes, which VQ-4 makes of 32 pixels" in done.stderr
