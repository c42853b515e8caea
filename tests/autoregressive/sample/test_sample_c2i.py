"""The command for a grid of images, and its trace."""

import numpy as np
from PIL import Image

from autoregressive.sample import sample_c2i
from tests.helpers import quietly


def test_grid_picture(work, trained, tmp_path, capfd, monkeypatch):
    options = (
        "--vq-ckpt", work / "vq.pt", "--gpt-ckpt", trained, "--classes", 0, 2,
        "--images-per-class", 3,
    )  # fmt: skip
    options += ("--output", tmp_path / "grid.png")
    quietly(capfd, monkeypatch, *options, main=sample_c2i.main)
    assert Image.open(tmp_path / "grid.png").size == (3 * 98 + 2, 2 * (16 + 98 + 2))


def test_trace_fills_the_image_in(work, trained, tmp_path, capfd, monkeypatch):
    """19 steps at n = 4, 64 codes: the schedule's codes are drawn after k steps, others grey."""
    options = (
        "--vq-ckpt", work / "vq.pt", "--gpt-ckpt", trained, "--classes", "bee, 2",
        "--images-per-class", 2,
    )  # fmt: skip
    options += ("--output", tmp_path / "a.png", "--trace", "--precision", "none", "--top-k", 0)
    assert "1 bee, 2 cat" in quietly(capfd, monkeypatch, *options, main=sample_c2i.main)
    movie = Image.open(tmp_path / "a.gif")
    assert movie.n_frames == 19 and movie.size == (2 * 98 + 2, 2 * 98 + 2)
    grey = []
    for i in range(19):
        movie.seek(i)
        tile = np.asarray(movie.convert("RGB"))[2:98, 2:98]
        cells = (tile == 96).all(-1).reshape(8, 12, 8, 12).all((1, 3))
        grey.append(int(cells.sum()))
    decoded = [1, 2, 3, *range(4 + 4, 64 + 1, 4)]
    decoded.insert(3, 4)
    expected = [64 - d for d in decoded][: len(grey)]
    assert grey == expected
    strip = np.asarray(Image.open(tmp_path / "a-strip.png"))
    assert strip.shape == (100, 8 * 98 + 2, 3)
    last, grid = strip[2:98, -98:-2], np.asarray(Image.open(tmp_path / "a.png"))
    assert np.array_equal(last, grid[16 + 2 : 16 + 98, 2:98])
    said = quietly(capfd, monkeypatch, *options, "--jacobi", main=sample_c2i.main)
    assert "forward calls, not 19" in said
    assert 1 < Image.open(tmp_path / "a.gif").n_frames <= 19
