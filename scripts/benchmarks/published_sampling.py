"""The published decoding, rebuilt on our weights: eager, with fused attention, and compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoregressive.models import gpt
from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT, TransformerBlock
from scripts.benchmarks.common import use_published_norm

Trunk = Callable[[Tensor, int], Tensor]  # embeddings (R, t, D) and their first slot -> (R, t, D)


class PublishedCache:
    """Keys and values over the whole padded length, whatever is filled of it."""

    def __init__(
        self, config: GPTConfig, batch: int, slots: int, dtype: torch.dtype, device: torch.device
    ):
        shape = (config.n_layer, 2, batch, config.kv_heads, slots, config.head_dim)
        self.store = torch.zeros(shape, dtype=dtype, device=device)  # (L, 2, B, Hkv, T, hd)

    def update(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.store[layer]  # (B, Hkv, T, hd)
        keys[:, :, start : start + k.shape[2]] = k
        values[:, :, start : start + k.shape[2]] = v
        return keys, values  # (B, Hkv, T, hd)


def published_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, p: float, _: float) -> Tensor:
    """By torch's plain operators over copies of keys and values, made even where not needed."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # (B, H, T, hd)
    return F.scaled_dot_product_attention(q, k, v, mask, p)  # (B, H, t, hd)


def fused_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, p: float, _: float) -> Tensor:
    """By torch's fused attention, with a mask."""
    fused, grouped = F.scaled_dot_product_attention, q.shape[1] != k.shape[1]
    return fused(q, k, v, mask, p, enable_gqa=grouped)  # (B, H, t, hd)


def published_mask(model: GPT, rows: int) -> Tensor:
    """Return the mask (R, Tp, Tp) over the padded length, repeated over the rows."""
    slots, device = model.order.num_tokens, model.device
    padded = -(-slots // 8) * 8
    mask = torch.zeros(rows, padded, padded, dtype=torch.bool, device=device)  # (R, Tp, Tp)
    mask[:, :slots, :slots] = model.mask
    return mask


@torch.inference_mode()
def published_generate(
    model: GPT, cond: Tensor, cfg_scale: float, trunk: Trunk | None = None
) -> Tensor:
    """Codes (B, T) in region order by the published procedure."""
    batch, slots = len(cond), model.order.num_tokens
    labels = torch.cat([cond, torch.full_like(cond, model.config.num_classes)])  # (2B,)
    if trunk is None:
        mask, dtype = published_mask(model, 2 * batch), model.output.weight.dtype  # (2B, Tp, Tp)
        cache = PublishedCache(model.config, 2 * batch, mask.shape[1], dtype, cond.device)

        def trunk(x: Tensor, start: int) -> Tensor:
            visible = mask[:, None, start : start + x.shape[1]]  # (2B, 1, t, Tp)
            return model.trunk(x, start, visible, cache)  # (2B, t, D)

    tokens, probabilities = cond.new_zeros(2 * batch, slots), []  # (2B, T)
    for start, stop, _, _ in model.order.steps:
        x = model.embed_slots(tokens, labels, start, stop)  # (2B, t, D)
        logits = model.output(trunk(x, start))  # (2B, t, V)
        conditional, unconditional = logits.chunk(2)  # (B, t, V)
        logits = unconditional + (conditional - unconditional) * cfg_scale  # (B, t, V)
        probabilities.append(logits.float().softmax(-1))  # (B, t, V)
        drawn = torch.multinomial(probabilities[-1].flatten(0, 1), 1).view(batch, -1)  # (B, t)
        tokens[:, start:stop] = drawn.repeat(2, 1)  # (2B, t)
    return tokens[:batch]  # (B, T)


def published_block(
    block: TransformerBlock,
    x: Tensor,
    freqs_cis: Tensor,
    visible: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
) -> Tensor:
    """One block: x (R, t, D) of ``slots`` (t,) -> (R, t, D); keys, values: (R, Hkv, Tp, hd)."""
    q, k, v = block.before_attention(x, freqs_cis)  # (R, H or Hkv, t, hd)
    keys[:, :, slots] = k  # (R, Hkv, t, hd)
    values[:, :, slots] = v  # (R, Hkv, t, hd)
    y = published_attend(q, keys, values, visible, 0.0, 0.0)  # (R, H, t, hd)
    return block.after_attention(x, y.transpose(1, 2).flatten(2))  # (R, t, D)


class CompiledTrunk:
    """The published blocks through torch.compile; on CUDA a graph for each number of slots."""

    def __init__(self, model: GPT, rows: int):
        self.model, self.mask = model, published_mask(model, rows)  # (R, Tp, Tp)
        config, padded = model.config, self.mask.shape[1]
        shape = (rows, config.kv_heads, padded, config.head_dim)
        # apart, as the published code has them: torch's compiler would copy parts of one tensor
        self.caches = [[x.new_zeros(shape) for _ in range(2)] for x in self.weights()]
        self.block = torch.compile(published_block, dynamic=False)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}

    def weights(self) -> list[Tensor]:
        """Return a weight of each layer, for type and device."""
        return [block.attention.wo.weight for block in self.model.layers]

    def run(self, x: Tensor, slots: Tensor) -> Tensor:
        """x (R, t, D) of ``slots`` (t,) -> (R, t, D)."""
        freqs_cis = self.model.freqs_cis[slots]  # (t, hd/2, 2)
        visible = self.mask[:, slots][:, None]  # (R, 1, t, Tp)
        for block, cache in zip(self.model.layers, self.caches, strict=True):
            x = self.block(block, x, freqs_cis, visible, *cache, slots)  # (R, t, D)
        return self.model.norm(x)  # (R, t, D)

    def __call__(self, x: Tensor, start: int) -> Tensor:
        """Embeddings (R, t, D) from slot ``start`` -> hidden states (R, t, D)."""
        count = x.shape[1]
        slots = torch.arange(start, start + count, device=x.device)  # (t,)
        if x.device.type != "cuda":
            return self.run(x, slots)  # (R, t, D)
        if count not in self.graphs:
            self.graphs[count] = self.capture(x.clone(), slots)
        graph, inputs, places, output = self.graphs[count]
        inputs.copy_(x)  # (R, t, D)
        places.copy_(slots)  # (t,)
        graph.replay()
        return output  # (R, t, D)

    def capture(
        self, x: Tensor, slots: Tensor
    ) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        """Return a graph of ``run`` with its inputs and its output."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compile and warm up before the recording
            self.run(x, slots)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self.run(x, slots)
        return graph, x, slots, output


def make_published(model: GPT, way: str, cfg_scale: float) -> Callable[[Tensor], Tensor]:
    """Return the published decoding of ``model``, which gets the published norm.

    way: ``published``, ``fused`` (with torch's fused attention) or ``published-compiled``.
    """
    gpt.attend = fused_attend if way == "fused" else published_attend
    fast = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION] if way == "fused" else []
    use_published_norm(model)
    if model.device.type == "cuda":  # torch was not yet computing plain attention in float32
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    trunks: dict[int, CompiledTrunk] = {}

    def decode(cond: Tensor) -> Tensor:
        trunk = None
        if way == "published-compiled":
            with torch.inference_mode():
                if len(cond) not in trunks:
                    trunks[len(cond)] = CompiledTrunk(model, 2 * len(cond))
                trunk = trunks[len(cond)]
        with sdpa_kernel([*fast, SDPBackend.MATH]):
            return published_generate(model, cond, cfg_scale, trunk)

    return decode
