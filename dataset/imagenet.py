"""Class folders -> images: any folder with one sub-folder per class, as ImageNet has."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dataset.augmentation import center_crop, random_crop
from utils.files import atomic_path, require_folder
from utils.npz import map_member, open_npz

IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
BITS_PER_SAMPLE = 258  # a tag of TIFF files
LOOKED_AT = 20  # images, see ``say_if_enlarged``


def open_image(path: str | Path | BinaryIO) -> Image.Image:
    """Read an image file, by its path or opened, of any mode as upright 8-bit RGB.

    Raises ``ValueError`` with the path if the file is not a readable image. An ``OSError`` of the
    disk or network is passed on: the image itself may be intact.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # whole numbers, which convert would clip at 255
                image = _highest_byte(image, file)
            return image.convert("RGB")
    except Exception as error:  # a broken file may break the decoder in any way
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(
            f"{path} is not a readable image: {error or type(error).__name__}"
        ) from error


def _highest_byte(image: Image.Image, file: Image.Image) -> Image.Image:
    """Return grey of more than 8 bits as its highest 8: of 12 where a TIFF says so, else of 16, or
    of 32 if there are larger values.
    """
    values = np.asarray(image).astype(np.int64)  # (H, W)
    (bits, *_) = getattr(file, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))
    bits = 12 if bits == 12 else 16 if values.max() < 1 << 16 else 32
    return Image.fromarray((values.clip(0, (1 << bits) - 1) >> bits - 8).astype(np.uint8))


class Listing(NamedTuple):
    """Class names, sorted, and (path, label) of every image file."""

    classes: list[str]
    samples: list[tuple[str, int]]


def list_images(root: str | Path, option: str = "--data-path") -> Listing:
    """List the files of ``root`` in the order of torchvision's ImageFolder, unopened.

    torchvision itself takes over a second to import. Raises ``ValueError`` if there are none.
    """
    require_folder(root, option, "expected one sub-folder of images per class")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not classes:
        raise ValueError(f"{option}: {root} has no class folders; expected {root}/<class>/<image>")
    samples = []
    for label, name in enumerate(classes):
        for folder, _, files in sorted(os.walk(os.path.join(root, name), followlinks=True)):
            images = sorted(file for file in files if file.lower().endswith(IMG_EXTENSIONS))
            start = os.path.join(folder, "")
            samples += [(start + file, label) for file in images]
    if not samples:
        raise ValueError(f"{option}: no images in the class folders of {root}")
    return Listing(classes, samples)


