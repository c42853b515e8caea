"""The published command lines as a user runs them: whole path, one process or two, killed or
not, and mistakes.
"""

import argparse
import hashlib
import io
import json
import os
import shutil
import struct
import sys
import time
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.models.gpt import GPT, GPT_models, GPTConfig
from autoregressive.sample import sample_c2i_ddp
from autoregressive.sample.classes import find_classes
from autoregressive.train import extract_codes_c2i, train_c2i
from scripts.diagnosis.models import fill_from_names
from tests.helpers import EXTRACT, TRAIN, TRAIN_OPTIONS, extract, kill, run_command, start, train
from tokenizer.vq_model import VQModel, make_vq_config
from utils.options import run_main

SAMPLE = ("bash", "scripts/autoregressive/sample_c2i.sh")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def shard_digests(codes: Path) -> list[str]:
    assert not [p for p in (codes / "shards").iterdir() if p.suffix != ".npz"]
    return [digest(p) for p in sorted((codes / "shards").iterdir())]


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


def test_damaged_shard_is_named_and_made_again(work, tmp_path):
    extract(work, tmp_path / "codes")
    path = tmp_path / "codes" / "shards" / "00003.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(AssertionError, match=r"1 damaged shards: .*00003\.npz"):
        run_command("python3", "scripts/inspect_codes.py", "--code-path", tmp_path / "codes")
    done = extract(work, tmp_path / "codes", nproc=2)
    assert "00003.npz is damaged and made again" in done.stdout + done.stderr
    assert shard_digests(tmp_path / "codes") == shard_digests(work / "codes")


def test_broken_images_are_left_out_and_reported(work, tmp_path):
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
    extract(work, tmp_path / "codes", "--data-path", images)
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
    strict = ("--data-path", images, "--code-path", tmp_path / "strict", "--strict")
    with pytest.raises(AssertionError, match="error: .*0a zero bytes.jpg is not a readable image"):
        extract(work, tmp_path / "strict", *strict)


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG that claims to be huge."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )


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


def test_inspection_tells_counts_and_draws(work, tmp_path):
    options = (
        "--code-path", work / "codes", "--vq-ckpt", work / "vq.pt", "--rows", 3,
        "--output", tmp_path / "a.png",
    )  # fmt: skip
    text = run_command("python3", "scripts/inspect_codes.py", *options).stdout
    assert "24 images x 10 crops of 32x32 as 8x8 codes of VQ-4" in text
    assert "3, 8 to 8 images each" in text
    counts = json.loads((tmp_path / "a.json").read_text())
    assert sum(counts["codebook_counts"]) == 24 * 10 * 64
    assert counts["images_per_class"] == {"ape": 8, "bee": 8, "cat": 8}
    assert Image.open(tmp_path / "a.png").size == (10 * 34 + 2, 3 * 34 + 2)


def test_training_mixes_two_sets(work, tmp_path):
    extract(work, tmp_path / "codes105", "--crop-range", 1.05)
    mix = ("--mix-code-path", tmp_path / "codes105", "--mix-weight", 0.5, "--epochs", 1)
    assert "24 images x 20 crops" in train(work, tmp_path / "out", *mix).stdout


def test_a_failing_disk_is_no_unreadable_image(work, tmp_path):
    """Links to a missing disk: an error, not a complete set without them; then it comes back."""
    disk, images = tmp_path / "disk", tmp_path / "images"
    shutil.copytree(work / "images", disk)
    for path in sorted(disk.rglob("*.png")):
        link = images / path.relative_to(disk)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    disk.rename(tmp_path / "unplugged")
    with pytest.raises(AssertionError, match="error: .*No such file or directory"):
        extract(work, tmp_path / "codes", "--data-path", images)
    assert not (tmp_path / "codes" / "meta.json").exists()
    (tmp_path / "unplugged").rename(disk)
    extract(work, tmp_path / "codes", "--data-path", images)
    assert shard_digests(tmp_path / "codes") == shard_digests(work / "codes")


