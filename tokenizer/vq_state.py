"""What changes in training besides weights: the discriminator's state, codebook entries."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dataset.imagenet import to_model_range
from tokenizer.vq_model import VQModel
from utils.distributed import World
from utils.precision import autocast
from utils.training.state import Guard, TrainingState

KMEANS_ITERATIONS = 10
LATENTS_PER_ENTRY = 8  # of the first images, to place each entry of a new codebook


@dataclass
class VQState(TrainingState):
    """State of the tokenizer and its discriminator, saved and resumed as one."""

    discriminator: TrainingState | None = None

    def set_learning_rate(self, lr: float) -> None:
        """Set it for both."""
        super().set_learning_rate(lr)
        if self.discriminator:
            self.discriminator.set_learning_rate(lr)

    @property
    def guards(self) -> list[Guard]:
        """Guards of both."""
        return super().guards + (self.discriminator.guards if self.discriminator else [])

    def parameters(self) -> list[nn.Parameter]:
        """Parameters of both."""
        others = self.discriminator.parameters() if self.discriminator else []
        return super().parameters() + others

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of the tokenizer, and those of the discriminator under ``discriminator.``."""
        others = self.discriminator.tensors() if self.discriminator else {}
        return super().tensors() | {f"discriminator.{k}": v for k, v in others.items()}

    def scalars(self) -> dict[str, Any]:
        """Scalars of the tokenizer, and those of the discriminator under ``discriminator``."""
        others = {"discriminator": self.discriminator.scalars()} if self.discriminator else {}
        return super().scalars() | others

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        """Restore ``scalars``."""
        super().load_scalars(scalars)
        if self.discriminator:
            self.discriminator.load_scalars(scalars["discriminator"])


@torch.no_grad()
def place_codebook(
    args: Namespace, world: World, model: VQModel, images: Iterable[Tensor], count: int
) -> None:
    """Set a new codebook from latents of ``images``, uint8 (B, S, S, 3), on rank 0 for all.

    Batches are taken until there are enough latents. count: of the images. Raises ``ValueError`` if
    they are too few.
    """
    size, tokens = model.config.codebook_size, model.config.grid(args.image_size) ** 2
    if count * tokens < size:
        raise ValueError(
            f"--codebook-init {args.codebook_init}: {count} images have {count * tokens} "
            f"latents for {size} entries"
        )
    if world.is_main:
        latents: list[Tensor] = []
        for pixels in images:
            latent = model.latent(to_model_range(pixels, world.device))  # (B, C, h, w)
            latents.append(model.quantize.rows(latent))  # (N, C)
            if sum(map(len, latents)) >= LATENTS_PER_ENTRY * size:
                break
        iterations = KMEANS_ITERATIONS if args.codebook_init == "kmeans" else 0
        generator = torch.Generator().manual_seed(args.global_seed)
        model.quantize.fit(torch.cat(latents), iterations, generator)
    entries = world.broadcast(model.quantize.embedding.weight.cpu())  # (V, C)
    model.quantize.embedding.weight.copy_(entries)


@torch.no_grad()
def revive_dead_codes(
    args: Namespace, world: World, state: VQState, images: Tensor, step: int
) -> None:
    """Move dead entries, averaged ones too, to latents of all ranks' ``images`` (b, 3, S, S)."""
    model, average = state.model, state.ema and state.ema.average
    dead = model.quantize.dead()  # (V,)
    with autocast(world.device, args.mixed_precision):
        rows = model.quantize.rows(model.latent(images))  # (N, C)
    generator = torch.Generator().manual_seed(args.global_seed + step)
    model.quantize.move(dead, world.gather(rows), generator)
    if average:
        average["quantize.embedding.weight"][dead] = model.quantize.embedding.weight[dead]
