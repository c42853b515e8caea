"""Crops: exact to the pixel against the published code."""

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torchvision.transforms import TenCrop

from dataset.augmentation import center_crop, crop_names, random_crop, take_crops


@pytest.mark.parametrize("name", ["plain", "tall", "halved", "small"])
def test_crops_are_golden(golden, name):
    file = golden("crops.npz")
    if str(file["pillow"]).split(".")[0] != PIL.__version__.split(".")[0]:
        pytest.skip(f"golden crops are of Pillow {file['pillow']}, this is {PIL.__version__}")
    image = Image.fromarray(file[name])
    resized = center_crop(image, 70)
    assert np.array_equal(resized, file[f"{name}_center70"])
    assert np.array_equal(center_crop(image, 64), file[f"{name}_center64"])
    crops = take_crops(torch.from_numpy(resized.copy())[None], 64, ten_crop=True, flips=True)[0]
    assert np.array_equal(crops.numpy(), file[f"{name}_tencrop64"])


@pytest.mark.parametrize("resized, size", [(70, 64), (69, 64), (64, 64)])
def test_ten_crop_is_torchvisions(resized, size):
    """Also where the margin is odd, so that mirrored centres are not centres of the mirrored."""
    pixels = torch.randint(256, (2, resized, resized, 3), dtype=torch.uint8)
    ours = take_crops(pixels, size, ten_crop=True, flips=True)
    theirs = torch.stack(TenCrop(size)(pixels.permute(0, 3, 1, 2)), 1).permute(0, 1, 3, 4, 2)
    assert torch.equal(ours, theirs)


def test_plain_crops_are_the_image_and_its_mirror():
    pixels = torch.randint(256, (2, 8, 8, 3), dtype=torch.uint8)
    crops = take_crops(pixels, 8, ten_crop=False, flips=True)
    assert torch.equal(crops[:, 0], pixels)
    assert torch.equal(crops[:, 1], pixels.flip(2))
    assert take_crops(pixels, 8, ten_crop=False, flips=False).shape[1] == 1


@pytest.mark.parametrize("ten_crop", [True, False])
@pytest.mark.parametrize("flips", [True, False])
def test_every_crop_has_a_name(ten_crop, flips):
    crops = take_crops(torch.zeros(1, 9, 9, 3), 8, ten_crop, flips)
    names = crop_names(ten_crop, flips)
    assert len(names) == len(set(names)) == crops.shape[1]


def test_random_crop_keeps_its_bounds_and_its_randomness():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    one = random_crop(image, 32, np.random.default_rng([1, 2]))
    assert one.shape == (32, 32, 3)
    assert np.array_equal(one, random_crop(image, 32, np.random.default_rng([1, 2])))
    assert not np.array_equal(one, random_crop(image, 32, np.random.default_rng([1, 3])))
