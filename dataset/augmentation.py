"""All crops: centre, random and ten-crop, equal to the published code's pixel by pixel."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MAX_PIXELS = 100_000_000  # of a resized image; a 1x300,000 image would need gigabytes
FIVE_CROPS = ("top_left", "top_right", "bottom_left", "bottom_right", "center")


def _shrink(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to ``size``: halve by box filter if possible, then bicubic (ADM)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    if max(image.size) * scale * size > MAX_PIXELS:
        raise ValueError(
            f"an image of {image.width}x{image.height} is too thin to resize its "
            f"shorter side to {size}"
        )
    return image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )


def center_crop(image: Image.Image, size: int) -> np.ndarray:
    """Resize the shorter side to ``size``, return the central square: uint8 (size, size, 3).

    The crop of ADM (Dhariwal & Nichol 2021).
    """
    pixels = np.asarray(_shrink(image, size))
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def random_crop(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    min_fraction: float = 0.8,
    max_fraction: float = 1.0,
) -> np.ndarray:
    """Return a random square crop of ``image``: uint8 (size, size, 3).

    Its side is ``min_fraction``..``max_fraction`` of the shorter one: the training crop of ADM.
    """
    shorter = rng.integers(int(np.ceil(size / max_fraction)), int(np.ceil(size / min_fraction)) + 1)
    pixels = np.asarray(_shrink(image, int(shorter)))
    top, left = rng.integers(pixels.shape[0] - size + 1), rng.integers(pixels.shape[1] - size + 1)
    return pixels[top : top + size, left : left + size]


def crop_names(ten_crop: bool, flips: bool) -> list[str]:
    """Return the names of the crops of ``take_crops``, in order."""
    names = list(FIVE_CROPS if ten_crop else FIVE_CROPS[-1:])
    return names + [f"{n}_of_flipped" for n in names] if flips else names


def take_crops(images: Tensor, size: int, ten_crop: bool, flips: bool) -> Tensor:
    """Crop (B, H, W, 3) to (B, K, size, size, 3), K = (5 or 1) x (2 with flips), as TenCrop.

    Four corners and centre (or only the centre), then the same positions of the mirrored images.
    """
    h, w = images.shape[1:3]
    bottom, right = h - size, w - size
    middle = (round(bottom / 2), round(right / 2))
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right)] if ten_crop else []
    sources = (images, images.flip(2)) if flips else (images,)
    crops = [s[:, t : t + size, f : f + size] for s in sources for t, f in [*corners, middle]]
    return torch.stack(crops, dim=1)  # (B, K, S, S, 3)
