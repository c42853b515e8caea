"""The picture to edit: image and mask files -> square pixels and a mask of codes, and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from dataset.augmentation import center_crop
from dataset.imagenet import open_image
from utils.images import enlarge

GREY = 128  # of a larger canvas, before it is filled
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the image


def open_canvas(
    image_path: str | Path | BinaryIO,
    size: int,
    mask_path: str | Path | BinaryIO | None = None,
    boxes: Sequence[Box] = (),
    margins: Box = (0, 0, 0, 0),
) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels uint8 (S, S, 3) and a mask bool (S, S), True where the image is made anew.

    The image is put on a canvas larger by ``margins`` (left, top, right, bottom pixels), which are
    masked, as are ``boxes`` and what is not black in the mask file, of the image's size. Then both
    are cut to the central square and resized to ``size``, the model's. A pixel is masked if any
    part of it was. Raises ``ValueError`` if mask or boxes do not fit the image.
    """
    image = open_image(image_path)
    masked = np.zeros((image.height, image.width), bool)  # (H, W)
    if mask_path is not None:
        mask = open_image(mask_path)
        if mask.size != image.size:
            raise ValueError(
                f"--mask {mask_path} is {mask.width}x{mask.height}, but --image is "
                f"{image.width}x{image.height}; they must be equal"
            )
        masked |= np.asarray(mask).max(2) > 0
    for left, top, right, bottom in boxes:
        if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
            raise ValueError(
                f"--box {left} {top} {right} {bottom}: expected left < right and top < bottom "
                f"inside the image's {image.width}x{image.height} pixels"
            )
        masked[top:bottom, left:right] = True

    left, top, right, bottom = margins
    pad = ((top, bottom), (left, right))
    masked = np.pad(masked, pad, constant_values=True)
    pixels = np.pad(np.asarray(image), (*pad, (0, 0)), constant_values=GREY)
    square = center_crop(Image.fromarray(pixels), size).copy()  # (S, S, 3), writable
    return square, _shrink_mask(masked, size)


def _shrink_mask(masked: np.ndarray, size: int) -> np.ndarray:
    """Cut a mask (H, W) to its central square and resize it: True where any pixel was."""
    height, width = masked.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = torch.from_numpy(masked[top : top + side, left : left + side]).float()
    return F.adaptive_max_pool2d(square[None], size)[0].numpy() > 0  # (S, S)


def mask_of_codes(masked: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Return bool (h, w), True for codes to make anew: any of their pixels in (S, S) is masked."""
    cells = masked.reshape(grid[0], masked.shape[0] // grid[0], grid[1], -1)  # (h, f, w, f)
    return np.asarray(cells.any((1, 3)))  # (h, w)


def blend(original: np.ndarray, made: np.ndarray, anew: np.ndarray, feather: int) -> np.ndarray:
    """Return uint8 (S, S, 3): ``made`` where codes ``anew`` (h, w) are, elsewhere ``original``.

    feather: width in pixels over which, outside of the codes made anew, one turns into the other.
    """
    share = torch.from_numpy(enlarge(anew, len(original))).float().permute(2, 0, 1)  # (1, S, S)
    if feather:
        width = 2 * feather + 1
        grown = F.max_pool2d(share, width, stride=1, padding=feather)  # (1, S, S)
        soft = F.avg_pool2d(grown, width, 1, feather, count_include_pad=False)  # (1, S, S)
        share = torch.maximum(share, soft)  # (1, S, S)
    weight = share[0, :, :, None].numpy()  # (S, S, 1)
    return (weight * made + (1 - weight) * original).round().astype(np.uint8)
