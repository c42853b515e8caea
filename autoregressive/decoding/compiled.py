"""The decoding step through torch.compile, and on CUDA the whole schedule as one graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from autoregressive.models.attention import KVCache
from autoregressive.models.decode_step import StepDecoder
from autoregressive.models.gpt import GPT, TransformerBlock


def finish_block(block: TransformerBlock, x: Tensor, y: Tensor) -> Tensor:
    """Add the attention output y to x, then the feed-forward, both (B, T, D), in ``eval()`` mode.

    Without the stochastic depth, which does nothing then but would make torch.compile treat every
    block on its own.
    """
    x = x + block.attention.output(y)  # (B, T, D)
    return x + block.feed_forward(block.ffn_norm(x))  # (B, T, D)


class CompiledDecoder(StepDecoder):
    """Decoder (see decoding/decoder.py) of a GPT in ``eval()`` mode, which stays as it is.

    torch.compile gets the parts of a block before and after its attention, with one compilation for
    all blocks. Attention and cache stay as they are: their growing lengths would become copies of
    the cache.
    """

    def __init__(self, model: GPT):
        self.config, self.order, self.model = model.config, model.order, model
        self.device = model.device
        self.embed_slots, self.head = model.embed_slots, model.head
        self._before = torch.compile(TransformerBlock.before_attention)
        self._after = torch.compile(finish_block)

    def new_cache(self, batch: int) -> KVCache:
        """Return an empty cache for ``batch`` rows and all slots."""
        return self.model.new_cache(batch)

    def trunk(self, x: Tensor, start: int, cache: KVCache) -> Tensor:
        """Apply blocks and final norm to slots [start, start + t): (B, t, D) -> (B, t, D)."""
        stop = start + x.shape[1]
        freqs_cis = self.model.freqs_cis[start:stop]  # (t, hd/2, 2)
        mask = self.model.window_mask(start, stop)
        for block in self.model.layers:
            q, k, v = self._before(block, x, freqs_cis)  # (B, H or Hkv, t, hd)
            y = block.attention.attend(q, k, v, mask, cache, start)  # (B, t, D)
            x = self._after(block, x, y)  # (B, t, D)
        return self.model.norm(x)  # (B, t, D)

    @torch.inference_mode()
    def capture(self, decode: Callable[..., Tensor], *inputs: Tensor) -> Callable[..., Tensor]:
        """Record ``decode(*inputs)`` as one CUDA graph and return a function that replays it.

        inputs: buffers of the largest batch. The function copies its arguments, of as many rows or
        fewer, into them. Elsewhere than on CUDA, returns ``decode`` as it is.
        """
        if self.device.type != "cuda":
            return decode
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compile and warm up before the recording
            decode(*inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = decode(*inputs)

        def replay(*arguments: Tensor) -> Tensor:
            rows = len(arguments[0])
            for buffer, argument in zip(inputs, arguments, strict=True):
                buffer[:rows] = argument
            graph.replay()
            return output[:rows].clone()

        return replay
