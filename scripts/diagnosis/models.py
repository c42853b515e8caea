"""The tiny models of the golden files, whose weights anyone can make again."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping

import numpy as np
import torch

from autoregressive.models.config import GPT_models, GPTConfig
from autoregressive.models.gpt import GPT


def fill_from_names(module: torch.nn.Module) -> torch.nn.Module:
    """Fill every parameter from its name, as the golden files' README has it; return ``module``."""
    for name, parameter in module.named_parameters():
        raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(parameter.numel())
        s = 2.0 * (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53 - 1.0
        if parameter.ndim > 1:
            value = s * math.sqrt(3.0 / math.prod(parameter.shape[1:]))
        else:
            value = 0.1 * s if name.endswith("bias") else 1.0 + 0.1 * s
        parameter.data = torch.from_numpy(value.reshape(parameter.shape)).float()
    return module


def golden_gpt(file: Mapping[str, np.ndarray], **changes: object) -> GPT:
    """Return the GPT of a golden file, in ``eval()`` mode; ``changes``: fields of its config."""
    grid = int(file["grid"])
    config = GPTConfig(
        n_layer=int(file["n_layer"]),
        dim=int(file["dim"]),
        n_head=int(file["n_head"]),
        vocab_size=int(file["vocab"]),
        num_classes=int(file["classes"]),
        grid_height=grid,
        grid_width=grid,
        ar_token_num=int(file["n"]),
        **changes,
    )
    return fill_from_names(GPT(config)).eval()


def parameter_count(name: str) -> int:
    """Return the number of parameters of a size at the published vocabulary and classes."""
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(GPTConfig(**GPT_models[name])).parameters())
