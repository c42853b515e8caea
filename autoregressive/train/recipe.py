"""Training defaults: the paper's Table 5, or the published code's (``--recipe as-released``)."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict, dataclass

LARGE = ("GPT-XXL", "GPT-XXXL", "GPT-1B", "GPT-3B", "GPT-7B")


@dataclass(frozen=True)
class Recipe:
    """Defaults of the options of the same names: the paper's, for sizes up to XL."""

    lr: float = 1e-4
    lr_schedule: str = "cosine"
    warmup_epochs: float = 15
    global_batch_size: int = 256
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    dropout_p: float = 0.1
    attn_dropout_p: float = 0.1
    token_dropout_p: float = 0.1
    class_dropout_prob: float = 0.1
    epochs: int = 300
    mixed_precision: str = "bf16"  # of the paper; the option's default follows the device


def make_recipe(name: str, gpt_model: str) -> Recipe:
    """Return recipe ``paper`` or ``as-released``; sizes not in the paper follow a neighbour."""
    if name == "as-released":
        return Recipe(lr_schedule="constant", warmup_epochs=0, attn_dropout_p=0.0)
    return Recipe(lr=2e-4, global_batch_size=512) if gpt_model in LARGE else Recipe()


def differences(args: Namespace) -> str:
    """Describe how ``args`` differs from the paper's recipe for its model; empty if it does not."""
    paper = asdict(make_recipe("paper", args.gpt_model))
    changed = {k: v for k, v in paper.items() if getattr(args, k) != v}
    found = [f"--{k.replace('_', '-')} {getattr(args, k)} (paper: {v})" for k, v in changed.items()]
    if args.recipe == "as-released" and args.mix_code_path is None:
        found.append(
            "no second crop set (published code mixes in one at range 1.05 if it "
            "exists: --mix-code-path)"
        )
    return ", ".join(found)
