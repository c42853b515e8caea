"""Embeddings of what is no code: the class, and the learnable tokens that start parallel steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LabelEmbedder(nn.Module):
    """Class ids -> embeddings; the row after the last class is the null class of guidance."""

    def __init__(self, num_classes: int, dim: int, dropout_prob: float):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def drop(self, labels: Tensor) -> Tensor:
        """Return labels (B,) int64, in training null with ``dropout_prob``."""
        if self.training and self.dropout_prob > 0:
            drop = torch.rand(labels.shape, device=labels.device) < self.dropout_prob  # (B,)
            labels = torch.where(drop, self.num_classes, labels)  # (B,)
        return labels

    def forward(self, labels: Tensor) -> Tensor:
        """(B,) int64 -> (B, D)."""
        return self.embedding_table(labels)  # (B, D)


class SpecialTokens(nn.Module):
    """Holder of the n-1 learnable tokens that start parallel prediction (paper, section 3.3).

    It exists for the name that the table has in checkpoints.
    """

    def __init__(self, count: int, dim: int):
        super().__init__()
        self.special_embeddings = nn.Embedding(count, dim)
