"""Class ids -> raster codes: the one decode loop, with KV cache, guidance and Jacobi windows.

Image i has one random number per token, drawn from (seed, i): it depends neither on its batch nor
on the process that generates it; the last bits of its logits may depend on the batch size.

Jacobi decoding (arXiv 2410.01699, with shared noise arXiv 2510.24211): a window of several steps is
computed at once, each step from a draft of the tokens before it, again and again with the same
random numbers. A step is settled once everything before it came out as it went in; the window then
moves past it. The tokens are those of decoding step by step, unless logits are rounded differently
when there are more rows (not by our CPU kernels).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
    editing: some codes are given with each batch and stay as they are. window: steps computed at
    once, see above; with more than 1, ``calls`` counts the forward calls of the last batch.
    """

    def __init__(
        self,
        decoder: Decoder,
        order: RegionOrder,
        options: SamplingOptions,
        batch: int,
        editing: bool = False,
        window: int = 1,
    ):
        assert not getattr(decoder, "training", False), "call model.eval() before generating"
        self.decoder, self.order, self.options, self.batch = decoder, order, options, batch
        self.sample = getattr(decoder, "sample", sample)
        self.editing, self.window, self.calls = editing, window, 0
        device, num_tokens = decoder.device, order.num_tokens
        self.inverse, self.permutation = order.inverse.to(device), order.permutation.to(device)
        self.kept_likelihood = torch.zeros(batch, device=device)  # (B,), see __call__
        decoded = [step.first for step in order.steps]
        self.scales = [options.scale(count, num_tokens) for count in decoded]
        self.temperatures = [options.temperature_at(count, num_tokens) for count in decoded]
        self.guided_steps = max((i + 1 for i, s in enumerate(self.scales) if s != 1.0), default=0)

        rows = 2 * batch if self.guided_steps else batch
        self.tokens = torch.zeros(rows, num_tokens, dtype=torch.int64, device=device)  # (R, T)
        null = decoder.config.num_classes
        self.labels = torch.full((rows,), null, device=device)  # (R,), null past ``batch``
        self.cache = decoder.new_cache(rows)
        self._captured: Callable[..., Tensor] | None = None  # not this object's own: no cycle
        if window == 1 and (capture := getattr(decoder, "capture", None)) is not None:
            cond = torch.zeros(batch, dtype=torch.int64, device=device)  # (B,)
            keys = torch.zeros(batch, num_tokens, dtype=torch.int64, device=device)  # (B, T)
            randomness = keys if options.noise == "gumbel" else keys.float()  # (B, T)
            given = [keys.clone(), keys.bool()] if editing else []  # (B, T) each
            captured = capture(self._decode, cond, randomness, *given)
            self._captured = None if captured == self._decode else captured

    @torch.inference_mode()
    def __call__(
        self,
        cond: Tensor,
        randomness: Tensor,
        on_step: StepHook | None = None,
        known: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Return raster codes (B, T) int64 of classes (B,), by random numbers (B, T) of the tokens
        in region order (``image_randomness``).

        B <= ``batch``. ``on_step`` is called after each forward call with the region-ordered tokens
        (B, T) so far and how many of them are decoded.

        When editing, the result is ``known`` (B, T) int64 where ``keep`` (B, T) bool, both raster,
        and ``kept_likelihood`` (B,) becomes the log likelihood of the kept codes, each given the
        class and all codes before it in the region order: one teacher-forced pass, for nothing.
        """
        assert (known is not None and keep is not None) == self.editing
        given = [part[:, self.permutation] for part in (known, keep) if part is not None]  # (B, T)
        if on_step is None and self._captured is not None:
            return self._captured(cond, randomness, *given)  # (B, T)
        known, keep = given or (None, None)
        return self._decode(cond, randomness, known, keep, on_step)  # (B, T)

    @sdpa_kernel(ATTENTION_KERNELS)
    def _decode(
        self,
        cond: Tensor,
        randomness: Tensor,
        known: Tensor | None = None,
        keep: Tensor | None = None,
        on_step: StepHook | None = None,
    ) -> Tensor:
        """Decode one batch; all arguments in region order."""
        decoder, steps, batch = self.decoder, self.order.steps, len(cond)
        guided = self.guided_steps > 0
        cache, tokens, labels = self._rows(cond)
        if self.editing:
            self.kept_likelihood.zero_()
        if self.window > 1:  # the first draft
            tokens[:] = 0 if known is None else known.repeat(len(tokens) // batch, 1)  # (R, T)
        first = self.calls = 0
        while first < len(steps):
            last = min(first + self.window, len(steps))
            if guided and first >= self.guided_steps:  # from here on the unconditional half rests
                guided = False
                cache, tokens, labels = cache.first_rows(batch), tokens[:batch], labels[:batch]
            scale = self._each(self.scales, first, last) if guided else None
            temperature = self._each(self.temperatures, first, last)
            logits = decoder.decode_step(tokens, labels, first, last, cache, scale)  # (B, t, V)
            now = slice(steps[first].first, steps[last - 1].end)
            drawn = self.sample(logits, randomness[:, now], self.options, temperature)  # (B, t)
            if known is not None and keep is not None:
                drawn = known[:, now].where(keep[:, now], drawn)  # (B, t)
            settled = last
            if self.window > 1:
                settled = self._settled(tokens[:batch, now], drawn, first, last)
            if known is not None and keep is not None:
                done = steps[settled - 1].end - now.start
                likely = log_likelihood(logits[:, :done], drawn[:, :done])  # (B, done)
                kept = keep[:, now][:, :done]  # (B, done)
                self.kept_likelihood[:batch] += likely.where(kept, 0.0).sum(1)  # (B,)
            tokens.view(-1, batch, tokens.shape[1])[:, :, now] = drawn  # (2 or 1, B, t)
            first, self.calls = settled, self.calls + 1
            if on_step is not None:
                on_step(tokens[:batch], steps[first - 1].end)
        return tokens[:batch, self.inverse]  # (B, T)

    @torch.inference_mode()
    def logits(self, cond: Tensor, codes: Tensor) -> Tensor:
        """Return the logits (B, T, V), guided, that raster codes (B, T) of classes (B,) would be
        drawn from, each after those before it: all steps in one call. Both in region order.
        """
        cache, tokens, labels = self._rows(cond)
        tokens[:] = codes[:, self.permutation].repeat(len(tokens) // len(cond), 1)  # (R, T)
        steps = len(self.order.steps)
        scale = self._each(self.scales, 0, steps) if self.guided_steps else None
        return self.decoder.decode_step(tokens, labels, 0, steps, cache, scale)  # (B, T, V)

    def _rows(self, cond: Tensor) -> tuple[Any, Tensor, Tensor]:
        """Return cache, tokens (R, T) and labels (R,) of classes (B,): B conditional rows first,
        then, with guidance, as many unconditional ones, which repeat their tokens.
        """
        batch = len(cond)
        rows = 2 * batch if self.guided_steps else batch
        cache, tokens, labels = self.cache.first_rows(rows), self.tokens[:rows], self.labels[:rows]
        labels[:batch] = cond
        labels[batch:] = self.decoder.config.num_classes
        return cache, tokens, labels

    def _each(self, values: Sequence[float], first: int, last: int) -> float | Tensor:
        """Return the value of steps [first, last): one if all are equal, else (t, 1), by token."""
        if all(value == values[first] for value in values[first:last]):
            return values[first]
        steps = self.order.steps[first:last]
        pairs = zip(values[first:last], steps, strict=True)
        repeated = [value for value, step in pairs for _ in range(step.first, step.end)]
        return torch.tensor(repeated, device=self.decoder.device)[:, None]  # (t, 1)

    def _settled(self, draft: Tensor, drawn: Tensor, first: int, last: int) -> int:
        """Return the step after those of [first, last) that are settled in every image.

        draft, drawn: (B, t), what went in and came out.
        """
        same = (draft == drawn).all(0)  # (t,)
        right = self.order.steps[first].first + int(same.long().cumprod(0).sum())
        return next((i for i in range(first + 1, last) if self.order.steps[i].first > right), last)


def generate(
    decoder: Decoder,
    order: RegionOrder,
    cond: Tensor,
    randomness: Tensor,
    options: SamplingOptions,
    window: int = 1,
) -> Tensor:
    """Return raster codes (B, T) int64 of classes (B,) and random numbers (B, T); see Generator."""
    return Generator(decoder, order, options, len(cond), window=window)(cond, randomness)
