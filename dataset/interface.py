"""What every reader of cached codes offers."""

from __future__ import annotations

import numpy as np


class Codes:
    """Interface of the readers: random access to the cached codes of a data set."""

    labels: np.ndarray  # (N,) int64
    num_crops: int
    num_tokens: int
    num_classes: int
    crop_weights: np.ndarray | None = None  # (num_crops,) probability of each crop; None: equal
    meta: dict  # as in meta.json; empty for the published layout

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, images: np.ndarray, crops: np.ndarray) -> np.ndarray:
        """Return codes (B, tokens) int64, in raster order, of B (image, crop) pairs."""
        raise NotImplementedError

    def batch(self, images: np.ndarray, crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return codes (B, tokens) int64 and labels (B,) int64 of B (image, crop) pairs."""
        return self.gather(images, crops), self.labels[images]
