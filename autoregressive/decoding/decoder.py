"""What a decoder is, and the one place that chooses one for a machine.

``eager``: the GPT itself, by torch's operators. ``kernels``: our own, on a CPU. ``compiled``:
torch.compile, and one CUDA graph. Where a CPU has a choice, both ways are timed on it once and the
faster one is taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from autoregressive.decoding.compiled import CompiledDecoder
from autoregressive.decoding.cpu.build import cache_folder, load, unavailable_reason
from autoregressive.decoding.cpu.decoder import CPUDecoder
from autoregressive.models.attention import channel_multiple
from autoregressive.models.gpt import GPT, GPTConfig
from autoregressive.models.pad_heads import pad_heads
from autoregressive.models.region_order import RegionOrder
from utils.files import write_json
from utils.precision import AUTOCAST_DTYPE, has_bfloat16, resolve_precision

MEASURED_BYTES = 1 << 28  # weights in the timed part of a model: more than a cache holds
MEASURED_SECONDS = 0.3  # per way, at least one step


class Decoder(Protocol):
    """Makes logits step by step over a cache of its own kind. A GPT in ``eval()`` mode is one.

    A decoder may also have ``capture`` and ``sample``, see ``CompiledDecoder``.
    """

    config: GPTConfig
    order: RegionOrder
    device: torch.device

    def new_cache(self, batch: int) -> Any:
        """Return an empty cache of ``batch`` rows; its ``first_rows(b)`` share its memory."""

    def decode_step(
        self,
        tokens: Tensor,
        cond: Tensor,
        first: int,
        last: int,
        cache: Any,
        cfg_scale: float | Tensor | None,
    ) -> Tensor:
        """See ``GPT.decode_step``."""


@dataclass(frozen=True)
class Way:
    """A way of decoding: type of weights and cache (key of ``AUTOCAST_DTYPE``), decoder's name."""

    precision: str
    decoder: str

    @property
    def compiled(self) -> bool:
        """Whether it is what ``--compile`` selects: anything but eager."""
        return self.decoder != "eager"

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and cache."""
        return AUTOCAST_DTYPE[self.precision] or torch.float32

    def __str__(self) -> str:
        by = {"eager": "torch's operators", "kernels": "our kernels", "compiled": "torch.compile"}
        return f"{by[self.decoder]} in {str(self.dtype).removeprefix('torch.')}"


Begun = Callable[[Way], bool]  # whether an interrupted run decodes in this way


def place_for_decoding(model: GPT, dtype: torch.dtype, device: torch.device) -> GPT:
    """Cast and move ``model`` in place for decoding; its heads get the width of fast kernels."""
    return pad_heads(model.cast_weights(dtype), channel_multiple(device, dtype)).to(device)


def make_decoder(model: GPT, way: Way, rows: int) -> Decoder:
    """Return a decoder of ``model``, as ``place_for_decoding`` returns it; ``kernels`` consume it.

    rows: rows of the largest step, images times slots (twice with guidance).
    """
    assert not model.training, "call model.eval() before decoding"
    if way.decoder == "kernels":
        return CPUDecoder.consume(model, rows)
    return CompiledDecoder(model) if way.decoder == "compiled" else model


def possible_ways(
    device: torch.device, precision: str, compiled: bool | None, quantized: bool
) -> tuple[list[Way], str | None]:
    """Return the ways that the options leave, and a note on them for the log, or None.

    precision: as written, ``auto`` included; on a CPU our kernels then keep weights in bfloat16,
    whether or not the processor multiplies it. compiled: ``--compile`` as written, None if it was
    left out. Raises ``ValueError`` if ``compiled`` asks for kernels that there are not.
    """
    resolved, reason = resolve_precision(precision, device)
    if device.type != "cpu":
        return [Way(resolved, "compiled" if compiled else "eager")], reason
    kernels = Way("bf16" if precision == "auto" else resolved, "kernels")
    eager = Way(resolved, "eager")
    missing = "none for quantized weights" if quantized else unavailable_reason(kernels.dtype)
    if compiled and missing is not None:
        raise ValueError(f"--compile: no kernels for decoding on this CPU: {missing}")
    if compiled is False or missing is not None:
        slower = f"several times slower than our kernels, which cannot be had: {missing}; "
        return [eager], slower + reason if compiled is None else reason
    note = None
    if kernels.precision == "bf16" and not has_bfloat16(device):
        note = "bfloat16 is only stored: this CPU computes in float32"
    return ([kernels] if compiled else [kernels, eager]), note


def choose_way(
    model: GPT,
    ways: list[Way],
    batch: int,
    guided: bool,
    begun: Begun | None = None,
    window: int = 1,
) -> tuple[Way, str]:
    """Return one of ``ways`` and a line that says why.

    That is the only way there is; otherwise the one that an interrupted run has ``begun`` with, so
    that it ends in the same images; otherwise the faster one on this CPU. model: float32 on the
    CPU, left as it is. batch: images at a time. window: steps at a time, see ``Generator``.
    """
    if len(ways) == 1:
        return ways[0], f"decoding by {ways[0]}"
    for way in ways:
        if begun is not None and begun(way):
            return way, f"decoding by {way}, as the run began"
    seconds, is_new = measured_seconds(model, ways, batch, guided, window)
    best, other = sorted(ways, key=seconds.__getitem__)
    return best, (
        f"decoding by {best}: {1e3 * seconds[best]:.3g} ms per forward call, by {other} "
        f"{1e3 * seconds[other]:.3g} (measured {'now' if is_new else 'before'} on this machine; "
        "--compile and --no-compile override it)"
    )


def measured_seconds(
    model: GPT, ways: list[Way], batch: int, guided: bool, window: int = 1
) -> tuple[dict[Way, float], bool]:
    """Return seconds per forward call of each of ``ways`` on this CPU, and whether they are new.

    Kept beside the compiled kernels and measured again when kernels, processor, torch, model size,
    rows or precision change; not with the number of threads, so that one process or many on a
    machine decode alike.
    """
    shape = {k: v for k, v in asdict(model.config).items() if "drop" not in k}
    kernels = load()
    build = "none" if isinstance(kernels, str) else kernels.key
    facts = [build, torch.__version__, shape, batch, guided, window, [str(w) for w in ways]]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    path = cache_folder() / f"decoders-{key}.json"
    if (seconds := read_seconds(path, ways)) is not None:
        return seconds, False
    seconds = {way: time_step(model, way, batch, guided, window) for way in ways}
    # another process may have measured at the same time
    if (earlier := read_seconds(path, ways)) is not None:
        return earlier, False
    with contextlib.suppress(OSError):  # measured again next time
        write_json(path, {str(way): s for way, s in seconds.items()})
    return seconds, True


def read_seconds(path: Path, ways: list[Way]) -> dict[Way, float] | None:
    """Return what ``measured_seconds`` has kept in ``path``; None if it is not there or damaged."""
    try:
        kept = json.loads(path.read_text())
        seconds = {way: float(kept[str(way)]) for way in ways}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return seconds if all(s > 0.0 for s in seconds.values()) else None


@torch.inference_mode()
def time_step(model: GPT, way: Way, batch: int, guided: bool, window: int = 1) -> float:
    """Return the seconds of a call in the middle, by as many layers as fill ``MEASURED_BYTES``."""
    layer_bytes = sum(p.numel() for p in model.layers[0].parameters()) * way.dtype.itemsize
    layers = min(model.config.n_layer, -(-MEASURED_BYTES // layer_bytes))
    part = first_layers(model, layers).cast_weights(way.dtype)
    rows = 2 * batch if guided else batch
    first = len(model.order.steps) // 2
    last = min(first + window, len(model.order.steps))
    decoder = make_decoder(part, way, rows * model.order.n * window)
    tokens = torch.zeros(rows, model.order.num_tokens, dtype=torch.int64)  # (R, T)
    labels = torch.zeros(rows, dtype=torch.int64)  # (R,)
    cache = decoder.new_cache(rows)
    cache.store.zero_()  # memory never written to would be read from one page

    scale = 1.5 if guided else None
    decoder.decode_step(tokens, labels, first, last, cache, scale)  # warm up
    seconds: list[float] = []
    while not seconds or sum(seconds) < MEASURED_SECONDS:
        started = time.perf_counter()
        decoder.decode_step(tokens, labels, first, last, cache, scale)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def first_layers(model: GPT, count: int) -> GPT:
    """Return a GPT of the first ``count`` layers of ``model``, sharing its weights' memory."""
    with torch.device("meta"):
        part = GPT(replace(model.config, n_layer=count))
    state = model.state_dict()
    part.load_state_dict({name: state[name] for name in part.state_dict()}, assign=True)
    return part.eval().requires_grad_(False)
