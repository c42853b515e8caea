"""Reconstruction as a user runs it: figures, interrupted, over processes, its options."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import quietly, run_command, slow_lpips
from tokenizer import reconstruct_vq
from tokenizer.load import load_vq

SCRIPT = ("bash", "scripts/tokenizer/reconstruction_vq.sh")


def words(work: Path, folder: Path, *options: object) -> list[object]:
    base = [
        "--data-path", work / "images", "--vq-ckpt", work / "vq.pt", "--sample-dir", folder,
        "--num-workers", 0,
    ]  # fmt: skip
    return [
        *base, "--image-size", 32, "--image-size-eval", 32, "--per-proc-batch-size", 5, *options,
    ]  # fmt: skip


@pytest.fixture
def reconstruct(work, capfd, monkeypatch):
    def run(folder: Path, *options: object) -> str:
        return quietly(capfd, monkeypatch, *words(work, folder, *options), main=reconstruct_vq.main)

    return run


def contents(folder: Path) -> dict[str, str]:
    """Hashes of the files of images, and the figures."""
    figures = json.loads((folder / "VQ-4-vq-size-32.json").read_text())
    hashes = {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.glob("*.[np]*")
        if p.suffix != ".json"
    }
    return hashes | {k: figures[k] for k in ("psnr", "ssim", "codebook_used", "perplexity")}


def test_files_figures_and_picture(work, reconstruct, vgg, tmp_path):
    """Against encoding and decoding here: both image sets, labels, PSNR, LPIPS, usage."""
    log = reconstruct(tmp_path, "--vgg-weights", vgg, "--pairs", 10)
    figures = json.loads((tmp_path / "VQ-4-vq-size-32.json").read_text())
    made, real = (np.load(tmp_path / f"VQ-4-vq-size-32{k}.npz") for k in ("", "-inputs"))
    assert made["labels"].tolist() == real["labels"].tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert made["arr_0"].shape == real["arr_0"].shape == (24, 32, 32, 3)
    vq, _ = load_vq(work / "vq.pt", None)
    images = torch.from_numpy(real["arr_0"]).permute(0, 3, 1, 2) / 127.5 - 1
    codes = vq.encode(images)
    with torch.no_grad():
        expected = (
            (127.5 * vq.decode_code(codes) + 128).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        )
    assert np.abs(made["arr_0"].astype(int) - expected).max() <= 1
    gap = ((made["arr_0"] / 255.0 - real["arr_0"] / 255.0) ** 2).mean((1, 2, 3))
    assert figures["psnr"] == pytest.approx(float(-10 * np.log10(gap).mean()), rel=1e-9)
    assert figures["codebook_used"] == len(codes.unique()) / 64
    shares = [(codes == c).double().mean().item() for c in codes.unique()]
    assert figures["perplexity"] == pytest.approx(
        math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-9
    )
    pair = (torch.from_numpy(made["arr_0"]), torch.from_numpy(real["arr_0"]))
    pair = (x.permute(0, 3, 1, 2) / 127.5 - 1 for x in pair)
    assert figures["lpips"] == pytest.approx(np.mean(slow_lpips(vgg, *pair)), rel=1e-3)
    assert f"PSNR {figures['psnr']:.2f} dB, SSIM" in log and "evaluations/c2i/evaluator.py" in log
    picture = np.asarray(Image.open(tmp_path / "VQ-4-vq-size-32.png"))
    # a row of ten of 24 images, three times as large, above another of their reconstructions
    assert picture.shape == (2 * (16 + 98 + 2), 10 * 98 + 2, 3)
    assert np.array_equal(picture[18:114:3, 2:98:3], real["arr_0"][0])
    assert np.array_equal(picture[134:230:3, 2:98:3], made["arr_0"][0])
    assert np.array_equal(picture[134:230:3, 100:196:3], made["arr_0"][23 // 9])
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".npz", ".npz", ".png"]


def test_interrupted_or_spread_over_processes_makes_the_same(
    work, reconstruct, tmp_path, monkeypatch
):
    """Stopped in the third chunk of five, then finished, making three; and by two processes."""
    reconstruct(tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    real_write, written = reconstruct_vq.SampleFile.write, []

    def write(file: object, chunk: int, images: np.ndarray) -> None:
        if len(written) == 5:
            raise ValueError("the power is gone")
        written.append(chunk)
        real_write(file, chunk, images)

    with monkeypatch.context() as patch:
        patch.setattr(reconstruct_vq.SampleFile, "write", write)
        assert "the power is gone" in reconstruct(tmp_path / "stopped")
    assert written == [0, 0, 1, 1, 2] and not list((tmp_path / "stopped").glob("*.npz"))
    # what a process leaves that is killed before it names its file; read, it counted twice
    (scores,) = (tmp_path / "stopped").glob("*.scores")
    shutil.copy(scores / "0000000.npz", scores / "0000003.npz.tmp-1234abcd")
    made = []
    monkeypatch.setattr(
        reconstruct_vq.SampleFile, "write", lambda f, c, x: made.append(c) or real_write(f, c, x)
    )
    first = scores / "0000000.npz"
    whole = first.read_bytes()
    first.write_bytes(whole[:-40])
    assert f"{first} is not a whole .npz file" in reconstruct(tmp_path / "stopped")
    first.write_bytes(whole)
    reconstruct(tmp_path / "stopped")
    assert made == [2, 2, 3, 3, 4, 4] and contents(tmp_path / "stopped") == expected
    assert not list((tmp_path / "stopped").glob("*.s*")), "nothing is left over"
    scores.mkdir()  # killed at the very end
    again = reconstruct(tmp_path / "stopped")
    assert not scores.exists()
    assert len(made) == 6 and f"PSNR {expected['psnr']:.2f} dB" in again

    # both by the command line, with the same allocator: under PAR_CPU=avx2 others were seen to
    # round otherwise
    threads = str(torch.get_num_threads())
    for name, nproc in (("one", 1), ("two", 2)):
        run_command(*SCRIPT, *words(work, tmp_path / name), nproc=nproc, OMP_NUM_THREADS=threads)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize(
    "options, message",
    [
        (("--per-proc-batch-size", 4), "made with other options, images or weights"),
        (("--vgg-weights", "nowhere.pth"), "--vgg-weights: nowhere.pth does not exist"),
        (("--image-size", 30), "--image-size 30 is not a multiple of 4"),
        (("--codebook-size", 32), "--codebook-size 32 contradicts"),
        (("--codebook-embed-dim", 4), "--codebook-embed-dim 4 contradicts"),
        (("--vq-model", "VQ-16"), "--vq-model VQ-16 contradicts"),
    ],
)
def test_mistakes_are_one_line(reconstruct, tmp_path_factory, options, message):
    folder = tmp_path_factory.getbasetemp() / "mistakes"
    if not folder.exists():
        reconstruct(folder)
    assert message in reconstruct(folder, *options)


def test_sizes_and_workers(reconstruct, tmp_path, monkeypatch):
    seen = []
    loader = reconstruct_vq.DataLoader
    monkeypatch.setattr(
        reconstruct_vq,
        "DataLoader",
        lambda *a, **k: seen.append(k["num_workers"]) or loader(*a, **k),
    )
    reconstruct(tmp_path, "--image-size", 24, "--image-size-eval", 16, "--num-workers", 1)
    with np.load(tmp_path / "VQ-4-vq-size-24.npz") as npz:
        assert npz["arr_0"].shape == (24, 16, 16, 3) and seen == [1]
