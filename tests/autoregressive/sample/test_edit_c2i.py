"""The command that edits an image."""

import json

import numpy as np
from PIL import Image

from autoregressive.sample import edit_c2i
from tests.helpers import image_file, quietly


def test_the_command_edits(work, trained, tmp_path, capfd, monkeypatch):
    path, pixels = image_file(tmp_path / "a.png", 32, 32)
    output = tmp_path / "out" / "edit.png"
    options = ("--image", path, "--vq-ckpt", work / "vq.pt", "--gpt-ckpt", trained)
    options += ("--classes", "0,2", "--box", 0, 0, 16, 32, "--candidates", 3, "--no-compile")
    said = quietly(capfd, monkeypatch, *options, "--output", output, main=edit_c2i.main)
    assert "32 of 64 codes made anew" in said, said
    record = json.loads(output.with_suffix(".json").read_text())
    assert np.array(record["log_likelihood_of_kept_codes"]).shape == (2, 1, 3)
    for i in range(2):
        made = np.asarray(Image.open(output.with_stem(f"edit-{i}")))
        assert np.array_equal(made[:, 16:], pixels[:, 16:])
        assert not np.array_equal(made[:, :16], pixels[:, :16])
    sheet = Image.open(output.with_stem("edit-sheet"))
    assert sheet.width == 6 * 98 + 2 and sheet.height == 2 * (16 + 100)
    said = quietly(
        capfd, monkeypatch, *options[:6], "--classes", 0, "--output", output, main=edit_c2i.main
    )
    assert said.endswith("give --mask, --box, --margins or --keep-share\n"), said
    decoded = ("--kept-pixels", "decoded", "--keep-share", 0.5, "--trace", "--feather", 2)
    quietly(
        capfd, monkeypatch, *options[:6], "--classes", 1, *decoded, "--output", output,
        "--no-compile", main=edit_c2i.main,
    )  # fmt: skip
    assert output.is_file() and output.with_suffix(".gif").is_file()
