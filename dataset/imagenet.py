"""Class folders -> images: any folder with one sub-folder per class, as ImageNet has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder

from utils.files import require_folder


def open_image(path: str | Path) -> Image.Image:
    """An image file as upright 8-bit RGB, whatever its mode; ``ValueError`` with the path if it cannot be read."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16-bit grey: keep the high byte, where convert would clip
                image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable image: {error}") from error


def list_images(root: str | Path, option: str = "--data-path") -> ImageFolder:
    """Classes (sorted folder names) and files of ``root``, in torchvision's order; ``ValueError`` if there are none.

    Only ``classes`` and ``samples`` (path, label) are used; nothing is opened.
    """
    require_folder(root, option, "expected one sub-folder of images per class")
    try:
        listing = ImageFolder(str(root), allow_empty=True)
    except FileNotFoundError as error:
        raise ValueError(f"{option}: {root} has no class folders; expected {root}/<class>/<image>") from error
    if not listing.samples:
        raise ValueError(f"{option}: no images in the class folders of {root}")
    return listing


class Unreadable(NamedTuple):
    """Stands for an image that could not be read."""

    index: int
    reason: str


class ImageFiles(torch.utils.data.Dataset):
    """Decode files and apply ``transform`` (PIL image, key -> uint8 (H, W, 3) array); items are looked up by key.

    A key is (index, epoch): a transform that needs randomness draws it from these, so that an item is the same
    whenever and wherever it is made. With ``tolerant`` an unreadable file yields ``Unreadable``, else a ``ValueError``.
    """

    def __init__(
        self,
        samples: list[tuple[str, int]],
        transform: Callable[[Image.Image, tuple[int, int]], np.ndarray],
        tolerant: bool = False,
    ):
        self.samples = samples
        self.transform = transform
        self.tolerant = tolerant

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int, int] | Unreadable:
        """uint8 (H, W, 3), label, index."""
        path, label = self.samples[key[0]]
        try:
            pixels = self.transform(open_image(path), key)
        except ValueError as error:
            if not self.tolerant:
                raise
            return Unreadable(key[0], str(error))
        return torch.from_numpy(np.array(pixels)), label, key[0]  # a copy: torch wants writable memory

    def __len__(self) -> int:
        return len(self.samples)


def to_model_range(pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 (..., H, W, 3) -> float32 (N, 3, H, W) in [-1, 1] on ``device``, leading dimensions flattened.

    Channels-last in memory: the view of the pixels as they are.
    """
    pixels = pixels.to(device, non_blocking=True).flatten(0, -4).permute(0, 3, 1, 2)  # (N, 3, H, W)
    return pixels.float() / 127.5 - 1.0  # (N, 3, H, W)
