"""Class-conditional GPT over code grids: raster codes in, logits or raster codes out.

- LLaMA-style blocks: RMSNorm, 2-D rotary positions, SwiGLU, optional grouped-query attention
- class embedding with a null class for guidance; n-1 learnable special tokens (paper, section 3.3)
- parameter names and shapes of the released PAR checkpoints, and of LlamaGen's c2i models at n = 1
- passing a KV cache means decoding; the ordering lives in region_order.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from autoregressive.models.attention import DenseMask, KVCache, Mask, attend, query_chunks
from autoregressive.models.config import GPTConfig
from autoregressive.models.decode_step import StepDecoder
from autoregressive.models.dropout import Dropout, DropPath
from autoregressive.models.embeddings import LabelEmbedder, SpecialTokens
from autoregressive.models.linear_cross_entropy import linear_cross_entropy
from autoregressive.models.region_order import RegionOrder


def rotary_table(positions: Tensor, head_dim: int, base: float) -> Tensor:
    """Return cos and sin of each slot's 2-D rotary angles, (S, head_dim/2, 2) float32.

    The first half of the channel pairs turns with the row, the second with the column, by angle
    position * base^(-4 i / head_dim). Slots without a position (class and special tokens) get all
    zeros, cos included: this zeroes their queries and keys, it is not the identity. Released
    weights were trained so.
    """
    half = head_dim // 2
    frequencies = 1.0 / base ** (torch.arange(0, half, 2).float() / half)  # (hd/4,)
    angles = positions.clamp(min=0)[:, :, None] * frequencies  # (T, 2, hd/4)
    angles = angles.flatten(1)  # (T, hd/2)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)  # (T, hd/2, 2)
    return table * (positions[:, :1, None] >= 0)  # (T, hd/2, 2)


def apply_rotary(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate channel pairs of x (B, T, H, hd) by freqs_cis (T, hd/2, 2), in at least float32."""
    wide = x.to(torch.promote_types(x.dtype, freqs_cis.dtype))  # (B, T, H, hd)
    a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, H, hd/2)
    cos, sin = freqs_cis[:, None, :, 0], freqs_cis[:, None, :, 1]  # (T, 1, hd/2)
    pairs = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)  # (B, T, H, hd/2, 2)
    return pairs.flatten(-2).to(x.dtype)  # (B, T, H, hd)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.n_head, self.kv_heads = layer, config.n_head, config.kv_heads
        self.head_dim, self.dropout_p = config.head_dim, config.attn_dropout_p
        self.scale = 1.0 / math.sqrt(config.head_dim)  # of the products, also of padded heads
        width = (config.n_head + 2 * config.kv_heads) * config.head_dim
        self.wqkv = nn.Linear(config.dim, width, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.resid_dropout = Dropout(config.resid_dropout_p)

    def project(self, x: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, H, T, hd), keys and values (B, Hkv, T, hd) of x (B, T, D)."""
        heads, kv_heads = self.n_head, self.kv_heads
        qkv = self.wqkv(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H + 2 Hkv, hd)
        qk, v = qkv.split([heads + kv_heads, kv_heads], dim=2)  # (B, T, H + Hkv or Hkv, hd)
        qk = apply_rotary(qk, freqs_cis)  # (B, T, H + Hkv, hd)
        q, k = qk.split([heads, kv_heads], dim=2)  # (B, T, H or Hkv, hd)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, cache: KVCache | None, start: int
    ) -> Tensor:
        """Return the attention output (B, T, D), over the cache if there is one."""
        if cache is not None:
            k, v = cache.update(self.layer, start, k, v)  # (B, Hkv, start + T, hd)
        dropout_p = self.dropout_p if self.training else 0.0
        y = attend(q, k, v, mask, dropout_p, self.scale)  # (B, H, T, hd)
        return y.transpose(1, 2).flatten(2)  # (B, T, D)

    def output(self, y: Tensor) -> Tensor:
        """Project the attention output: (B, T, D) -> (B, T, D)."""
        return self.resid_dropout(self.wo(y))  # (B, T, D)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.ffn_dropout = Dropout(config.ffn_dropout_p)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))  # (B, T, D)


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward, each with stochastic depth."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config)
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.recompute: Callable[..., Tensor] | None = None  # torch's checkpoint(), see GPT
        # the rate grows linearly with depth, from 0 at the first block
        rate = config.drop_path_rate * layer / max(config.n_layer - 1, 1)
        self.drop_path = DropPath(rate, enabled=config.drop_path_rate > 0)

    def forward(
        self, x: Tensor, freqs_cis: Tensor, mask: Mask, cache: KVCache | None, start: int
    ) -> Tensor:
        if self.recompute is not None and self.training:
            return self.recompute(self.compute, x, freqs_cis, mask, cache, start)  # (B, T, D)
        return self.compute(x, freqs_cis, mask, cache, start)  # (B, T, D)

    def compute(
        self, x: Tensor, freqs_cis: Tensor, mask: Mask, cache: KVCache | None, start: int
    ) -> Tensor:
        """Compute the block: (B, T, D) -> (B, T, D)."""
        q, k, v = self.before_attention(x, freqs_cis)  # (B, H or Hkv, T, hd)
        y = self.attention.attend(q, k, v, mask, cache, start)  # (B, T, D)
        return self.after_attention(x, y)  # (B, T, D)

    def before_attention(self, x: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, H, T, hd), keys and values (B, Hkv, T, hd)."""
        return self.attention.project(self.attention_norm(x), freqs_cis)

    def after_attention(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the attention output y to x, then the feed-forward, all (B, T, D)."""
        x = x + self.drop_path(self.attention.output(y))  # (B, T, D)
        return x + self.drop_path(self.feed_forward(self.ffn_norm(x)))  # (B, T, D)


_KEPT_BY_SELECTIVE = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
}


def _selective(_context: object, operator: object, *_: object, **__: object) -> CheckpointPolicy:
    """Keep some operators' results; a function, as torch 2.7 takes no list with flex_attention."""
    kept = operator in _KEPT_BY_SELECTIVE
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class GPT(StepDecoder, nn.Module):
    """The model. ``forward`` scores whole code grids, ``decode_step`` one step of generation."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        dim = config.dim
        self.config = config
        grid = config.grid_height, config.grid_width
        variant = config.schedule, config.order, config.group_attention
        self.order = RegionOrder.build(grid, config.ar_token_num, *variant)
        self.cls_embedding = LabelEmbedder(config.num_classes, dim, config.class_dropout_prob)
        self.tok_embeddings = nn.Embedding(config.vocab_size, dim)
        rows = {"learned": self.order.num_special, "shared": min(self.order.num_special, 1)}
        if rows.get(config.special_tokens, 0) > 0:
            self.spe_tok_embeddings = SpecialTokens(rows[config.special_tokens], dim)
        self.tok_dropout = Dropout(config.token_dropout_p)
        self.layers = nn.ModuleList(TransformerBlock(config, i) for i in range(config.n_layer))
        self.norm = nn.RMSNorm(dim, eps=config.norm_eps)
        self.output = nn.Linear(dim, config.vocab_size, bias=False)
        self.block_mask: Mask = None  # in place of the dense one
        # built on the CPU also where parameters are on the meta device, so that they are never lost
        with torch.device("cpu"):
            positions = self.order.slot_positions  # (S, 2)
            if config.special_positions == "predicted":
                positions = self.order.positions_with_special  # (S, 2)
            freqs_cis = rotary_table(positions, config.head_dim, config.rope_base)
            self.register_buffer("freqs_cis", freqs_cis, persistent=False)
            self.register_buffer("mask", self.order.mask(), persistent=False)
            self.query_chunks = query_chunks(self.mask)
            self.register_buffer("permutation", self.order.permutation, persistent=False)
            self.register_buffer("inverse", self.order.inverse, persistent=False)
            self.register_buffer("predicting", self.order.predicting, persistent=False)

    def init_weights(self) -> None:
        """Initialise for training.

        ==================  =================
        embeddings, linear  normal, std 0.02
        output              0
        norms               1
        ==================  =================
        """
        for name, parameter in self.named_parameters():
            self.init_weight(name, parameter)

    @staticmethod
    def init_weight(name: str, weight: Tensor) -> None:
        """Initialise the parameter ``name``, see ``init_weights``."""
        if name == "output.weight":
            nn.init.zeros_(weight)
        elif "norm" in name:
            nn.init.ones_(weight)
        else:
            nn.init.normal_(weight, std=0.02)

    def cast_weights(self, dtype: torch.dtype) -> GPT:
        """Cast the parameters to ``dtype`` for inference; the rotary table stays float32."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
        return self

    def forward(self, codes: Tensor, cond: Tensor) -> tuple[Tensor, Tensor]:
        """Return the teacher-forced cross-entropy, in ``train()`` and ``eval()`` mode alike.

        codes: (B, T) int64 raster codes in [0, vocab_size); cond: (B,) int64 class ids, num_classes
        for null. Returns the mean, a float32 scalar, and detached losses (B, T) in region order
        (``order.permutation``).
        """
        targets = codes[:, self.permutation]  # (B, T)
        hidden = self.hidden(targets, cond)  # (B, T, D)
        return linear_cross_entropy(hidden, self.output.weight, targets)  # (), (B, T)

    def logits(self, codes: Tensor, cond: Tensor) -> Tensor:
        """Return logits (B, T, vocab_size) in region order; arguments as for ``forward``."""
        return self.output(self.hidden(codes[:, self.permutation], cond))  # (B, T, V)

    def hidden(self, tokens: Tensor, cond: Tensor) -> Tensor:
        """Return final hidden states (B, T, D) of whole region-ordered sequences (B, T)."""
        cond = self.cls_embedding.drop(cond)  # (B,)
        x = self.embed_slots(tokens, cond, 0, self.order.num_slots)  # (B, S, D)
        dense = DenseMask(self.mask, self.query_chunks)
        mask = dense if self.block_mask is None else self.block_mask
        hidden = self.trunk(x, 0, mask)  # (B, S, D)
        return hidden if hidden.shape[1] == tokens.shape[1] else hidden[:, self.predicting]

    def use_flex_attention(self, device: torch.device) -> None:
        """Train with FlexAttention: compiled blocks on CUDA, without attention dropout."""
        level, slots = self.order.level.to(device), self.order.num_slots

        def attends(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return level[q] >= level[k]  # RegionOrder.attends on the device

        self.block_mask = create_block_mask(attends, None, None, slots, slots, device=device)

    def recompute_activations(self, what: str) -> None:
        """Compute activations again in backward: ``none``, ``selective`` or ``full``.

        full keeps only the input of each block; selective also keeps the results of its matrix
        products and attention.
        """
        recompute = None if what == "none" else partial(checkpoint, use_reentrant=False)
        if what == "selective":
            contexts = partial(create_selective_checkpoint_contexts, _selective)
            recompute = partial(checkpoint, use_reentrant=False, context_fn=contexts)
        for block in self.layers:
            block.recompute = recompute  # inside what is compiled, so that the compiler sees it

    def flops_per_image(self) -> int:
        """Return the operations of forward and backward over one image, none recomputed.

        6 per token and weight of a matrix product (PaLM, arXiv 2204.02311, appendix B), and 12 D
        per layer and visible pair of slots in attention.
        """
        config, slots = self.config, self.order.num_slots
        wqkv = config.dim * (config.n_head + 2 * config.kv_heads) * config.head_dim
        block = wqkv + config.dim**2 + 3 * config.dim * config.ffn_dim
        weights = config.n_layer * block + config.dim * config.vocab_size
        visible = int(self.order.mask().sum())
        return 6 * slots * weights + 12 * config.n_layer * config.dim * visible

    @property
    def device(self) -> torch.device:
        """Device the model computes on."""
        return self.permutation.device

    def new_cache(self, batch: int) -> KVCache:
        """Return an empty cache for ``decode_step`` of at most ``batch`` rows."""
        config, dtype = self.config, self.tok_embeddings.weight.dtype
        head_dim = self.layers[0].attention.head_dim  # padded, if heads are
        shape = (config.n_layer, batch, config.kv_heads, self.order.num_slots, head_dim)
        # on the device of the buffers: FSDP keeps offloaded weights on the host between its calls
        return KVCache(*shape, self.device, dtype)

    def window_mask(self, start: int, stop: int) -> DenseMask | None:
        """Return the mask of decoding slots [start, stop), several steps; one step needs none."""
        if self.order.seen[start] == stop:
            return None
        return DenseMask(self.mask[start:stop, :stop], ((0, stop - start, stop),))

    def head(self, hidden: Tensor) -> Tensor:
        """Apply the output layer: (..., D) -> logits (..., V) of at least float32."""
        logits = self.output(hidden)  # (..., V)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def embed_slots(self, tokens: Tensor, cond: Tensor, start: int, stop: int) -> Tensor:
        """Return input embeddings (B, stop - start, D) of slots [start, stop).

        tokens: (B, T) in region order; cond: (B,).
        """
        pieces = []
        for kind, which in self.order.held(start, stop):
            if kind == "class":
                pieces.append(self.cls_embedding(cond)[:, None])  # (B, 1, D)
            elif kind == "special":
                before = pieces[-1][:, -1:]  # (B, 1, D)
                special = self.embed_special(which, cond, before)  # (n-1 or 1, D) or (B, 1, D)
                pieces.append(special.expand(len(tokens), which.stop - which.start, -1))
            else:
                pieces.append(self.tok_embeddings(tokens[:, which]))  # (B, ..., D)
        return torch.cat(pieces, dim=1)  # (B, stop - start, D)

    def embed_special(self, which: slice, cond: Tensor, before: Tensor) -> Tensor:
        """Return embeddings of the special tokens ``which``: one each, or one for all.

        cond: (B,); before: (B, 1, D), the slot before them.
        """
        kind = self.config.special_tokens
        if kind in ("learned", "shared"):
            table = self.spe_tok_embeddings.special_embeddings.weight  # (n-1 or 1, D)
            return table[which] if kind == "learned" else table
        if kind == "class":
            return self.cls_embedding(cond)[:, None]  # (B, 1, D)
        return before if kind == "last" else torch.zeros_like(before)  # (B, 1, D)

    def trunk(
        self, x: Tensor, start: int, mask: Mask = None, cache: KVCache | None = None
    ) -> Tensor:
        """Apply blocks and final norm to slots [start, start + t): (B, t, D) -> (B, t, D)."""
        stop = start + x.shape[1]
        freqs_cis = self.freqs_cis[start:stop]  # (t, hd/2, 2)
        if cache is not None and mask is None:
            mask = self.window_mask(start, stop)
        x = self.tok_dropout(x)  # (B, t, D)
        for layer in self.layers:
            x = layer(x, freqs_cis, mask, cache, start)  # (B, t, D)
        return self.norm(x)  # (B, t, D)
