"""Validation of a GPT while it trains: loss on held-out codes, and a picture of samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from autoregressive.decoding.generate import generate
from autoregressive.decoding.sampling import SamplingOptions, image_randomness
from autoregressive.models.causal_attention import CausalMask
from autoregressive.models.gpt import GPT
from dataset.interface import Codes
from tokenizer.vq_model import VQModel
from utils.distributed import World
from utils.images import enlarge_small, image_grid, save_png, to_uint8
from utils.precision import autocast

PICTURE = 16  # images
PICTURE_CFG_SCALE = 2.0


@torch.no_grad()
def validate(
    forward: nn.Module,
    model: GPT,
    codes: Codes,
    images: int,
    batch: int,
    world: World,
    precision: str,
) -> dict[str, float]:
    """Return the loss of ``images`` held-out images, evenly spread, one crop each, no dropout.

    ``val/loss`` over all tokens, ``val/loss_first`` over t1..tn, which are predicted one by one,
    and ``val/loss_rest`` over those predicted n at a time. Images that do not divide by the number
    of ranks are left out.

    Compiled blocks run as they are written, as a compilation takes minutes in mid-run; those with
    FlexAttention, which would hold all scores, stay compiled and get batches of one size.
    """
    images = min(images, len(codes))
    each = images // world.size
    sums = torch.zeros(model.order.num_tokens, device=world.device)  # (T,)
    kept = model.block_mask
    if isinstance(kept, CausalMask):  # its pairs are few kernels only when they are compiled
        model.block_mask = None
    flex = model.block_mask is not None
    model.eval()
    with torch.compiler.set_stance("default" if flex else "force_eager"):
        for start in range(0, each, batch):
            count = min(batch, each - start)
            mine = np.arange(start, start + (batch if flex else count)).clip(max=each - 1)  # (b,)
            mine += world.rank * each
            x, y = codes.batch(mine * len(codes) // images, mine % codes.num_crops)  # (b, T), (b,)
            inputs = (torch.from_numpy(a).to(world.device) for a in (x, y))
            with autocast(world.device, precision):
                _, losses = forward(*inputs)  # (b, T)
            sums += losses[:count].sum(0)
    model.train()
    model.block_mask = kept
    mean = world.mean(sums / each)  # (T,)
    n = model.order.n
    parts = {"val/loss": mean, "val/loss_first": mean[:n], "val/loss_rest": mean[n:]}
    return {k: v.mean().item() for k, v in parts.items()}


@torch.no_grad()
def draw_samples(
    model: GPT, vq: VQModel, path: Path, world: World, precision: str, sharded: bool
) -> None:
    """Write a picture of 16 samples of evenly spaced classes, with the same randomness each time.

    Sharded weights take every rank to generate; otherwise only rank 0 does. Compiled blocks run as
    they are written: each layer and many lengths would be compiled anew, in mid-run.
    """
    if not (sharded or world.is_main):
        return
    config = model.config
    classes = torch.arange(PICTURE, device=world.device) * config.num_classes // PICTURE  # (b,)
    _, uniforms = image_randomness(0, range(PICTURE), config.num_classes, model.order.num_tokens)
    u = torch.from_numpy(uniforms).to(world.device)  # (b, T)
    options = SamplingOptions(cfg_scale=PICTURE_CFG_SCALE)
    model.eval()
    with autocast(world.device, precision), torch.compiler.set_stance("force_eager"):
        codes = generate(model, model.order, classes, u, options)  # (b, T)
    model.train()
    if world.is_main:
        pixels = vq.decode_code(codes.view(-1, *model.order.grid))  # (b, 3, S, S)
        images = enlarge_small(to_uint8(pixels).cpu().numpy())  # (b, S', S', 3)
        save_png(path, image_grid(images, columns=4))
