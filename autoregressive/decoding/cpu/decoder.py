"""The decoding step by our own kernels.

With few rows per step, time goes into reading the weights from memory, and torch's operators reach
only half the memory bandwidth. layout.h shows how weights and cache lie in memory; this file writes
them in that layout, as float32 or bfloat16. Where the processor does not multiply bfloat16, it is
the storage type only, and arithmetic is float32.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.decoding.cpu.build import NAMES, load, unavailable_reason
from autoregressive.models.decode_step import StepDecoder
from autoregressive.models.gpt import GPT

LANES = 16  # outputs in a panel, see layout.h
UNIT_BYTES = 4
DEPTH = 32  # inputs are padded to a multiple of this
MANY_ROWS = 32  # float32 of more rows is bound by arithmetic: AMX's tiles are faster (tiles.h)
HUGE_PAGE = 1 << 21


def _fields(kind: type, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class _Layer(ctypes.Structure):
    _fields_ = _fields(ctypes.c_void_p, "wqkv wo w13 w2 attention_norm ffn_norm")


class _Model(ctypes.Structure):
    _fields_ = [("layers", ctypes.POINTER(_Layer))]
    _fields_ += _fields(ctypes.c_void_p, "norm rotary head seen")
    _fields_ += _fields(ctypes.c_int32, "n_layer dim n_head kv_heads")
    _fields_ += _fields(ctypes.c_int32, "head_dim ffn_dim vocab_size slots")
    _fields_ += [("eps", ctypes.c_float)]


class _Cache(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p)]
    _fields_ += _fields(ctypes.c_int64, "layer_stride row_stride head_stride")


_SIGNATURES = {
    "create": (ctypes.c_void_p, [ctypes.POINTER(_Model)]),
    "destroy": (None, [ctypes.c_void_p]),
    "trunk": (None, [ctypes.c_void_p] * 3 + [ctypes.POINTER(_Cache)] + [ctypes.c_int] * 3),
    "head": (None, [ctypes.c_void_p] * 3 + [ctypes.c_int]),
}


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to


def _units(inputs: int, dtype: torch.dtype) -> int:
    return _round_up(inputs, DEPTH) * dtype.itemsize // UNIT_BYTES


def _pages(size: int) -> Tensor:
    """Return ``size`` zeroed bytes, in 2 MiB pages where possible: small ones cost 5-10% speed."""
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # not every system has them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    first = -whole.data_ptr() % HUGE_PAGE
    return whole[first : first + size]


def _panels(weight: Tensor) -> Tensor:
    """Return a matrix (out, in) as an even number of panels (units, 16, elements of a unit)."""
    per_unit = UNIT_BYTES // weight.element_size()
    outputs, inputs = weight.shape
    units = _units(inputs, weight.dtype)
    right, below = units * per_unit - inputs, _round_up(outputs, 2 * LANES) - outputs
    padded = F.pad(weight, (0, right, 0, below))
    panels = padded.view(-1, LANES, units, per_unit)  # (out / 16, 16, units, per_unit)
    return panels.transpose(1, 2)  # (out / 16, units, 16, per_unit)


def _gate_and_up(w1: Tensor, w3: Tensor) -> Tensor:
    """Interleave w1 and w3 (F, D) -> (2 F, D): 8 rows of one, then the same 8 of the other."""
    half = LANES // 2
    both = [F.pad(w, (0, 0, 0, -len(w) % half)).unflatten(0, (-1, half)) for w in (w1, w3)]
    return torch.stack(both, dim=1).flatten(0, 2)  # (F / 8, 2, 8, D) -> (2 F, D)


def _rotary(freqs_cis: Tensor, head_dim: int) -> Tensor:
    """Return (S, hd / 2, 2) as (S, 2, channels): cos, cos, ... and -sin, sin, ..., padded by 0."""
    cos, sin = freqs_cis.unbind(-1)  # (S, hd / 2)
    cosines, sines = torch.stack([cos, cos], -1), torch.stack([-sin, sin], -1)  # (S, hd / 2, 2)
    turn = torch.stack([cosines, sines], 1).flatten(2)  # (S, 2, hd)
    return F.pad(turn, (0, -head_dim % LANES)).contiguous()  # (S, 2, channels)


class PackedCache:
    """Keys and values of every layer in the kernels' layout, allocated once and filled in place."""

    def __init__(self, store: Tensor):
        self.store = store  # (L, B, Hkv, units of one head's keys and values)

    def first_rows(self, batch: int) -> PackedCache:
        """Return a cache of the first ``batch`` rows that shares this one's memory."""
        return PackedCache(self.store[:, :batch])


