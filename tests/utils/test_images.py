"""Pixels and pictures."""

import numpy as np
import torch

from utils.images import image_grid, to_uint8


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
