"""Size and losses of a tokenizer; the options that select one."""

from __future__ import annotations

from argparse import _ArgumentGroup
from dataclasses import dataclass

from utils.options import positive_int


@dataclass(frozen=True)
class VQConfig:
    """Architecture and losses of one tokenizer; travels inside our checkpoints as a dict."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    codebook_size: int = 16384
    codebook_embed_dim: int = 8
    codebook_l2_norm: bool = True
    commit_loss_beta: float = 0.25
    entropy_loss_ratio: float = 0.0
    dropout_p: float = 0.0

    @property
    def downsample(self) -> int:
        """Image pixels per code, along each side."""
        return 2 ** (len(self.ch_mult) - 1)

    def grid(self, image_size: int) -> int:
        """Return the codes per side of an image; ``ValueError`` if its size does not divide."""
        if image_size % self.downsample:
            raise ValueError(
                f"--image-size {image_size} is not a multiple of {self.downsample}, the "
                "tokenizer's pixels per code"
            )
        return image_size // self.downsample


# What is not named is the default of VQConfig; VQ-16 has 72M parameters, VQ-8 70M, VQ-4 1M.
VQ_models: dict[str, dict] = {
    "VQ-16": dict(ch=128, ch_mult=(1, 1, 2, 2, 4)),
    "VQ-8":  dict(ch=128, ch_mult=(1, 2, 2, 4)),
    "VQ-4":  dict(ch=32,  ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=64, codebook_size=256),
}  # fmt: skip


def add_tokenizer_options(group: _ArgumentGroup, required: bool = True) -> None:
    """Add the options selecting a tokenizer; all but the file are optional."""
    group.add_argument(
        "--vq-ckpt", required=required, help="tokenizer checkpoint, released or trained here"
    )
    group.add_argument(
        "--vq-model",
        choices=list(VQ_models),
        help="size of the tokenizer (default: the checkpoint's, else VQ-16)",
    )
    group.add_argument(
        "--codebook-size",
        type=positive_int,
        help="codebook entries (default: the checkpoint's, else the size's)",
    )
    group.add_argument(
        "--codebook-embed-dim",
        type=positive_int,
        help="width of a codebook entry (default: the checkpoint's, else 8)",
    )
