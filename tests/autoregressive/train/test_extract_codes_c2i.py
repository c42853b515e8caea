"""Extraction of codes as a user runs it: killed, over processes, broken images, failing disks."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import struct
import time
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.train import extract_codes_c2i
from tests.fake_cuda import CUDA, Operations, fake_cuda, place
from tests.helpers import (
    EXTRACT,
    extract,
    extract_words,
    kill,
    quietly,
    run_command,
    shard_digests,
    start,
)
from tokenizer.vq_model import VQModel, make_vq_config


def test_extraction_is_the_same_for_any_processes_and_batch_and_makes_only_what_is_missing(
    work, tmp_path
):
    first = shard_digests(work / "codes")
    assert len(first) == 5
    extract(work, tmp_path / "two", "--batch-size", 7, nproc=2)
    assert shard_digests(tmp_path / "two") == first
    meta = json.loads((tmp_path / "two" / "meta.json").read_text())
    assert meta["classes"] == ["ape", "bee", "cat"]
    assert [s["sha256"] for s in meta["shards"]] == first
    assert (meta["grid"], len(meta["crops"]), meta["num_coded_images"]) == ([8, 8], 10, 24)
    (tmp_path / "two" / "shards" / "00002.npz").unlink()
    again = extract(work, tmp_path / "two")
    assert "1 of 5 shards to make" in again.stdout
    assert shard_digests(tmp_path / "two") == first


def test_extraction_killed_ten_times_at_random_moments(work, tmp_path):
    """SIGKILL of the process group, workers included; one run to the end: all shards, each once."""
    codes, rng = tmp_path / "codes", np.random.default_rng(0)
    command = [
        *EXTRACT, "--vq-ckpt", work / "vq.pt", "--data-path", work / "images",
        "--code-path", codes,
    ]  # fmt: skip
    command += [
        "--image-size", 32, "--ten-crop", "--shard-size", 5, "--num-workers", 1,
        "--batch-size", 1,
    ]  # fmt: skip
    counts = []
    for _ in range(10):
        process, deadline = start(command), time.time() + 60
        while not (codes / "shards").exists() and process.poll() is None and time.time() < deadline:
            time.sleep(0.01)
        # a rerun takes that long to come to work again
        time.sleep(rng.uniform(0, 0.6) + (2 if counts else 0))
        kill(process)
        counts.append(len(list((codes / "shards").glob("*.npz"))))
    assert counts == sorted(counts)  # what was whole stays
    done = extract(work, codes)
    assert shard_digests(codes) == shard_digests(work / "codes")
    assert f"{5 - counts[-1]} of 5 shards to make" in done.stdout
    assert json.loads((codes / "meta.json").read_text())["num_coded_images"] == 24


@pytest.fixture
def extract_here(work, capfd, monkeypatch):
    """``extract_here(codes, *options)``: as ``extract``, in this process; what it printed."""

    def run(codes: Path, *options: object) -> str:
        words = (*extract_words(work, codes), "--num-workers", 0, *options)
        return quietly(capfd, monkeypatch, *words, main=extract_codes_c2i.main)

    return run


def test_damaged_shard_is_named_and_made_again(work, tmp_path):
    shutil.copytree(work / "codes", tmp_path / "codes")
    path = tmp_path / "codes" / "shards" / "00003.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(AssertionError, match=r"1 damaged shards: .*00003\.npz"):
        run_command("python3", "scripts/inspect_codes.py", "--code-path", tmp_path / "codes")
    done = extract(work, tmp_path / "codes", nproc=2)
    assert "00003.npz is damaged and made again" in done.stdout + done.stderr
    assert shard_digests(tmp_path / "codes") == shard_digests(work / "codes")


def test_broken_images_are_left_out_and_reported(work, extract_here, tmp_path):
    """Each kind of broken file beside good ones: these keep their codes, others get a reason."""
    images, good = tmp_path / "images", work / "images"
    shutil.copytree(good, images)
    whole = (good / "bee" / "0.png").read_bytes()
    jpeg = tmp_path / "jpeg.jpg"
    Image.open(good / "bee" / "1.png").save(jpeg)
    thin = io.BytesIO()
    Image.new("1", (1, 9_000_000)).save(thin, "PNG")
    broken = {
        "bee/0a zero bytes.jpg": b"",
        "bee/0b text.jpg": b"this is not an image",
        "bee/0c truncated.png": whole[: len(whole) // 2],
        "bee/0d truncated.jpg": jpeg.read_bytes()[:400],
        "bee/0e header only.png": whole[:33],
        "cat/0f zeros.png": bytes(5000),
        "cat/0g html.jpeg": b"<html><body>404 Not Found</body></html>",
        "cat/0h bad crc.png": whole[:60] + bytes([whole[60] ^ 0xFF]) + whole[61:],
        "cat/0i bomb.png": png_header(100_000, 100_000),
        "cat/0j thin.png": thin.getvalue(),
    }
    for name, content in broken.items():
        (images / name).write_bytes(content)
    (images / "ape" / "notes.txt").write_text("not an image file by its name: never listed")
    extract_here(tmp_path / "codes", "--data-path", images)
    skipped = json.loads((tmp_path / "codes" / "skipped.json").read_text())
    assert sorted(os.path.relpath(s["path"], images) for s in skipped) == sorted(broken)
    thin_reason = "an image of 1x9000000 is too thin to resize its shorter side to 35"
    reasons = {os.path.basename(s["path"]): s["reason"] for s in skipped}
    assert reasons.pop("0j thin.png") == thin_reason
    assert all("is not a readable image" in reason for reason in reasons.values())

    from dataset.codes import open_codes

    ours, expected = open_codes(tmp_path / "codes"), open_codes(work / "codes")
    assert ours.labels.tolist() == expected.labels.tolist()
    everything = np.repeat(np.arange(24), 10), np.tile(np.arange(10), 24)
    assert np.array_equal(ours.gather(*everything), expected.gather(*everything))
    log = extract_here(tmp_path / "strict", "--data-path", images, "--strict")
    assert re.search("^error: .*0a zero bytes.jpg is not a readable image", log, re.MULTILINE)


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG that claims to be huge."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )


def test_a_failing_disk_is_no_unreadable_image(work, extract_here, tmp_path):
    """Links to a missing disk: an error, not a complete set without them; then it comes back."""
    disk, images = tmp_path / "disk", tmp_path / "images"
    shutil.copytree(work / "images", disk)
    for path in sorted(disk.rglob("*.png")):
        link = images / path.relative_to(disk)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    disk.rename(tmp_path / "unplugged")
    log = extract_here(tmp_path / "codes", "--data-path", images)
    assert re.search("^error: .*No such file or directory", log, re.MULTILINE)
    assert not (tmp_path / "codes" / "meta.json").exists()
    (tmp_path / "unplugged").rename(disk)
    extract_here(tmp_path / "codes", "--data-path", images)
    assert shard_digests(tmp_path / "codes") == shard_digests(work / "codes")


def test_skipped_images_are_tried_again_when_asked(work, extract_here, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(work / "images", images)
    path = images / "bee" / "3.png"
    good = path.read_bytes()
    path.write_bytes(good[:200])
    extract_here(tmp_path / "codes", "--data-path", images)
    assert (tmp_path / "codes" / "skipped.json").exists()
    log = extract_here(tmp_path / "codes", "--data-path", images, "--strict")
    assert "\nerror: --strict: 1 unreadable images left out" in log
    path.write_bytes(good)
    extract_here(tmp_path / "codes", "--data-path", images, "--retry-skipped")
    assert shard_digests(tmp_path / "codes") == shard_digests(work / "codes")
    assert not (tmp_path / "codes" / "skipped.json").exists()


def test_extracted_codes_are_those_of_the_crops(work):
    """Crop 1 of image 4 (class bee, 5 shards of 5) has the tokenizer's codes of that crop."""
    from torchvision.transforms import TenCrop

    from dataset.augmentation import center_crop
    from dataset.codes import open_codes
    from tokenizer.load import load_vq

    vq, _ = load_vq(work / "vq.pt", None)
    pixels = center_crop(Image.open(work / "images" / "bee" / "3.png"), 35)
    crops = torch.stack(TenCrop(32)(torch.from_numpy(pixels.copy()).permute(2, 0, 1)))
    expected = vq.encode(crops.float() / 127.5 - 1).flatten(1)
    codes = open_codes(work / "codes")
    assert codes.labels[11] == 1
    assert np.array_equal(codes.gather(np.full(10, 11), np.arange(10)), expected.numpy())


def test_extraction_does_not_wait_for_each_batch():
    """Several images per batch, whose codes stay on the device until their shard is whole."""
    assert extract_codes_c2i.default_batch(CUDA) // 10 > 1
    with torch.device("meta"):
        vq = VQModel(make_vq_config("VQ-4", codebook_size=64)).eval()
    args = Namespace(ten_crop=True, no_flip=False, image_size=8, precision="none", batch_size=80)
    with fake_cuda(), Operations() as operations:
        place(vq)
        pixels = torch.zeros(8, 9, 9, 3, dtype=torch.uint8, device=CUDA)
        codes = extract_codes_c2i.encode_crops(vq, vq.quantize.codebook(), pixels, args)
        assert codes.device == CUDA and codes.shape == (8, 10, 4)
    assert not operations.waits
