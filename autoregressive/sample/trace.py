"""Pictures of a batch as it is decoded, step by step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from autoregressive.sample.pipeline import Pipeline
from utils.images import enlarge, enlarge_small, image_grid, save_gif, save_png, to_uint8

GREY = 96  # of codes that are not decoded yet


def frame(pipeline: Pipeline, tokens: Tensor, decoded: int) -> np.ndarray:
    """Return images uint8 (B, S, S, 3) of region-ordered tokens (B, T), grey but for the first
    ``decoded``.
    """
    order = pipeline.gpt.order
    codes = tokens[:, order.inverse.to(tokens.device)]  # (B, T)
    pixels = to_uint8(pipeline.decode(codes)).cpu().numpy()  # (B, S, S, 3)
    there = (order.inverse < decoded).view(order.grid).numpy()  # (h, w)
    return np.where(enlarge(there, pixels.shape[1]), pixels, np.uint8(GREY))


class Trace:
    """Frames of a batch as it is decoded: images of the tokens so far, grey where unknown."""

    def __init__(self, pipeline: Pipeline, frames: int):
        self.pipeline, steps = pipeline, pipeline.gpt.order.steps
        wanted = np.linspace(0, len(steps) - 1, min(frames, len(steps))).round().astype(int)
        self.wanted = [steps[i].end for i in wanted]  # numbers of decoded tokens, least first
        self.frames: list[np.ndarray] = []  # (B, S, S, 3) each

    def __call__(self, tokens: Tensor, decoded: int) -> None:
        """Take a frame: region-ordered tokens (B, T), the first ``decoded`` are known."""
        passed = [count for count in self.wanted if count <= decoded]  # several, by Jacobi
        self.wanted = self.wanted[len(passed) :]
        if passed:
            self.frames += len(passed) * [frame(self.pipeline, tokens, decoded)]


def write_trace(output: Path, traces: list[list[np.ndarray]], columns: int) -> None:
    """Write an animation of all rows of images, and a strip of eight moments of the first image."""
    frames = [
        image_grid(enlarge_small(np.concatenate(rows)), columns)
        for rows in zip(*traces, strict=True)
    ]
    save_gif(output.with_suffix(".gif"), frames)
    moments = np.linspace(0, len(frames) - 1, min(8, len(frames))).round().astype(int)
    strip = np.stack([traces[0][i][0] for i in moments])  # (8, S, S, 3)
    picture = image_grid(enlarge_small(strip), columns=len(strip))
    save_png(output.with_name(f"{output.stem}-strip.png"), picture)
    print(f"{output.with_suffix('.gif')}: {len(frames)} frames")