def test_skipped_images_are_tried_again_when_asked(work, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(work / "images", images)
    path = images / "bee" / "3.png"
    good = path.read_bytes()
    path.write_bytes(good[:200])
    extract(work, tmp_path / "codes", "--data-path", images)
    assert (tmp_path / "codes" / "skipped.json").exists()
    with pytest.raises(AssertionError, match="error: --strict: 1 unreadable images left out"):
        extract(work, tmp_path / "codes", "--data-path", images, "--strict")
    path.write_bytes(good)
    extract(work, tmp_path / "codes", "--data-path", images, "--retry-skipped")
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


def sample(work: Path, gpt: Path, folder: Path, *options: object, nproc: int = 1):
    base = (
        "--vq-ckpt", work / "vq.pt", "--gpt-ckpt", gpt, "--sample-dir", folder,
        "--image-size-eval", 24,
    )  # fmt: skip
    base += (
        "--num-fid-samples", 22, "--per-proc-batch-size", 4, "--precision", "none",
        "--cfg-scale", 1.5,
    )  # fmt: skip
    return run_command(*SAMPLE, *base, *options, nproc=nproc)


SAMPLE_NAME = "GPT-T-0000015-size-32-size-24-VQ-4-topk-0-topp-1.0-temperature-1.0-cfg-1.5-seed-0"


@pytest.fixture(scope="module")
def sampled(work, trained) -> Path:
    sample(work, trained, work / "samples")
    return work / "samples" / f"{SAMPLE_NAME}.npz"


def test_samples_have_the_published_form(sampled):
    with np.load(sampled, allow_pickle=False) as npz:
        assert npz["arr_0"].shape == (22, 24, 24, 3) and npz["arr_0"].dtype == np.uint8
        assert npz["labels"].shape == (22,) and set(npz["labels"]) <= {0, 1, 2}
    assert json.loads(sampled.with_suffix(".json").read_text())["options"]["cfg_scale"] == 1.5
    assert sorted(p.name for p in sampled.parent.iterdir()) == [
        f"{SAMPLE_NAME}.json",
        f"{SAMPLE_NAME}.npz",
    ]


def test_two_processes_and_a_kill_give_the_same_bytes(work, trained, sampled, tmp_path):
    command = [
        "bash", "scripts/autoregressive/sample_c2i.sh", "--vq-ckpt", str(work / "vq.pt"),
        "--gpt-ckpt",
    ]  # fmt: skip
    command += [
        str(trained), "--sample-dir", str(tmp_path), "--image-size-eval", "24",
        "--num-fid-samples", "22",
    ]  # fmt: skip
    command += ["--per-proc-batch-size", "4", "--precision", "none", "--cfg-scale", "1.5"]
    process = start(command)
    deadline = time.time() + 120
    while not any(sum(p.read_bytes()) >= 2 for p in tmp_path.glob("*.done")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.005)
    kill(process)
    assert not (tmp_path / f"{SAMPLE_NAME}.npz").exists()
    made = sum(next(tmp_path.glob("*.done")).read_bytes())
    log = run_command(*command, "--png", nproc=2).stdout
    assert f"{6 - made} of 6 batches of 4 to make on 2 x cpu" in log
    assert digest(tmp_path / f"{SAMPLE_NAME}.npz") == digest(sampled)
    assert sorted(p.suffix for p in tmp_path.iterdir() if p.is_file()) == [".json", ".npz"]


@pytest.mark.skipif(shutil.which("taskset") is None, reason="taskset is not installed")
def test_one_core_gives_the_same_bytes(work, trained, sampled, tmp_path):
    base = (
        "--vq-ckpt", work / "vq.pt", "--gpt-ckpt", trained, "--sample-dir", tmp_path,
        "--image-size-eval", 24,
    )  # fmt: skip
    base += (
        "--num-fid-samples", 22, "--per-proc-batch-size", 4, "--precision", "none",
        "--cfg-scale", 1.5,
    )  # fmt: skip
    run_command("taskset", "-c", min(os.sched_getaffinity(0)), *SAMPLE, *base)
    assert digest(tmp_path / f"{SAMPLE_NAME}.npz") == digest(sampled)


def test_sampling_without_a_compiler_is_said(work, trained, sampled, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert (
        "slower than our kernels, which cannot be had: no C++ compiler"
        in sample(work, trained, tmp_path).stdout
    )
    assert not json.loads((tmp_path / f"{SAMPLE_NAME}.json").read_text())["options"]["compile"]
    with np.load(sampled) as by_kernels, np.load(tmp_path / f"{SAMPLE_NAME}.npz") as by_torch:
        assert (by_kernels["arr_0"] == by_torch["arr_0"]).mean() > 0.99
    base = (
        "--vq-ckpt", work / "vq.pt", "--gpt-ckpt", trained, "--sample-dir", tmp_path / "none",
        "--compile",
    )  # fmt: skip
    refused = run_command(*SAMPLE, *base, check=False)
    assert (
        refused.returncode == 2
        and "--compile: no kernels for decoding on this CPU" in refused.stderr
    )


def test_pngs_are_the_images(work, trained, sampled, tmp_path):
    sample(work, trained, tmp_path, "--png")
    pngs = sorted((tmp_path / SAMPLE_NAME).iterdir())
    with np.load(sampled, allow_pickle=False) as npz:
        assert np.array_equal(np.stack([np.asarray(Image.open(p)) for p in pngs]), npz["arr_0"])


def test_grid_picture(work, trained, tmp_path):
    options = (
        "--vq-ckpt", work / "vq.pt", "--gpt-ckpt", trained, "--classes", 0, 2,
        "--images-per-class", 3,
    )  # fmt: skip
    run_command(
        "python3", "autoregressive/sample/sample_c2i.py", *options,
        "--output", tmp_path / "grid.png",
    )  # fmt: skip
    assert Image.open(tmp_path / "grid.png").size == (3 * 34 + 2, 2 * (16 + 34 + 2))


def test_trace_fills_the_image_in(work, trained, tmp_path):
    """19 steps at n = 4, 64 codes: the schedule's codes are drawn after k steps, others grey."""
    options = (
        "--vq-ckpt", work / "vq.pt", "--gpt-ckpt", trained, "--classes", "bee, 2",
        "--images-per-class", 2,
    )  # fmt: skip
    options += ("--output", tmp_path / "a.png", "--trace", "--precision", "none", "--top-k", 0)
    assert (
        "1 bee, 2 cat"
        in run_command("python3", "autoregressive/sample/sample_c2i.py", *options).stdout
    )
    movie = Image.open(tmp_path / "a.gif")
    assert movie.n_frames == 19 and movie.size == (2 * 34 + 2, 2 * 34 + 2)
    grey = []
    for i in range(19):
        movie.seek(i)
        tile = np.asarray(movie.convert("RGB"))[2:34, 2:34]
        cells = (tile == 96).all(-1).reshape(8, 4, 8, 4).all((1, 3))
        grey.append(int(cells.sum()))
    decoded = [1, 2, 3, *range(4 + 4, 64 + 1, 4)]
    decoded.insert(3, 4)
    expected = [64 - d for d in decoded][: len(grey)]
    assert grey == expected
    strip = np.asarray(Image.open(tmp_path / "a-strip.png"))
    assert strip.shape == (36, 8 * 34 + 2, 3)
    last, grid = strip[2:34, -34:-2], np.asarray(Image.open(tmp_path / "a.png"))
    assert np.array_equal(last, grid[16 + 2 : 16 + 34, 2:34])


def test_balanced_classes_take_turns(work, trained, sampled, tmp_path):
    sample(work, trained, tmp_path, "--class-protocol", "balanced")
    with np.load(tmp_path / f"{SAMPLE_NAME}.npz") as npz, np.load(sampled) as drawn:
        assert npz["labels"].tolist() == [i % 3 for i in range(22)]
        same = npz["labels"] == drawn["labels"]
        assert 0 < same.sum() < 22
        # the same randomness, image by image
        assert np.array_equal(npz["arr_0"][same], drawn["arr_0"][same])


@pytest.mark.parametrize("n", [1, 16])
@pytest.mark.parametrize("key", ["model", None])
def test_released_checkpoints_sample_with_and_without_flags(work, tmp_path, n, key):
    """A released file has no config of ours: size, n and classes are read off its weights."""
    config = GPTConfig(**GPT_models["GPT-T"], vocab_size=64, num_classes=3, ar_token_num=n)
    state = fill_from_names(GPT(config)).state_dict()
    torch.save(
        {key: state, "args": argparse.Namespace(lr=1e-4)} if key else state, tmp_path / "PAR-T.pt"
    )
    flags = (
        ("--gpt-model", "GPT-T", "--ar-token-num", n, "--spe-token-num", n - 1)
        if key
        else ("--from-fsdp",)
    )
    options = ("--image-size", 32, "--num-fid-samples", 2, *flags)
    log = sample(work, tmp_path / "PAR-T.pt", tmp_path, *options).stdout
    assert f"n = {n}, {n + 64 // n - 1} steps a batch" in log
    (npz,) = tmp_path.glob("GPT-T-PAR-T-size-32-size-24-VQ-4-*-seed-0.npz")
    assert np.load(npz)["arr_0"].shape == (2, 24, 24, 3)


def test_samples_of_other_options_are_not_taken_for_these(work, trained, sampled):
    """The published name leaves out the number of images: more must not be answered by fewer."""
    again = sample(work, trained, sampled.parent)
    assert "is there already, made with these options" in again.stdout
    before = digest(sampled)
    done = run_command(
        *SAMPLE, "--vq-ckpt", work / "vq.pt", "--gpt-ckpt", trained, "--sample-dir", sampled.parent,
        "--image-size-eval", 24, "--num-fid-samples", 30, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "made with other options or weights" in done.stderr
    assert digest(sampled) == before


def test_what_killed_writers_left_does_not_hinder(work, trained, sampled, tmp_path):
    """Killed after the record, half a header written; other options under the same name."""
    fingerprint = json.loads(sampled.with_suffix(".json").read_text())["fingerprint"]
    (tmp_path / f"{SAMPLE_NAME}.npz.{fingerprint}.done").write_bytes(b"\1\1\1\0\0\0")
    (tmp_path / f"{SAMPLE_NAME}.npz.{fingerprint}.partial").write_bytes(b"PK")
    (tmp_path / f"{SAMPLE_NAME}.npz.00000000.partial").write_bytes(b"other")
    sample(work, trained, tmp_path)
    assert digest(tmp_path / f"{SAMPLE_NAME}.npz") == digest(sampled)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".npz", ".partial"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "nproc, environment, prefix", [(2, {}, "error"), (1, {"RANK": "1"}, "error on rank 1")]
)
def test_a_mistake_is_said_whichever_process_meets_it(nproc, environment, prefix):
    words = ("--vq-ckpt", "nowhere.pt", "--gpt-ckpt", "nowhere.pt")
    done = run_command(*SAMPLE, *words, nproc=nproc, check=False, **environment)
    assert done.returncode != 0
    assert f"{prefix}: --gpt-ckpt: nowhere.pt does not exist in" in done.stderr


def test_moving_average_of_weights_can_be_sampled(work, trained, sampled, tmp_path):
    sample(work, trained, tmp_path, "--gpt-ema")
    assert digest(tmp_path / f"{SAMPLE_NAME}.npz") != digest(sampled)
    state = torch.load(trained, weights_only=True)
    torch.save({"model": state["model"]}, tmp_path / "plain.pt")
    options = ("--image-size", 32, "--gpt-ema")
    with pytest.raises(AssertionError, match="--gpt-ema: .*plain.pt holds no moving average"):
        sample(work, tmp_path / "plain.pt", tmp_path, *options)


MISTAKES = [
    (TRAIN, ["--spe-token-num", "5"], "--spe-token-num 5 contradicts --ar-token-num 4"),
    (
        TRAIN,
        ["--ar-token-num", "5", "--spe-token-num", "4"],
        "--ar-token-num 5: n = 5 does not cut a 8x8 grid",
    ),
    (TRAIN, ["--image-size", "384"], "--image-size 384 contradicts --code-path"),
    (TRAIN, ["--vocab-size", "100"], "--vocab-size 100 contradicts"),
    (TRAIN, ["--code-path", "nowhere"], "--code-path: nowhere does not exist in"),
    (
        TRAIN,
        ["--global-batch-size", "9", "--gradient-accumulation-steps", "2"],
        "--global-batch-size 9 does not split",
    ),
    (TRAIN, ["--gpt-ckpt", "nowhere.pt"], "--gpt-ckpt: nowhere.pt does not exist"),
    (TRAIN, ["--gpt-ckpt", "{work}/vq.pt"], "holds no GPT"),
    (EXTRACT, ["--image-size", "30"], "--image-size 30 is not a multiple of 4"),
    (EXTRACT, ["--vq-model", "VQ-16"], "--vq-model VQ-16 contradicts --vq-ckpt"),
    (EXTRACT, ["--data-path", "nowhere"], "--data-path: nowhere does not exist"),
    (EXTRACT, ["--crop-range", "0.9"], "--crop-range 0.9 must be at least 1"),
    (EXTRACT, ["--code-path", "{work}/codes"], "already holds codes made with another"),
    (SAMPLE, ["--gpt-model", "GPT-B"], "--gpt-model GPT-B contradicts"),
    (SAMPLE, ["--ar-token-num", "16", "--spe-token-num", "15"], "--ar-token-num 16 contradicts"),
    (SAMPLE, ["--image-size", "64"], "contradicts --gpt-ckpt"),
    (SAMPLE, ["--gpt-ckpt", "{work}/vq.pt"], "holds no GPT"),
    (SAMPLE, ["--vq-ckpt", "{trained}"], "holds no tokenizer"),
    (SAMPLE, ["--vq-ckpt", "nowhere.pt"], "--vq-ckpt: nowhere.pt does not exist in"),
    (SAMPLE, ["--top-p", "0"], "--top-p 0.0 must be in (0, 1]"),
    (SAMPLE, ["--temperature", "nan"], "must be finite"),
    (SAMPLE, ["--sample-dir", "{work}/vq.pt"], "--sample-dir: cannot write in"),
    (
        TRAIN,
        ["--cloud-save-path", "{work}/vq.pt"],
        "--cloud-save-path or --results-dir: cannot write in",
    ),
    (EXTRACT, ["--code-path", "{work}/vq.pt"], "--code-path: cannot write in"),
]


@pytest.mark.parametrize(
    "script, options, message", MISTAKES, ids=[" ".join([s[1], *o]) for s, o, _ in MISTAKES]
)
def test_a_mistake_is_one_line_and_writes_nothing(
    work, trained, tmp_path, monkeypatch, capsys, script, options, message
):
    """In this process, as starting each takes minutes; other tests show that .sh files get here."""
    module, base = {
        TRAIN: (
            train_c2i,
            [
                "--cloud-save-path",
                tmp_path / "out",
                "--code-path",
                work / "codes",
                "--no-local-save",
            ],
        ),
        EXTRACT: (
            extract_codes_c2i,
            [
                "--vq-ckpt",
                work / "vq.pt",
                "--data-path",
                work / "images",
                "--code-path",
                tmp_path / "out",
            ],
        ),
        SAMPLE: (
            sample_c2i_ddp,
            ["--vq-ckpt", work / "vq.pt", "--gpt-ckpt", trained, "--sample-dir", tmp_path / "out"],
        ),
    }[script]
    base = [*base, "--gpt-model", "GPT-T", *TRAIN_OPTIONS[2:6]] if script == TRAIN else base
    options = [o.format(work=work, trained=trained) for o in options]
    monkeypatch.setattr(sys, "argv", [str(word) for word in (script[1], *base, *options)])
    with pytest.raises(SystemExit) as stop:
        run_main(module.main)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "out").exists()


def test_samples_of_another_tokenizer_are_refused(work, trained, tmp_path):
    """A tokenizer of the right shape whose codes the GPT has not learned."""
    other = VQModel(make_vq_config("VQ-4", codebook_size=64))
    torch.save(
        {"model": other.state_dict(), "vq_model": "VQ-4", "config": asdict(other.config)},
        tmp_path / "vq.pt",
    )
    done = run_command(*SAMPLE, "--vq-ckpt", tmp_path / "vq.pt", "--gpt-ckpt", trained, check=False)
    assert (
        done.returncode == 2
        and "is not the tokenizer that made the codes of --gpt-ckpt" in done.stderr
    )


NAMES = [
    "tench, Tinca tinca",
    "golden retriever",
    "hen",
    "flat-coated retriever",
    "hen-of-the-woods, hen of the woods",
]


@pytest.mark.parametrize(
    "words, expected",
    [
        (["0", "3"], [0, 3]),
        (["0, 3 2", "1"], [0, 3, 2, 1]),
        (["golden", "retriever,", "0"], [1, 0]),
        (["Tinca Tinca, hen"], [0, 2]),  # a whole name goes before parts of others
        (["golden"], [1]),
    ],
)
def test_classes_are_found_by_id_and_name(words, expected):
    assert find_classes(words, NAMES) == expected


@pytest.mark.parametrize(
    "words, message",
    [
        (["5"], "--classes 5: the checkpoint has classes 0 to 4"),
        (["retriever"], r"which of 1 \(golden retriever\), 3 \(flat-coated retriever\)\?"),
        (["unicorn"], "--classes unicorn: the checkpoint has no class of this name"),
        (["-1"], "--classes -1: the checkpoint has no class"),
        ([""], "--classes names no class"),
    ],
)
def test_classes_that_are_not_there(words, message):
    with pytest.raises(ValueError, match=message):
        find_classes(words, NAMES)
