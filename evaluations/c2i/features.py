"""What the evaluator asks of a network: images in, features and class probabilities out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np
import torch


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
    """``Features`` of a whole set of N images, as numpy arrays."""

    pool: np.ndarray
    spatial: np.ndarray | None
    probabilities: np.ndarray


@torch.inference_mode()
def extract_features(network: FeatureNetwork, batches: Iterable[torch.Tensor], device: torch.device) -> ImageFeatures:
    """Run every batch (B, H, W, 3) through ``network`` on ``device`` and join the results in order."""
    pool, spatial, probabilities = [], [], []
    # cudnn's default rounds the inputs of a float32 convolution to 10 bits
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for images in batches:
            features = network(images.to(device))
            pool.append(features.pool.cpu().numpy())
            probabilities.append(features.probabilities.cpu().numpy())
            if features.spatial is not None:
                spatial.append(features.spatial.cpu().numpy())
    return ImageFeatures(
        np.concatenate(pool), np.concatenate(spatial) if spatial else None, np.concatenate(probabilities)
    )
