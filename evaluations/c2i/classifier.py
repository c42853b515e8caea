"""A small image classifier that replaces Inception for few and small images, as in the quickstart.

Its metrics are comparable only between runs on the same data with the same classifier file.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evaluations.c2i.features import Features
from utils.checkpoints.weights_file import (
    load_checkpoint,
    load_strictly,
    require_facts,
    save_checkpoint,
)
from utils.records import build


@dataclass(frozen=True)
class ClassifierConfig:
    """Side of the images in pixels, number of classes, number of pool features."""

    image_size: int
    num_classes: int
    width: int = 64

    def __post_init__(self) -> None:
        if self.width < 4:
            raise ValueError("the width is below 4")


class SmallClassifier(nn.Module):
    """A ``FeatureNetwork``: images (B, S, S, 3) -> ``Features`` without spatial features."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.stem = _conv(3, width // 4)
        self.down1 = _conv(width // 4, width // 2, stride=2)
        self.conv1 = _conv(width // 2, width)
        self.down2 = _conv(width, width, stride=2)
        self.conv2 = _conv(width, width)
        self.head = nn.Linear(width, config.num_classes)

    def forward(self, images: Tensor) -> Features:
        """``images`` (B, S, S, 3) uint8, or float32 in 0-255; ``ValueError`` for another size."""
        size = self.config.image_size
        if tuple(images.shape[1:]) != (size, size, 3):
            shape = "x".join(str(n) for n in images.shape[1:])
            raise ValueError(
                f"the feature network was trained on {size}x{size}x3 images, these are {shape}"
            )
        pool = self.pool_features(images.permute(0, 3, 1, 2).float() / 127.5 - 1)  # (B, D)
        return Features(pool, None, self.head(pool).softmax(dim=1))

    def pool_features(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] -> (B, D), input of the last linear layer."""
        x = self.stem(x)  # (B, D/4, S, S)
        x = self.conv1(self.down1(x))  # (B, D, S/2, S/2)
        x = self.conv2(self.down2(x))  # (B, D, S/4, S/4)
        return x.mean(dim=(2, 3))  # (B, D)

    def logits(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] -> (B, classes)."""
        return self.head(self.pool_features(x))


def _conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


def save_classifier(
    path: str | Path, network: SmallClassifier, classes: list[str], **facts: Any
) -> None:
    """Write weights, config, classes and ``facts`` atomically; ``load_classifier`` reads them."""
    content = {
        "model": network.state_dict(),
        "config": asdict(network.config),
        "classes": classes,
        **facts,
    }
    save_checkpoint(content, path)


def load_classifier(path: str | Path, option: str) -> tuple[SmallClassifier, dict[str, Any]]:
    """Return the network, in evaluation mode on the CPU, and the content of its file.

    Raises ``ValueError`` naming ``option`` if the file was not written by ``save_classifier``.
    """
    content = load_checkpoint(path, option)
    config, state = content.get("config"), content.get("model")
    if not isinstance(state, dict) or not isinstance(config, dict):
        raise ValueError(
            f"{option}: {path} was not written by scripts/quickstart/train_classifier.py"
        )
    require_facts(content, f"{option}: {path}")
    with torch.device("meta"):
        network = SmallClassifier(build(ClassifierConfig, config, f"{option}: {path}: its config"))
    load_strictly(network, state, path, "its own config")
    return network.eval().requires_grad_(False), content
