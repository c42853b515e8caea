"""Tensors to pixels, and picture grids."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from utils.files import atomic_path

SHOWN_SIDE = 96  # pixels: smaller images are enlarged in pictures to be looked at


def to_uint8(images: Tensor, size: int | None = None) -> Tensor:
    """[-1, 1] float (B, 3, H, W) -> uint8 (B, size, size, 3), rounded as the released sampler does.

    Bicubic resize without antialiasing when ``size`` differs from H x W, then
    trunc(clamp(127.5 x + 128, 0, 255)).
    """
    if size is not None and tuple(images.shape[-2:]) != (size, size):
        images = F.interpolate(images, size=(size, size), mode="bicubic")  # (B, 3, S, S)
    values = (127.5 * images + 128.0).clamp(0, 255)  # (B, 3, S, S)
    return values.permute(0, 2, 3, 1).to(torch.uint8)  # (B, S, S, 3)


def enlarge(cells: np.ndarray, size: int) -> np.ndarray:
    """Repeat each value of a square grid (h, h) over its pixels: (size, size, 1)."""
    side = size // len(cells)
    return cells.repeat(side, 0).repeat(side, 1)[..., None]  # (S, S, 1)


def enlarge_small(images: np.ndarray) -> np.ndarray:
    """Repeat pixels of images (..., H, W, 3) lower than ``SHOWN_SIDE`` until they are as high."""
    factor = max(1, -(-SHOWN_SIDE // images.shape[-3]))
    return images.repeat(factor, -3).repeat(factor, -2)


def encode_png(pixels: np.ndarray) -> bytes:
    """Return uint8 (H, W, 3) or (H, W) as the content of a PNG file."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    return content.getvalue()


def save_png(path: str | Path, pixels: np.ndarray) -> None:
    """Write uint8 (H, W, 3) as PNG, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(encode_png(pixels))


def image_grid(pixels: np.ndarray, columns: int, padding: int = 2) -> np.ndarray:
    """uint8 (N, H, W, 3) -> one picture of ``columns``, with white gaps of ``padding`` pixels."""
    n, h, w, c = pixels.shape
    rows = -(-n // columns)
    shape = (rows * (h + padding) + padding, columns * (w + padding) + padding, c)
    canvas = np.full(shape, 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = padding + i // columns * (h + padding), padding + i % columns * (w + padding)
        canvas[top : top + h, left : left + w] = image
    return canvas


def labelled_rows(pixels: np.ndarray, labels: Sequence[str], padding: int = 2) -> np.ndarray:
    """uint8 (R, N, H, W, 3) -> one picture, a row of N images, small ones enlarged, per label."""
    columns, height = pixels.shape[1], 16
    rows = []
    for images, label in zip(enlarge_small(pixels), labels, strict=True):
        row = image_grid(images, columns, padding)  # (H', W', 3)
        caption = Image.new("RGB", (row.shape[1], height), "white")
        ImageDraw.Draw(caption).text(
            (padding, 1), label, fill="black", font=ImageFont.load_default(12)
        )
        rows += [np.asarray(caption), row]
    return np.concatenate(rows)


def encode_gif(frames: Sequence[np.ndarray], milliseconds: int = 80) -> bytes:
    """Return uint8 frames (H, W, 3) as an endless animation that rests on the last."""
    first, *others = (Image.fromarray(f) for f in frames)
    durations = [milliseconds] * len(others) + [2000]
    content = io.BytesIO()
    first.save(
        content, format="GIF", save_all=True, append_images=others, duration=durations, loop=0
    )
    return content.getvalue()


def save_gif(path: str | Path, frames: Sequence[np.ndarray]) -> None:
    """Write ``encode_gif`` of frames atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(encode_gif(frames))
