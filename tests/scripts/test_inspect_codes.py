"""The command that inspects codes."""

import json

from PIL import Image

from scripts import inspect_codes
from tests.helpers import quietly


def test_inspection_tells_counts_and_draws(work, tmp_path, capfd, monkeypatch):
    options = (
        "--code-path", work / "codes", "--vq-ckpt", work / "vq.pt", "--rows", 3,
        "--output", tmp_path / "a.png",
    )  # fmt: skip
    text = quietly(capfd, monkeypatch, *options, main=inspect_codes.main)
    assert "24 images x 10 crops of 32x32 as 8x8 codes of VQ-4" in text
    assert "3, 8 to 8 images each" in text
    counts = json.loads((tmp_path / "a.json").read_text())
    assert sum(counts["codebook_counts"]) == 24 * 10 * 64
    assert counts["images_per_class"] == {"ape": 8, "bee": 8, "cat": 8}
    assert Image.open(tmp_path / "a.png").size == (10 * 34 + 2, 3 * 34 + 2)
