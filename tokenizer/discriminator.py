"""The two discriminators of tokenizer training: images (B, 3, S, S) in [-1, 1] -> logits, high for
real ones.

- PatchGAN (Isola et al. 2017, section 3.2.2): a logit for each overlapping patch of 70x70 pixels
- StyleGAN (Karras et al. 2020, the residual discriminator without minibatch statistics): one logit
  per image
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn


def leaky_relu(x: Tensor) -> Tensor:
    """Return x, and 0.2 x where x is below 0."""
    return F.leaky_relu(x, 0.2)


class PatchGAN(nn.Module):
    """Convolutions of side 4, strides 2, 2, 2, 1, 1; current-batch norm on all but first and last.

    Real and reconstructed images must come in batches of their own, as each batch is normalised by
    itself. There are no running statistics: the module has no state but its parameters.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.conv_in = nn.Conv2d(3, width, 4, stride=2, padding=1)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 4, stride=s, padding=1, bias=False)
            for a, b, s in zip(widths[:-1], widths[1:], (2, 2, 1), strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(b, track_running_stats=False) for b in widths[1:])
        self.conv_out = nn.Conv2d(widths[-1], 1, 4, padding=1)

    def init_weights(self) -> None:
        """Initialise for training, as pix2pix does.

        ============  ==============
        convolutions  N(0, 0.02)
        norm weights  N(1, 0.02)
        norm biases   0
        ============  ==============
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = leaky_relu(self.conv_in(images))  # (B, C, S/2, S/2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = leaky_relu(norm(conv(x)))  # (B, C', H, W); S/4, S/8, S/8 - 1
        return self.conv_out(x)  # (B, 1, S/8 - 2, S/8 - 2)


class StyleBlock(nn.Module):
    """(skip + blurred, halved convolutions) / sqrt(2)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.skip = nn.Conv2d(in_channels, out_channels, 1, stride=2)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        # here: timm takes 1.5 s to import, and PatchGAN does without
        from timm.layers import BlurPool2d

        self.blur = BlurPool2d(out_channels, filt_size=3, stride=1)
        self.down = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = leaky_relu(self.conv2(leaky_relu(self.conv1(x))))  # (B, C', H, W)
        return (self.skip(x) + self.down(self.blur(h))) / math.sqrt(2)  # (B, C', H/2, W/2)


class StyleGAN(nn.Module):
    """Residual blocks halving S x S to 4 x 4, two dense layers; width 16384 / side, at most 512.

    Every layer keeps torch's default initialisation, as published.
    """

    def __init__(self, image_size: int):
        super().__init__()
        sides = [image_size >> i for i in range((image_size // 4).bit_length())]  # S ... 4
        widths = [min(512, 16384 // side) for side in sides]
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            StyleBlock(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.conv_out = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
        self.dense = nn.Linear(16 * widths[-1], widths[-1])
        self.logit = nn.Linear(widths[-1], 1)

    def forward(self, images: Tensor) -> Tensor:
        x = leaky_relu(self.conv_in(images))  # (B, C, S, S)
        for block in self.blocks:
            x = block(x)  # (B, C', H/2, W/2)
        x = leaky_relu(self.conv_out(x)).flatten(1)  # (B, 16 * C)
        return self.logit(leaky_relu(self.dense(x)))  # (B, 1)


def make_discriminator(kind: str, image_size: int) -> PatchGAN | StyleGAN:
    """Return a new discriminator for square images; ``ValueError`` if their size does not fit."""
    if kind == "patchgan":
        if image_size < 24:
            raise ValueError(
                "--disc-type patchgan takes images of 24 pixels or more, not "
                f"--image-size {image_size}"
            )
        model = PatchGAN()
        model.init_weights()
        return model
    if image_size < 8 or image_size & (image_size - 1):
        raise ValueError(
            f"--disc-type stylegan halves images down to 4x4: --image-size {image_size} is "
            "not a power of 2 above 4"
        )
    return StyleGAN(image_size)
