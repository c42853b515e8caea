"""What the evaluator asks of a network: images in, features and class probabilities out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import zip_longest
from typing import NamedTuple, Protocol

import numpy as np
import torch

from utils.distributed import World


class Features(NamedTuple):
    """A network's view of B images, float32.

    ``pool`` (B, D) for FID, Precision and Recall; ``spatial`` (B, S) for sFID, or None if the network has none;
    ``probabilities`` (B, classes), rows that sum to 1, for the Inception Score and class accuracy.
    """

    pool: torch.Tensor
    spatial: torch.Tensor | None
    probabilities: torch.Tensor


class FeatureNetwork(Protocol):
    """Any network that can stand in for Inception."""

    def __call__(self, images: torch.Tensor) -> Features:
        """``images`` (B, H, W, 3) uint8, or float32 in the same range 0-255, on the network's device."""
        ...


class ImageFeatures(NamedTuple):
    """``Features`` of a whole set of N images as numpy arrays, and a hash of each image's pixels (N,) uint64."""

    pool: np.ndarray
    spatial: np.ndarray | None
    probabilities: np.ndarray
    hashes: np.ndarray


@torch.inference_mode()
def extract_features(network: FeatureNetwork, batches: Iterable[torch.Tensor], world: World) -> ImageFeatures | None:
    """Run every batch (B, H, W, 3) through ``network`` and join the results in order, on rank 0; None elsewhere.

    ``batches`` are those of this rank, which must be each ``world.size``-th one of the whole set.
    """
    parts = []
    # cudnn's default rounds the inputs of a float32 convolution to 10 bits
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for images in batches:
            found = [None if x is None else x.cpu().numpy() for x in network(images.to(world.device))]
            parts.append((*found, _hashes(images)))
    ranks = world.gather_objects(parts)
    if ranks is None:
        return None
    in_order = [part for row in zip_longest(*ranks) for part in row if part is not None]
    return ImageFeatures(*(None if x[0] is None else np.concatenate(x) for x in zip(*in_order, strict=True)))


def _hashes(images: torch.Tensor) -> np.ndarray:
    digests = b"".join(hashlib.blake2b(image.numpy(), digest_size=8).digest() for image in images)
    return np.frombuffer(digests, np.uint64)