class CPUDecoder(StepDecoder):
    """Decoder (see decoding/decoder.py) of a GPT whose weights it owns; made by ``consume``."""

    def __init__(self, model: GPT, rows: int):
        self.config, self.order = model.config, model.order
        self.device = torch.device("cpu")
        self.dtype = model.output.weight.dtype
        self.embed_slots = model.embed_slots
        self._create_kernels(model, rows)

    @classmethod
    def consume(cls, model: GPT, rows: int) -> CPUDecoder:
        """Move the weights of the linear layers out of ``model``; embeddings stay in it.

        model: in ``eval()`` mode, float32 or bfloat16. Needs about the memory of one copy and one
        matrix more. rows: rows of the largest step, images times slots (twice with guidance); the
        kernels are chosen by it. ``model`` refuses to be used afterwards. Raises ``ValueError`` if
        there are no kernels.
        """
        reason = unavailable_reason(model.output.weight.dtype)
        if reason is not None:
            raise ValueError(reason)
        decoder = cls(model, rows)
        methods = "forward logits hidden trunk head decode_step new_cache state_dict"
        for name in methods.split():
            setattr(model, name, _refuse)
        return decoder

    def _create_kernels(self, model: GPT, rows: int) -> None:
        config = self.config
        matrices = [m for m in model.modules() if isinstance(m, nn.Linear)]
        units = [(m.out_features + 2 * LANES) * _units(m.in_features, self.dtype) for m in matrices]
        # memory not yet used; a view, which keeps all of it alive
        self._free = _pages(UNIT_BYTES * sum(units))
        self._kept: list[Tensor] = []  # tensors the kernels point to
        layers = (_Layer * config.n_layer)(*(self._pack_block(block) for block in model.layers))
        norm, rotary = model.norm.weight.float(), _rotary(model.freqs_cis, config.head_dim)
        head = self._pack(model.output.weight, model.output)
        seen = torch.tensor(self.order.seen, dtype=torch.int32)  # (S,)
        self._kept += [norm, rotary, seen]

        pointers = (norm.data_ptr(), rotary.data_ptr(), head.data_ptr(), seen.data_ptr())
        shape = (config.n_layer, config.dim, config.n_head, config.kv_heads)
        sizes = (config.head_dim, config.ffn_dim, config.vocab_size, self.order.num_slots)
        description = _Model(layers, *pointers, *shape, *sizes, config.norm_eps)
        library, kernels = load(), NAMES[self.dtype]
        assert not isinstance(library, str), library  # ``consume`` has asked
        if library.has_tiles and (self.dtype == torch.bfloat16 or rows > MANY_ROWS):
            kernels += "_tiles"
        self._set_threads = library.set_threads
        self._call = {name: getattr(library, f"{name}_{kernels}") for name in _SIGNATURES}
        for name, function in self._call.items():
            function.restype, function.argtypes = _SIGNATURES[name]
        self._handle = self._call["create"](ctypes.byref(description))
        weakref.finalize(self, self._call["destroy"], self._handle)

    def _pack_block(self, block: nn.Module) -> _Layer:
        attention, ffn = block.attention, block.feed_forward
        wqkv = self._pack(attention.wqkv.weight, attention.wqkv)
        wo = self._pack(attention.wo.weight, attention.wo)
        w13 = self._pack(_gate_and_up(ffn.w1.weight, ffn.w3.weight), ffn.w1, ffn.w3)
        w2 = self._pack(ffn.w2.weight, ffn.w2)
        norms = [block.attention_norm.weight.float(), block.ffn_norm.weight.float()]
        self._kept += norms
        return _Layer(*(w.data_ptr() for w in (wqkv, wo, w13, w2, *norms)))

    def _pack(self, weight: Tensor, *modules: nn.Linear) -> Tensor:
        """Copy ``weight`` into our memory as panels, and empty the ``modules`` it is from."""
        panels = _panels(weight.detach())
        size = panels.numel() * panels.element_size()
        packed, self._free = self._free[:size], self._free[size:]
        packed.view(weight.dtype).view(panels.shape).copy_(panels)
        for module in modules:
            module.weight.data = weight.new_empty(0)
        return packed

    def new_cache(self, batch: int) -> PackedCache:
        """Return an empty cache for ``batch`` rows and all slots."""
        config, slot_units = self.config, _units(self.order.num_slots, self.dtype)
        slots = slot_units * UNIT_BYTES // self.dtype.itemsize
        keys = slots * _units(config.head_dim, self.dtype)
        values = slot_units * _round_up(config.head_dim, LANES)
        shape = (config.n_layer, batch, config.kv_heads, keys + values)
        memory = _pages(UNIT_BYTES * torch.Size(shape).numel())
        return PackedCache(memory.view(torch.int32).view(shape))

    def trunk(self, x: Tensor, start: int, cache: PackedCache) -> Tensor:
        """Apply blocks and final norm to slots from ``start``: (B, t, D) -> (B, t, D) float32."""
        batch, t, _ = x.shape
        store = cache.store
        fits = start + t <= self.order.num_slots and batch <= store.shape[1]
        assert fits, "more slots or rows than the cache has"
        x = x.to(torch.float32, copy=True).contiguous()  # (B, t, D), overwritten by the kernels
        hidden = torch.empty_like(x)  # (B, t, D)
        where = _Cache(store.data_ptr(), *store.stride()[:3])
        self._set_threads(torch.get_num_threads())
        self._call["trunk"](
            self._handle, x.data_ptr(), hidden.data_ptr(), ctypes.byref(where), batch, t, start
        )
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """Apply the output layer: (..., D) -> logits (..., V) float32."""
        hidden = hidden.float().contiguous()  # (..., D)
        rows = hidden.numel() // self.config.dim
        logits = hidden.new_empty(*hidden.shape[:-1], self.config.vocab_size)  # (..., V)
        self._call["head"](self._handle, hidden.data_ptr(), logits.data_ptr(), rows)
        return logits


def _refuse(*_: object, **__: object) -> NoReturn:
    raise RuntimeError(
        "CPUDecoder.consume has taken the weights of this GPT; load it again to use it"
    )
