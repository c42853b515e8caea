"""Class folders -> images: any folder with one sub-folder per class, as ImageNet has."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder

from dataset.augmentation import center_crop, random_crop
from utils.files import require_folder


def open_image(path: str | Path) -> Image.Image:
    """An image file as upright 8-bit RGB, whatever its mode.

    Raises ``ValueError`` with the path if the file is no readable image, and the ``OSError`` itself where the disk or
    the network fails: that says nothing about the image.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16-bit grey: keep the high byte, where convert would clip
                image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:  # a broken file may break the decoder in any way
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path} is not a readable image: {error or type(error).__name__}") from error


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


@dataclass(frozen=True)
class CenterCrop:
    """Transform for ``ImageFiles``: the central square of side ``size``."""

    size: int

    def __call__(self, image: Image.Image, key: tuple[int, int]) -> np.ndarray:
        return center_crop(image, self.size)


@dataclass(frozen=True)
class RandomCrop:
    """Transform for ``ImageFiles``: a random crop of side ``size``, mirrored half the time if ``flip``."""

    size: int
    flip: bool
    seed: int

    def __call__(self, image: Image.Image, key: tuple[int, int]) -> np.ndarray:
        rng = np.random.default_rng([self.seed, *key])
        pixels = random_crop(image, self.size, rng)
        return pixels[:, ::-1] if self.flip and rng.random() < 0.5 else pixels


class Unreadable(NamedTuple):
    """Stands for an image that could not be read; ``fatal`` where the disk failed and not the image."""

    index: int
    reason: str
    fatal: bool


class ImageFiles(torch.utils.data.Dataset):
    """Decode files and apply ``transform`` (PIL image, key -> uint8 (H, W, 3) array); items are looked up by key.

    A key is (index, epoch): a transform that needs randomness draws it from these, so that an item is the same
    whenever and wherever it is made. With ``tolerant`` an unreadable file yields ``Unreadable``, else an error.
    Paths are kept in one array, which worker processes share; a list would be copied to each as it is read.
    """

    def __init__(
        self,
        samples: list[tuple[str, int]],
        transform: Callable[[Image.Image, tuple[int, int]], np.ndarray],
        tolerant: bool = False,
    ):
        paths = [os.fsencode(path) for path, _ in samples]
        self.paths = np.frombuffer(b"".join(paths), np.uint8)
        self.ends = np.cumsum([len(p) for p in paths])
        self.labels = np.array([label for _, label in samples], np.int64)
        self.transform = transform
        self.tolerant = tolerant

    def path(self, index: int) -> str:
        """Path of one file."""
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(self.paths[start : self.ends[index]].tobytes())

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int, int] | Unreadable:
        """uint8 (H, W, 3), label, index."""
        index = key[0]
        try:
            pixels = self.transform(open_image(self.path(index)), key)
        except (ValueError, OSError) as error:
            if not self.tolerant:
                raise
            return Unreadable(index, str(error), fatal=isinstance(error, OSError))
        return torch.from_numpy(np.array(pixels)), int(self.labels[index]), index  # a copy: torch wants to write

    def __len__(self) -> int:
        return len(self.labels)


def to_model_range(pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 (..., H, W, 3) -> float32 (N, 3, H, W) in [-1, 1] on ``device``, leading dimensions flattened.

    Channels-last in memory: the view of the pixels as they are.
    """
    pixels = pixels.to(device, non_blocking=True).flatten(0, -4).permute(0, 3, 1, 2)  # (N, 3, H, W)
    return pixels.float() / 127.5 - 1.0  # (N, 3, H, W)