class ImagePaths(Sequence[str]):
    """Paths of image files below a folder, packed in one array, and their labels (N,) int64.

    Processes share its memory, where a list would be copied to each, or map it from a file.
    """

    def __init__(self, root: str | Path, text: np.ndarray, ends: np.ndarray, labels: np.ndarray):
        self.root = root
        self.text = text  # uint8: paths relative to ``root``, one per line
        self.ends = ends  # (N,) int64: where each path ends in ``text``
        self.labels = labels

    @classmethod
    def pack(cls, samples: list[tuple[str, int]], root: str | Path = "") -> ImagePaths:
        """Pack (path, label) of files whose paths all begin with ``root``."""
        start = len(os.path.join(root, ""))
        paths = [os.fsencode(path[start:]) for path, _ in samples]
        lengths = np.fromiter(map(len, paths), np.int64, len(paths))
        labels = np.fromiter((label for _, label in samples), np.int64, len(samples))
        text = np.frombuffer(b"\n".join(paths), np.uint8)
        return cls(root, text, np.cumsum(lengths + 1) - 1, labels)

    @classmethod
    def load(cls, path: str | Path, root: str | Path) -> ImagePaths:
        """Map what ``save`` has written; ``ValueError`` if the file is not whole."""
        with open_npz(path) as archive:
            return cls(root, *(map_member(archive, name) for name in ("text", "ends", "labels")))

    def save(self, path: str | Path) -> None:
        """Write paths and labels to an ``.npz``, whole or not at all."""
        with atomic_path(path) as temporary, open(temporary, "wb") as f:
            np.savez(f, text=self.text, ends=self.ends, labels=self.labels)

    def sha256(self) -> str:
        """Return the hex SHA-256 of the relative paths, one per line."""
        return hashlib.sha256(self.text.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        start = self.ends[index - 1] + 1 if index else 0
        return os.path.join(self.root, os.fsdecode(self.text[start : self.ends[index]].tobytes()))


def say_if_enlarged(samples: list[tuple[str, int]], size: int, logger: logging.Logger) -> None:
    """Warn if some of the images, of a few that are looked at, are smaller than ``size``."""
    sides = []
    for path, _ in samples[:: max(1, len(samples) // LOOKED_AT)]:
        with contextlib.suppress(OSError), Image.open(path) as image:  # of its header alone
            sides.append(min(image.size))
    if sides and min(sides) < size:
        small = sum(side < size for side in sides)
        logger.warning(
            f"{small} of {len(sides)} images looked at are smaller than {size} pixels (the "
            f"smallest {min(sides)}) and are enlarged"
        )


@dataclass(frozen=True)
class CenterCrop:
    """Transform for ``ImageFiles``: central square of side ``size``."""

    size: int

    def __call__(self, image: Image.Image, key: tuple[int, int]) -> np.ndarray:
        return center_crop(image, self.size)


@dataclass(frozen=True)
class RandomCrop:
    """Random crop of side ``size`` for ``ImageFiles``; with ``flip``, half are mirrored."""

    size: int
    flip: bool
    seed: int

    def __call__(self, image: Image.Image, key: tuple[int, int]) -> np.ndarray:
        rng = np.random.default_rng([self.seed, *key])
        pixels = random_crop(image, self.size, rng)
        return pixels[:, ::-1] if self.flip and rng.random() < 0.5 else pixels


class Unreadable(NamedTuple):
    """Stands for an unreadable image; ``fatal`` if the disk failed rather than the image."""

    image: int
    reason: str
    fatal: bool


class ImageFiles(torch.utils.data.Dataset):
    """Data set of decoded files under ``transform`` (PIL image, key -> uint8 (H, W, 3) array).

    Items are looked up by key, which is (index, epoch): transforms draw their randomness from the
    key, so that an item does not depend on when and where it is made. With ``tolerant``, an
    unreadable file gives ``Unreadable`` instead of an error.
    """

    def __init__(
        self,
        samples: list[tuple[str, int]] | ImagePaths,
        transform: Callable[[Image.Image, tuple[int, int]], np.ndarray],
        tolerant: bool = False,
    ):
        self.paths = samples if isinstance(samples, ImagePaths) else ImagePaths.pack(samples)
        self.labels = self.paths.labels  # (N,)
        self.transform = transform
        self.tolerant = tolerant

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int] | Unreadable:
        """Return uint8 (H, W, 3), label and index."""
        index = key[0]
        try:
            pixels = self.transform(open_image(self.paths[index]), key)
        except (ValueError, OSError) as error:
            if not self.tolerant:
                raise
            return Unreadable(index, str(error), fatal=isinstance(error, OSError))
        pixels = torch.from_numpy(np.array(pixels))  # a copy: torch wants to write
        return pixels, int(self.labels[index]), index

    def __len__(self) -> int:
        return len(self.labels)


def to_model_range(pixels: Tensor, device: torch.device) -> Tensor:
    """uint8 (..., H, W, 3) -> float32 (N, 3, H, W) in [-1, 1], leading dimensions flattened.

    Channels-last in memory, as the pixels are.
    """
    pixels = pixels.to(device, non_blocking=True).flatten(0, -4).permute(0, 3, 1, 2)  # (N, 3, H, W)
    return pixels.float() / 127.5 - 1.0  # (N, 3, H, W)
