"""An image whose masked codes are made anew, and the completions of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autoregressive.decoding.generate import Generator, StepHook
from autoregressive.sample.canvas import blend
from autoregressive.sample.pipeline import Pipeline
from autoregressive.sample.trace import GREY
from dataset.imagenet import to_model_range
from utils.images import enlarge, to_uint8


def encode(pipeline: Pipeline, pixels: np.ndarray) -> Tensor:
    """Return the raster codes (T,) int64 of an image uint8 (S, S, 3)."""
    with torch.inference_mode():
        images = to_model_range(torch.from_numpy(pixels)[None], pipeline.world.device)
        return pipeline.vq.encode(images).flatten()  # (T,)


@dataclass(frozen=True)
class Edit:
    """What is edited, the same for every class."""

    pixels: np.ndarray  # uint8 (S, S, 3), the image
    codes: Tensor  # int64 (T,), the image's, raster order
    anew: np.ndarray  # bool (h, w), codes to make anew
    generator: Generator

    def covered(self) -> np.ndarray:
        """Return the image with grey codes where it is made anew: uint8 (S, S, 3)."""
        return np.where(enlarge(self.anew, len(self.pixels)), np.uint8(GREY), self.pixels)


@dataclass(frozen=True)
class Completions:
    """N results of one class, each chosen among K candidates."""

    candidates: np.ndarray  # uint8 (N, K, S, S, 3)
    likelihoods: np.ndarray  # float32 (N, K), log, of the kept codes

    @property
    def results(self) -> np.ndarray:
        """The likeliest of each result's candidates: uint8 (N, S, S, 3)."""
        return self.candidates[np.arange(len(self.candidates)), self.likelihoods.argmax(1)]


def complete(
    pipeline: Pipeline,
    edit: Edit,
    label: int,
    randomness: Tensor,
    candidates: int = 1,
    feather: int | None = 0,
    on_step: StepHook | None = None,
) -> Completions:
    """Make N results of one class, each the likeliest of its K candidates.

    randomness: (N K, T), see ``Pipeline.randomness``. feather: pixels over which the image's own
    pixels and new ones are blended; None: all are decoded from codes.
    """
    count, device = len(randomness), pipeline.world.device
    keep = torch.from_numpy(~edit.anew).to(device).view(1, -1)  # (1, T)
    codes = edit.generator(
        torch.full((count,), label, device=device),  # (N K,)
        randomness,
        on_step,
        known=edit.codes.expand(count, -1),
        keep=keep.expand(count, -1),
    )  # (N K, T)

    images = to_uint8(pipeline.decode(codes)).cpu().numpy()  # (N K, S, S, 3)
    if feather is not None:
        images = np.stack([blend(edit.pixels, i, edit.anew, feather) for i in images])
    likelihoods = edit.generator.kept_likelihood[:count].view(-1, candidates)  # (N, K)
    shape = (-1, candidates, *images.shape[1:])
    return Completions(images.reshape(shape), likelihoods.cpu().numpy())
