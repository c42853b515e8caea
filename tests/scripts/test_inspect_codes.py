"""The command that inspects codes."""

import json

from PIL import Image

from scripts import inspect_codes
from tests.helpers import make_plan, quietly, write_all


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
    assert Image.open(tmp_path / "a.png").size == (10 * 98 + 2, 3 * 98 + 2)


def test_the_report_never_writes_over_what_belongs_to_the_codes(tmp_path, capfd, monkeypatch):
    """--output CODES/meta.png wrote its counts to CODES/meta.json."""
    write_all(tmp_path, make_plan())
    before = (tmp_path / "meta.json").read_bytes()
    options = ("--code-path", tmp_path, "--output", tmp_path / "meta.png")
    text = quietly(capfd, monkeypatch, *options, main=inspect_codes.main)
    assert text.startswith("error: --output") and "meta.json belongs to the codes" in text
    assert (tmp_path / "meta.json").read_bytes() == before
