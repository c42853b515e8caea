"""Pixels and pictures."""

import numpy as np
import torch

from utils.images import enlarge_small, image_grid, labelled_rows, to_uint8


def test_pixels_are_golden(golden):
    file = golden("sampling.npz")
    pixels = to_uint8(torch.from_numpy(file["pixels_in"]), 64)
    assert np.array_equal(pixels.numpy(), file["pixels_uint8_64"])


def test_image_grid_places_images():
    pixels = (
        np.arange(3, dtype=np.uint8)[:, None, None, None].repeat(2, 1).repeat(2, 2).repeat(3, 3)
    )
    grid = image_grid(pixels, columns=2, padding=1)
    assert grid.shape == (7, 7, 3)
    assert grid[1:3, 4:6].max() == 1 and grid[4:6, 1:3].min() == 2 and grid[0].min() == 255


def test_small_images_are_enlarged_to_be_seen():
    pixels = np.arange(2 * 32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(2, 32, 32, 3)
    large = enlarge_small(pixels)
    assert large.shape == (2, 96, 96, 3) and np.array_equal(large[:, 1::3, 2::3], pixels)
    assert enlarge_small(large).shape == large.shape
    assert enlarge_small(pixels[:, :28, :28]).shape == (2, 112, 112, 3)
    assert labelled_rows(pixels[None], ["a"]).shape == (16 + 100, 2 * 98 + 2, 3)
