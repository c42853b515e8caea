"""The decoding step through torch.compile, and on CUDA the whole schedule as one graph or a few.

Between two attentions everything is one compiled function: few kernels, as each costs 2 to 3
microseconds of a step however little it does. Per layer they are four products, the attention, and
four fused ones: rotary positions with the write to the cache, residual with norm (twice), SwiGLU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.decoding.sampling import SamplingOptions, sample
from autoregressive.models.attention import KVCache, Mask, attend
from autoregressive.models.decode_step import guide
from autoregressive.models.gpt import GPT, Attention, TransformerBlock, apply_rotary

GRAPH_NODES = 40_000  # kernels per CUDA graph: more take seconds and gigabytes to instantiate
FEW_LENGTHS = 4  # numbers of slots per step, each with kernels of its own
# a function has kernels for each number of slots and of rows; past the limit, torch's default of
# which is 8, it would no longer be compiled, without a word
RECOMPILE_LIMIT = 64
SCALE = torch.float64  # of CFG scales, as Python's numbers are


def fuse_gates(model: GPT) -> dict[TransformerBlock, Tensor]:
    """Put w1 and w3 of each block into one weight (2 F, D), and return it by block.

    The model's own weights become views of it, with the names, shapes and values that they had, so
    that nothing is held twice. Weights that torchao has rounded stay as they are.
    """
    fused = {}
    for block in model.layers:
        w1, w3 = block.feed_forward.w1, block.feed_forward.w3
        if type(w1.weight.data) is not Tensor or w1.weight.dtype != w3.weight.dtype:
            continue
        both = torch.cat([w1.weight.detach(), w3.weight.detach()])  # (2 F, D)
        for linear, part in zip((w1, w3), both.chunk(2), strict=True):
            linear.weight = nn.Parameter(part, linear.weight.requires_grad)  # (F, D)
        fused[block] = both
    return fused


def start_attention(block: TransformerBlock, x: Tensor, freqs_cis: Tensor, place: Tensor) -> Tensor:
    """Return queries (B, H, t, hd) of x (B, t, D); write keys and values to ``place``.

    place: of the cache, (2, B, Hkv, t, hd).
    """
    attention = block.attention
    heads, kv_heads = attention.n_head, attention.kv_heads
    qkv = attention.wqkv(block.attention_norm(x))  # (B, t, (H + 2 Hkv) hd)
    qkv = qkv.unflatten(-1, (-1, attention.head_dim))  # (B, t, H + 2 Hkv, hd)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)  # (B, t, H or Hkv, hd)
    # in these words torch's compiler makes two kernels: of the queries, and of what the cache gets
    place[0].copy_(apply_rotary(k, freqs_cis).transpose(1, 2))  # (B, Hkv, t, hd)
    place[1].copy_(v.transpose(1, 2))  # (B, Hkv, t, hd)
    return apply_rotary(q, freqs_cis).transpose(1, 2)  # (B, H, t, hd)


def finish_block(block: TransformerBlock, x: Tensor, y: Tensor, gates: Tensor | None) -> Tensor:
    """Add the attention output y (B, H, t, hd) to x (B, t, D), then the feed-forward.

    gates: the block's weight of ``fuse_gates``. Without the stochastic depth, which does nothing in
    ``eval()`` mode.
    """
    x = x + block.attention.wo(y.transpose(1, 2).flatten(2))  # (B, t, D)
    feed_forward, normed = block.feed_forward, block.ffn_norm(x)  # (B, t, D)
    if gates is None:
        return x + feed_forward(normed)  # (B, t, D)
    gate, value = F.linear(normed, gates).chunk(2, dim=-1)  # (B, t, F) each
    return x + feed_forward.w2(F.silu(gate) * value)  # (B, t, D)


def next_attention(
    block: TransformerBlock,
    following: TransformerBlock,
    x: Tensor,
    y: Tensor,
    gates: Tensor | None,
    freqs_cis: Tensor,
    place: Tensor,
) -> tuple[Tensor, Tensor]:
    """Finish ``block``, (B, t, D), and start the ``following`` one, (B, H, t, hd)."""
    x = finish_block(block, x, y, gates)  # (B, t, D)
    return x, start_attention(following, x, freqs_cis, place)


def logits_of(
    model: GPT,
    x: Tensor,
    y: Tensor,
    gates: Tensor | None,
    predicting: slice | Tensor | None,
    cfg_scale: Tensor | None,
) -> Tensor:
    """Finish the last block and the model: logits (B, t, V), guided by ``cfg_scale`` () or (t, 1),
    of the slots that are ``predicting``.
    """
    hidden = model.norm(finish_block(model.layers[-1], x, y, gates))  # (B, slots, D)
    if predicting is not None:
        hidden = hidden[:, predicting]  # (B, t, D)
    return model.head(guide(hidden, cfg_scale))  # (B or B / 2, t, V)


class Functions(NamedTuple):
    """What is compiled of a step."""

    start: Callable[..., Tensor]
    next: Callable[..., tuple[Tensor, Tensor]]
    logits: Callable[..., Tensor]
    sample: Callable[..., Tensor]


def compile_functions(dynamic: bool | None) -> Functions:
    """Return the functions compiled, for each number of slots on its own unless ``dynamic``."""
    parts = (start_attention, next_attention, logits_of, sample)
    return Functions(*(torch.compile(part, dynamic=dynamic) for part in parts))


class CompiledDecoder:
    """Decoder (see decoding/decoder.py) of a GPT in ``eval()`` mode, which stays usable.

    Each compiled function has kernels for one slot and for n, and for guided rows and others; all
    layers share them. Windows of several steps have kernels for any number of slots. Attention
    stays outside: its growing lengths would become copies of the cache.
    """

    def __init__(self, model: GPT):
        self.config, self.order, self.model = model.config, model.order, model
        self.device = model.device
        self.gates = fuse_gates(model)
        limits = torch._dynamo.config
        limits.recompile_limit = max(RECOMPILE_LIMIT, limits.recompile_limit)
        self.scales: dict[float, Tensor] = {}  # CFG scales () on the device
        lengths = {step.stop - step.start for step in model.order.steps}
        self.of_steps = compile_functions(False if len(lengths) <= FEW_LENGTHS else None)
        self.of_windows = compile_functions(True)

    def new_cache(self, batch: int) -> KVCache:
        """Return an empty cache for ``batch`` rows and all slots."""
        return self.model.new_cache(batch)

    def decode_step(
        self,
        tokens: Tensor,
        cond: Tensor,
        first: int,
        last: int,
        cache: KVCache,
        cfg_scale: float | Tensor | None = None,
    ) -> Tensor:
        """Return logits (B, t, V) of steps [first, last), see ``StepDecoder.decode_step``."""
        model, blocks = self.model, self.model.layers
        start, stop = self.order.steps[first].start, self.order.steps[last - 1].stop
        compiled = self.of_steps if last == first + 1 else self.of_windows
        mask = model.window_mask(start, stop)
        freqs_cis = model.freqs_cis[start:stop]  # (slots, hd/2, 2)
        x = model.embed_slots(tokens, cond, start, stop)  # (B, slots, D)
        place = cache.slots(0, start, stop)  # (2, B, Hkv, slots, hd)
        q = compiled.start(blocks[0], x, freqs_cis, place)  # (B, H, slots, hd)
        for block, following in zip(blocks[:-1], blocks[1:], strict=True):
            y = attend_to_cache(block.attention, q, cache, stop, mask)  # (B, H, slots, hd)
            place = cache.slots(following.attention.layer, start, stop)  # (2, B, Hkv, slots, hd)
            gates = self.gates.get(block)
            x, q = compiled.next(block, following, x, y, gates, freqs_cis, place)
        y = attend_to_cache(blocks[-1].attention, q, cache, stop, mask)  # (B, H, slots, hd)
        predicting = self.order.predicting_among(first, last)
        gates, scale = self.gates.get(blocks[-1]), self.scale_of(cfg_scale)
        return compiled.logits(model, x, y, gates, predicting, scale)  # (B or B / 2, t, V)

    def sample(
        self,
        logits: Tensor,
        randomness: Tensor,
        options: SamplingOptions,
        temperature: float | Tensor,
    ) -> Tensor:
        """Draw tokens, see ``sampling.sample``; compiled into one function."""
        window = logits.shape[1] > self.order.n
        compiled = self.of_windows if window else self.of_steps
        constant = not isinstance(temperature, Tensor) and temperature == options.temperature
        changing = None if constant else self.scale_of(temperature)
        return compiled.sample(logits, randomness, options, changing)  # (B, t)

    def scale_of(self, scale: float | Tensor | None) -> Tensor | None:
        """Return a scale as a tensor (), made once: a number would be part of the kernels."""
        if scale is None or isinstance(scale, Tensor):
            return scale
        if scale not in self.scales:
            self.scales[scale] = torch.tensor(scale, device=self.device, dtype=SCALE)
        return self.scales[scale]

    def steps_per_graph(self) -> int:
        """Return how many steps of the schedule one CUDA graph holds."""
        return max(1, GRAPH_NODES // (10 * self.config.n_layer + 30))

    @torch.inference_mode()
    def capture(self, decode: Callable[..., Tensor], *inputs: Tensor) -> Callable[..., Tensor]:
        """Record ``decode(*inputs)`` as CUDA graphs and return a function that replays them.

        inputs: buffers of the largest batch. The function copies its arguments, of as many rows or
        fewer, into them. ``decode`` calls its argument ``on_step`` after each step; a long schedule
        is cut there. Elsewhere than on CUDA, returns ``decode`` as it is.
        """
        if self.device.type != "cuda":
            return decode
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compile and warm up before the recording
            decode(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graphs, output = record(decode, inputs, self.steps_per_graph())

        def replay(*arguments: Tensor) -> Tensor:
            rows = len(arguments[0])
            for buffer, argument in zip(inputs, arguments, strict=True):
                buffer[:rows] = argument
            for graph in graphs:
                graph.replay()
            return output[:rows].clone()

        return replay


def attend_to_cache(
    attention: Attention, q: Tensor, cache: KVCache, stop: int, mask: Mask
) -> Tensor:
    """Return the attention output (B, H, t, hd) of q over the first ``stop`` slots."""
    keys, values = cache.slots(attention.layer, 0, stop)  # (B, Hkv, stop, hd) each
    return attend(q, keys, values, mask, 0.0, attention.scale)  # (B, H, t, hd)


def record(
    decode: Callable[..., Tensor], inputs: tuple[Tensor, ...], steps: int
) -> tuple[list[torch.cuda.CUDAGraph], Tensor]:
    """Return graphs of ``decode(*inputs)``, of ``steps`` steps each, and its result.

    They share memory, so they must be replayed in order.
    """
    pool, graphs, seen = torch.cuda.graph_pool_handle(), [], 0

    def begin() -> None:
        graphs.append(torch.cuda.CUDAGraph())
        graphs[-1].capture_begin(pool=pool)

    def cut(_tokens: Tensor, _stop: int) -> None:
        nonlocal seen
        seen += 1
        if seen % steps == 0:
            graphs[-1].capture_end()
            begin()

    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        begin()
        output = decode(*inputs, on_step=cut)
        graphs[-1].capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graphs, output
