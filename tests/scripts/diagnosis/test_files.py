"""What the doctor says of files that were broken on purpose."""

import pytest
import torch
from PIL import Image

from scripts.diagnosis import files
from scripts.diagnosis.check import BROKEN, OK
from tests.scripts.diagnosis.helpers import HINT, result_of, save_gpt, save_vq
from utils.records import read_sealed, write_sealed


def test_files_that_belong_together(given):
    for function in (files.check_gpt, files.check_vq, files.check_codes, files.check_together):
        assert result_of(function, **given).status == OK, function
    assert "tokenizer" in result_of(files.check_together, **given).detail
    codes = result_of(files.check_codes, **given)
    assert "10 images x 2 crops, all 3 shards whole; 3 classes of 3 to 4 images" in codes.detail


def test_files_that_do_not_belong_together(given, tmp_path):
    save_vq(tmp_path / "vq.pt", another=True)
    result = result_of(files.check_together, **given)
    assert result.status == BROKEN and result.advice == HINT
    assert "tokenizer of --vq-ckpt and --code-path" in result.detail
    assert "tokenizer of --vq-ckpt and --gpt-ckpt" in result.detail
    save_gpt(tmp_path / "gpt.pt", "t", vocab_size=71, num_classes=4, grid_width=4)
    result = result_of(files.check_together, **given | {"vq_ckpt": None})
    assert "codebook size of --gpt-ckpt and --code-path (71, 70)" in result.detail
    assert "number of classes of --gpt-ckpt and --code-path (4, 3)" in result.detail
    assert "code grid of --gpt-ckpt and --code-path ([2, 4], [2, 2])" in result.detail


def test_damaged_codes_are_named(given, tmp_path):
    path = tmp_path / "codes" / "shards" / "00001.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    result = result_of(files.check_codes, **given)
    assert result.status == BROKEN and "shards/00001.npz" in result.detail and result.advice == HINT
    path.unlink()
    result = result_of(files.check_codes, **given)
    assert result.status == BROKEN and "00001.npz is missing or damaged" in result.detail


def test_codes_that_cannot_be(given, tmp_path):
    """Beyond the codebook; of a class that has no image."""
    path = tmp_path / "codes" / "meta.json"
    meta = read_sealed(path)
    write_sealed(path, meta | {"codebook_size": 60})
    result = result_of(files.check_codes, **given)
    assert result.status == BROKEN and "of 60" in result.detail
    write_sealed(path, meta | {"classes": ["a", "b", "c", "d"]})
    result = result_of(files.check_codes, **given)
    assert result.status == BROKEN and "1 classes have no image" in result.detail


def test_weights_that_cannot_be(given, tmp_path):
    model = save_gpt(tmp_path / "gpt.pt", "t")
    checkpoint = torch.load(tmp_path / "gpt.pt", weights_only=True)
    checkpoint["model"]["layers.3.feed_forward.w2.weight"][5, 5] = torch.nan
    torch.save(checkpoint, tmp_path / "gpt.pt")
    result = result_of(files.check_gpt, **given)
    assert (
        result.status == BROKEN and "the first is layers.3.feed_forward.w2.weight" in result.detail
    )
    torch.nn.init.zeros_(model.output.weight)
    torch.save(checkpoint | {"model": model.state_dict()}, tmp_path / "gpt.pt")
    assert "all zeros" in result_of(files.check_gpt, **given).detail
    (tmp_path / "vq.pt").write_bytes((tmp_path / "vq.pt").read_bytes()[:1000])
    result = result_of(files.check_vq, **given)
    assert result.status == BROKEN and "--vq-ckpt" in result.detail
    assert result_of(files.check_gpt, gpt_ckpt=str(tmp_path / "none.pt")).status == BROKEN


def test_folders_of_images(tmp_path):
    root = tmp_path / "images"
    for name in ("ape", "bee"):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(root / name / "0.png")
    result = result_of(files.check_images, data_path=str(root))
    assert (
        result.status == OK
        and "2 images in 2 classes of 1" in result.detail
        and "30 to 30 pixels" in result.detail
    )
    (root / "cat").mkdir()
    result = result_of(files.check_images, data_path=str(root))
    assert result.status == BROKEN and "such as cat" in result.detail and "delete" in result.advice
    (root / "cat" / "1.jpg").write_bytes(b"no picture")
    result = result_of(files.check_images, data_path=str(root))
    assert (
        result.status == BROKEN
        and "1 of 3 opened files fail: " in result.detail
        and "1.jpg" in result.detail
    )
    for name in ("ape", "bee", "cat"):
        (root / "train" / name).mkdir(parents=True)
        (root / name).rename(root / "train" / name)
    result = result_of(files.check_images, data_path=str(root))
    assert result.status == BROKEN and f"--data-path {root}/train" in result.advice


@pytest.mark.slow
def test_a_training_folder_is_checked_as_it_is(trained, work):
    folder = str(trained.with_suffix(""))
    result = result_of(files.check_gpt, gpt_ckpt=folder)
    assert result.status == OK and "GPT-T" in result.detail and "after 15 steps" in result.detail
    together = dict(
        gpt_ckpt=folder,
        vq_ckpt=str(work / "vq.pt"),
        code_path=str(work / "codes"),
        data_path=str(work / "images"),
    )
    result = result_of(files.check_together, **together)
    assert (
        result.status == OK and "list of images" in result.detail and "class names" in result.detail
    )
    (work / "images" / "ape" / "more.png").write_bytes(
        (work / "images" / "ape" / "0.png").read_bytes()
    )
    try:
        assert (
            "list of images of --code-path and --data-path"
            in result_of(files.check_together, **together).detail
        )
    finally:
        (work / "images" / "ape" / "more.png").unlink()
