"""Size, regularisation and variant of a GPT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# what the special slots are fed: a learned vector each (the paper's), one for all, zeros, the class
# embedding, or again what the slot before them holds
SPECIAL_TOKENS = ("learned", "shared", "zeros", "class", "last")
# fields of the config that vary the method, as published by default; those with a set of values
VARIANT_CHOICES = {
    "group_attention": ("full", "causal"),
    "special_tokens": SPECIAL_TOKENS,
    "special_positions": ("none", "predicted"),
}
VARIANTS = ("schedule", "order", *VARIANT_CHOICES)


@dataclass(frozen=True)
class GPTConfig:
    """Architecture and regularisation of one model; travels inside our checkpoints as a dict."""

    n_layer: int = 12
    dim: int = 768
    n_head: int = 12
    n_kv_head: int | None = None  # None: as many as n_head
    multiple_of: int = 256  # the SwiGLU width is 8/3 dim rounded up to this
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    vocab_size: int = 16384
    num_classes: int = 1000
    grid_height: int = 24
    grid_width: int = 24
    ar_token_num: int = 4  # n, tokens predicted at once; n - 1 special tokens
    schedule: str = "region"  # tokens of each step, see schedules.py
    order: str = "region"  # regions as nearly square as can be, "raster", or such as "1x4"
    group_attention: str = "full"  # among the slots of a step; "causal"
    special_tokens: str = "learned"  # what special slots are fed, see SPECIAL_TOKENS
    special_positions: str = "none"  # of special slots; "predicted": that of the token predicted
    class_dropout_prob: float = 0.1
    token_dropout_p: float = 0.1
    attn_dropout_p: float = 0.1
    resid_dropout_p: float = 0.1
    ffn_dropout_p: float = 0.1
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        for field, choices in VARIANT_CHOICES.items():
            if getattr(self, field) not in choices:
                option, value = field.replace("_", "-"), getattr(self, field)
                raise ValueError(f"--{option} {value}: expected one of {', '.join(choices)}")
        if self.dim % self.n_head or self.dim // self.n_head % 4:
            width = f"width {self.dim} / {self.n_head} heads"
            raise ValueError(f"{width} is not a multiple of 4, as 2-D rotary needs")
        if self.n_head % self.kv_heads:
            raise ValueError(
                f"{self.n_head} heads cannot share {self.kv_heads} key-value heads equally"
            )

    @property
    def kv_heads(self) -> int:
        """Number of key-value heads."""
        return self.n_kv_head or self.n_head

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.n_head

    @property
    def ffn_dim(self) -> int:
        """Hidden width of the SwiGLU: 2/3 of 4 dim, rounded up to ``multiple_of``."""
        return -(-int(2 * 4 * self.dim / 3) // self.multiple_of) * self.multiple_of


def variant_of(config: GPTConfig) -> dict[str, str]:
    """Return the fields of ``VARIANTS`` that are not as published."""
    published = GPTConfig()
    chosen = {field: getattr(config, field) for field in VARIANTS}
    return {k: v for k, v in chosen.items() if v != getattr(published, k)}


# Parameters at vocabulary 16384, 1000 classes, n = 4 (N, T, S: vocabulary 256, 10 classes); FID is
# the paper's table 1, ImageNet 256x256 with guidance. PAR-3B-16x: 2.88.
GPT_models: dict[str, dict[str, Any]] = {
    #                layers          width         heads             params    published FID, 4x
    "GPT-N":    dict(n_layer=6,  dim=64,   n_head=2),   #   0.4M
    "GPT-T":    dict(n_layer=6,  dim=128,  n_head=4),   #   1.6M
    "GPT-S":    dict(n_layer=6,  dim=288,  n_head=6),   #   6.1M
    "GPT-B":    dict(n_layer=12, dim=768,  n_head=12),  #   111M
    "GPT-L":    dict(n_layer=24, dim=1024, n_head=16),  #   343M   3.76
    "GPT-XL":   dict(n_layer=36, dim=1280, n_head=20),  #   775M   2.61
    "GPT-XXL":  dict(n_layer=48, dim=1536, n_head=24),  #   1.4B   2.35
    "GPT-XXXL": dict(n_layer=48, dim=2560, n_head=40),  #   3.9B
    "GPT-1B":   dict(n_layer=22, dim=2048, n_head=32),  #   1.2B
    "GPT-3B":   dict(n_layer=24, dim=3200, n_head=32),  #   3.1B   2.29
    "GPT-7B":   dict(n_layer=32, dim=4096, n_head=32),  #   6.6B
}  # fmt: skip
