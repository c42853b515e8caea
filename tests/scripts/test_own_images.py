"""own_images.sh as a user runs it."""

from __future__ import annotations

import pytest
from PIL import Image

from tests.helpers import run_command

SCRIPT = ("bash", "scripts/own_images.sh")


@pytest.mark.slow
def test_the_whole_and_again(folder, tmp_path):
    """A dry run, a run, and a rerun that finds all done; other options are refused."""
    base = (*SCRIPT, folder, "--budget", 0.5, "--no-flip", "--output", tmp_path / "out")
    dry = run_command(*base, "--dry-run").stdout
    assert "+ bash scripts/tokenizer/train_vq.sh" in dry and not (tmp_path / "out").exists()
    done = run_command(*base).stdout
    for part in (
        "+ bash scripts/autoregressive/train_c2i.sh",
        "=== done in",
        "Frechet distance *",
        "next steps",
    ):
        assert part in done
    assert "1 unreadable files" in done
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        assert picture.size == (12 * 98 + 2, 3 * (16 + 98 + 2))  # 32 pixels, enlarged 3 times
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    again = run_command(*base).stdout
    assert again.count("is there already") == 9 and "\n+ " not in again
    assert again.split("\npictures\n")[1] == done.split("\npictures\n")[1]
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    (tmp_path / "out" / "samples.png").unlink()
    assert run_command(*base).stdout.count("\n+ ") == 1
    other = run_command(*base[:-2], "--seed", 1, *base[-2:], check=False)
    assert other.returncode == 2 and "made with another seed (0 there, 1 now)" in other.stderr
