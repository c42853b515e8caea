"""Class ids -> raster codes: the one decode loop, with KV cache, guidance and inverse-CDF sampling.

Image i has one uniform number per token, drawn from (seed, i): its random numbers depend
neither on its batch nor on the process that generates it; the last bits of its logits may
depend on the batch size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from autoregressive.decoding.decoder import Decoder
from autoregressive.decoding.sampling import SamplingOptions, log_likelihood, sample
from autoregressive.models.region_order import RegionOrder

StepHook = Callable[[Tensor, int], None]
# cuDNN, which torch prefers on an H100, makes a plan for each number of keys, hence for each step
ATTENTION_KERNELS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class Generator:
    """Class ids -> codes, batch after batch, by one decoder; buffers are allocated once.

    decoder: a GPT in ``eval()`` mode or another ``Decoder`` of one. batch: most images at a time.
    editing: some codes are given with each batch and stay as they are.
    """

    def __init__(
        self,
        decoder: Decoder,
        order: RegionOrder,
        options: SamplingOptions,
        batch: int,
        editing: bool = False,
    ):
        assert not getattr(decoder, "training", False), "call model.eval() before generating"
        self.decoder, self.order, self.options, self.batch = decoder, order, options, batch
        self.sample = getattr(decoder, "sample", sample)
        device, num_classes, slots = decoder.device, decoder.config.num_classes, order.num_tokens
        self.inverse, self.permutation = order.inverse.to(device), order.permutation.to(device)
        self.editing = editing
        self.kept_likelihood = torch.zeros(batch, device=device)  # (B,), see __call__
        self.scales = [options.scale(start, slots) for start, _ in order.schedule]
        self.guided_steps = max((i + 1 for i, s in enumerate(self.scales) if s != 1.0), default=0)

        rows = 2 * batch if self.guided_steps else batch
        self.tokens = torch.zeros(rows, slots, dtype=torch.int64, device=device)  # (R, T)
        self.labels = torch.full((rows,), num_classes, device=device)  # (R,), null past ``batch``
        self.cache = decoder.new_cache(rows)
        self._decode_batch = self._decode
        if (capture := getattr(decoder, "capture", None)) is not None:
            cond = torch.zeros(batch, dtype=torch.int64, device=device)  # (B,)
            uniforms = torch.zeros(batch, slots, device=device)  # (B, T)
            given = [uniforms.long(), uniforms.bool()] if editing else []  # (B, T) each
            self._decode_batch = capture(self._decode, cond, uniforms, *given)

    @torch.inference_mode()
    def __call__(
        self,
        cond: Tensor,
        uniforms: Tensor,
        on_step: StepHook | None = None,
        known: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Return raster codes (B, T) int64 of classes (B,), by uniforms (B, T) in region order.

        B <= ``batch``. ``on_step`` is called after each forward call with the region-ordered tokens
        (B, T) so far and how many of them are decoded.

        When editing, the result is ``known`` (B, T) int64 where ``keep`` (B, T) bool, both raster,
        and ``kept_likelihood`` (B,) becomes the log likelihood of the kept codes, each given the
        class and all codes before it in the region order: one teacher-forced pass, for nothing.
        """
        assert (known is not None and keep is not None) == self.editing
        given = [part[:, self.permutation] for part in (known, keep) if part is not None]  # (B, T)
        if on_step is None:
            return self._decode_batch(cond, uniforms, *given)  # (B, T)
        known, keep = given or (None, None)
        return self._decode(cond, uniforms, known, keep, on_step)  # (B, T)

    @sdpa_kernel(ATTENTION_KERNELS)
    def _decode(
        self,
        cond: Tensor,
        uniforms: Tensor,
        known: Tensor | None = None,
        keep: Tensor | None = None,
        on_step: StepHook | None = None,
    ) -> Tensor:
        """Decode one batch; all arguments in region order."""
        decoder, batch, guided = self.decoder, len(cond), self.guided_steps > 0
        rows = 2 * batch if guided else batch
        # conditional rows first; the unconditional half repeats their tokens
        cache, tokens, labels = self.cache.first_rows(rows), self.tokens[:rows], self.labels[:rows]
        labels[:batch] = cond
        labels[batch:] = decoder.config.num_classes
        if self.editing:
            self.kept_likelihood.zero_()
        for i, (start, stop) in enumerate(self.order.schedule):
            if guided and i == self.guided_steps:  # from here on the unconditional half rests
                guided = False
                cache, tokens, labels = cache.first_rows(batch), tokens[:batch], labels[:batch]
            scale = self.scales[i] if guided else None
            logits = decoder.decode_step(tokens, labels, start, stop, cache, scale)  # (B, t, V)
            drawn = self.sample(logits, uniforms[:, start:stop], self.options)  # (B, t)
            if known is not None and keep is not None:
                given, kept = known[:, start:stop], keep[:, start:stop]  # (B, t) each
                likely = log_likelihood(logits, given).where(kept, 0.0)  # (B, t)
                self.kept_likelihood[:batch] += likely.sum(1)  # (B,)
                drawn = given.where(kept, drawn)  # (B, t)
            tokens.view(-1, batch, tokens.shape[1])[:, :, start:stop] = drawn  # (2 or 1, B, t)
            if on_step is not None:
                on_step(tokens[:batch], stop)
        return tokens[:batch, self.inverse]  # (B, T)


def generate(
    decoder: Decoder, order: RegionOrder, cond: Tensor, uniforms: Tensor, options: SamplingOptions
) -> Tensor:
    """Return raster codes (B, T) int64 of classes (B,) and uniforms (B, T); see Generator."""
    return Generator(decoder, order, options, len(cond))(cond, uniforms)
