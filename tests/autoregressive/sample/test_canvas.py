"""What is masked in an image to be edited."""

import numpy as np
import pytest
from PIL import Image

from autoregressive.sample.canvas import blend, mask_of_codes, open_canvas
from tests.helpers import image_file


def test_canvas_masks_what_it_is_told(tmp_path):
    path, pixels = image_file(tmp_path / "a.png")
    square, masked = open_canvas(path, 32)
    assert np.array_equal(square, pixels[:, 8:40]) and not masked.any()
    _, masked = open_canvas(path, 32, boxes=[(9, 2, 12, 30)])
    assert masked[2:30, 1:4].all() and masked.sum() == 28 * 3
    mask = np.zeros((32, 48), np.uint8)
    mask[5, 20] = 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    _, masked = open_canvas(path, 32, tmp_path / "mask.png")
    assert masked[5, 12] and masked.sum() == 1
    _, masked = open_canvas(path, 16, tmp_path / "mask.png")  # one pixel survives the resize
    assert masked[2, 6] and masked.sum() == 1
    square, masked = open_canvas(path, 64, margins=(16, 32, 0, 0))
    assert masked[:32].all() and masked[:, :16].all() and masked.sum() == 64 * 64 - 48 * 32
    assert np.array_equal(square[32:, 16:], pixels)


def test_canvas_refuses_what_does_not_fit(tmp_path):
    path, _ = image_file(tmp_path / "a.png")
    with pytest.raises(ValueError, match="--box 9 2 9 3: expected left < right"):
        open_canvas(path, 32, boxes=[(9, 2, 9, 3)])
    with pytest.raises(ValueError, match="inside the image's 48x32 pixels"):
        open_canvas(path, 32, boxes=[(0, 0, 49, 3)])
    other, _ = image_file(tmp_path / "b.png", 47)
    with pytest.raises(ValueError, match="is 47x32, but --image is 48x32"):
        open_canvas(path, 32, other)


def test_codes_are_masked_by_any_pixel_and_blended():
    masked = np.zeros((8, 8), bool)
    masked[3, 4] = True
    anew = mask_of_codes(masked, (4, 4))
    assert anew[1, 2] and anew.sum() == 1
    black, white = np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)
    hard = blend(black, white, anew, 0)
    assert (hard[2:4, 4:6] == 255).all() and hard.sum() == 4 * 3 * 255
    soft = blend(black, white, anew, 1)
    assert (soft[2:4, 4:6] == 255).all() and 0 < soft[1, 4, 0] < 255 and soft[0, 0, 0] == 0
