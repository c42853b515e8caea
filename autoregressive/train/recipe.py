"""Training defaults: the paper's Table 5, or what the published code does (``--recipe as-released``)."""

from __future__ import annotations

from dataclasses import dataclass

LARGE = ("GPT-XXL", "GPT-XXXL", "GPT-1B", "GPT-3B", "GPT-7B")


@dataclass(frozen=True)
class Recipe:
    """Defaults of the options of the same names."""

    lr: float
    lr_schedule: str
    warmup_epochs: int
    global_batch_size: int
    attn_dropout_p: float


def make_recipe(name: str, gpt_model: str) -> Recipe:
    """Defaults of recipe ``paper`` or ``as-released`` for one size (sizes the paper lacks go by their neighbour)."""
    if name == "as-released":
        return Recipe(1e-4, "constant", 0, 256, 0.0)
    if gpt_model in LARGE:
        return Recipe(2e-4, "cosine", 15, 512, 0.1)
    return Recipe(1e-4, "cosine", 15, 256, 0.1)
