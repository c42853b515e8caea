"""The GPT's decoding step on a CPU by kernels of our own, built once by the machine's C++ compiler.

At 8 rows a step is bound by reading the weights, and torch's operators reach half of the memory's speed; see
cpu_decoding.cpp for how the kernels reach nearly all of it. float32 runs on any CPU, bfloat16 where it has AVX-512
BF16 (and several times faster with AMX). Without a compiler decoding falls back to torch's operators.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import platform
import shlex
import subprocess
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from autoregressive.models.gpt import GPT

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ["-O3", "-march=native", "-std=c++17", "-Wno-psabi", "-fopenmp", "-shared", "-fPIC"]
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
LANES = 16  # outputs in a panel
UNIT_BYTES = 4
DEPTH = 32  # elements that a product sums over come in multiples of this
MANY_ROWS = 32  # above, float32 is bound by arithmetic, and faster as ``split`` (see cpu_decoding.cpp)
HUGE_PAGE = 1 << 21


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("wqkv", "wo", "w13", "w2", "attention_norm", "ffn_norm")]


class _Model(ctypes.Structure):
    _fields_ = [("layers", ctypes.POINTER(_Layer))]
    _fields_ += [(name, ctypes.c_void_p) for name in ("norm", "rotary", "head")]
    _fields_ += [
        (name, ctypes.c_int32)
        for name in ("n_layer", "dim", "n_head", "kv_heads", "head_dim", "ffn_dim", "vocab_size", "slots")
    ]
    _fields_ += [("eps", ctypes.c_float)]


class _Cache(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p)]
    _fields_ += [(name, ctypes.c_int64) for name in ("layer_stride", "row_stride", "head_stride")]


_SIGNATURES = {
    "create": (ctypes.c_void_p, [ctypes.POINTER(_Model)]),
    "destroy": (None, [ctypes.c_void_p]),
    "trunk": (None, [ctypes.c_void_p] * 3 + [ctypes.POINTER(_Cache)] + [ctypes.c_int] * 3),
    "head": (None, [ctypes.c_void_p] * 3 + [ctypes.c_int]),
}


def build() -> Path:
    """Compile the kernels for this very processor, unless that was done before; the shared library.

    The compiler is ``CXX`` (default c++), with ``CXXFLAGS`` after our own; the result is kept in ~/.cache/par
    (``XDG_CACHE_HOME``). ``OSError`` or ``subprocess.SubprocessError`` where it fails.
    """
    command = [*shlex.split(os.environ.get("CXX", "c++")), *FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout
    info = Path("/proc/cpuinfo")
    processor = next((s for s in info.read_text().splitlines() if s.startswith(("flags", "Features"))), "")
    facts = [SOURCE.read_bytes(), version, *(s.encode() for s in (platform.machine(), processor, *command))]
    key = hashlib.sha256(b"\0".join(facts)).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "par"
    library = folder / f"{SOURCE.stem}-{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:  # renamed when whole: other processes do the same
            made = Path(work) / library.name
            subprocess.run([*command, str(SOURCE), "-o", str(made)], capture_output=True, check=True, text=True)
            made.replace(library)
    return library


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The kernels, or why there are none."""
    try:
        library = ctypes.CDLL(str(build()))
    except subprocess.CalledProcessError as error:
        first = next((s for s in str(error.stderr).splitlines() if "error" in s), f"exit status {error.returncode}")
        return f"the C++ compiler fails: {first}"
    except (OSError, ValueError, RuntimeError) as error:
        return f"no C++ compiler (set CXX), or its result cannot be kept or loaded: {error}"
    library.start.restype = ctypes.c_bool
    library.has_tiles = library.start()
    return library


def why_not(dtype: torch.dtype) -> str | None:
    """Why there are no kernels for weights of ``dtype`` on this machine; None where there are."""
    library = _load()
    if isinstance(library, str):
        return library
    if dtype not in NAMES or not hasattr(library, f"create_{NAMES[dtype]}"):
        return f"this processor, or the C++ compiler, has no instructions for {str(dtype).removeprefix('torch.')}"
    return None


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to


def _units(elements: int, dtype: torch.dtype) -> int:
    return _round_up(elements, DEPTH) * dtype.itemsize // UNIT_BYTES


def _pages(size: int) -> torch.Tensor:
    """``size`` zeroed bytes, in 2 MiB pages where the system gives them: small ones cost 5-10% of the speed."""
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):  # not every system has them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    first = -whole.data_ptr() % HUGE_PAGE
    return whole[first : first + size]


def _panels(weight: torch.Tensor) -> torch.Tensor:
    """A matrix (out, in) as the kernels read it: (out / 16, units, 16, elements of a unit).

    Padded with zeros, to an even number of panels.
    """
    per = UNIT_BYTES // weight.element_size()
    outputs, inputs = weight.shape
    units = _units(inputs, weight.dtype)
    padded = F.pad(weight, (0, units * per - inputs, 0, _round_up(outputs, 2 * LANES) - outputs))
    return padded.view(-1, LANES, units, per).transpose(1, 2)  # (out / 16, units, 16, per)


def _gate_and_up(w1: torch.Tensor, w3: torch.Tensor) -> torch.Tensor:
    """w1 and w3 (F, D) -> (2 F, D): in turn 8 rows of one and the same 8 of the other."""
    both = torch.stack([F.pad(w, (0, 0, 0, -len(w) % (LANES // 2))).unflatten(0, (-1, LANES // 2)) for w in (w1, w3)])
    return both.transpose(0, 1).flatten(0, 2)  # (F / 8, 2, 8, D) -> (2 F, D)


def _rotary(freqs_cis: torch.Tensor, head_dim: int) -> torch.Tensor:
    """cos and sin (T, hd / 2, 2) -> (T, 2, channels): cos, cos, ... and -sin, sin, ..., zero beyond head_dim."""
    cos, sin = freqs_cis.unbind(-1)  # (T, hd / 2)
    turn = torch.stack([torch.stack([cos, cos], -1), torch.stack([-sin, sin], -1)], 1).flatten(2)  # (T, 2, hd)
    return F.pad(turn, (0, -head_dim % LANES)).contiguous()  # (T, 2, channels)


class PackedCache:
    """Keys and values of every layer in the kernels' layout, allocated once and filled in place."""

    def __init__(self, store: torch.Tensor):
        self.store = store  # (L, B, Hkv, units of one head's keys and values)

    def first_rows(self, batch: int) -> PackedCache:
        """A cache of the first ``batch`` rows that shares this one's memory."""
        return PackedCache(self.store[:, :batch])


class CPUDecoder:
    """Blocks, final norm and output layer of a ``model`` in ``eval()`` mode, of float32 or bfloat16.

    ``rows``: how many the largest step has, of all images and slots together; the kernels are chosen by it.
    Takes their weights: what the model's layers held is let go as it is copied, and they can no longer be used.
    ``ValueError`` if ``why_not`` has a reason.
    """

    def __init__(self, model: GPT, rows: int):
        dtype = model.output.weight.dtype
        reason = why_not(dtype)
        if reason is not None:
            raise ValueError(reason)
        config, self.slots, self.dtype = model.config, model.order.num_tokens, dtype
        self.config, self._kept = config, []
        matrices = [m for m in model.modules() if isinstance(m, nn.Linear)]
        sizes = [(m.out_features + 2 * LANES) * _units(m.in_features, dtype) * UNIT_BYTES for m in matrices]
        self._free = _pages(sum(sizes))  # what is not yet taken, which keeps all of it alive
        layers = (_Layer * config.n_layer)(*(self._pack_block(block) for block in model.layers))
        norm, rotary = model.norm.weight.float(), _rotary(model.freqs_cis, config.head_dim)
        head = self._pack(model.output.weight, model.output)
        self._kept += [norm, rotary]
        shape = (config.n_layer, config.dim, config.n_head, config.kv_heads, config.head_dim, config.ffn_dim)
        pointers = (norm.data_ptr(), rotary.data_ptr(), head.data_ptr())
        description = _Model(layers, *pointers, *shape, config.vocab_size, self.slots, config.norm_eps)
        library, kernels = _load(), NAMES[dtype]
        if dtype == torch.float32 and rows > MANY_ROWS and library.has_tiles:
            kernels = "split"
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, f"{name}_{kernels}")
            function.restype, function.argtypes = result, arguments
            setattr(self, f"_{name}", function)
        self._handle = self._create(ctypes.byref(description))
        weakref.finalize(self, self._destroy, self._handle)

    def _pack_block(self, block: nn.Module) -> _Layer:
        attention, ffn = block.attention, block.feed_forward
        wqkv, wo = (self._pack(m.weight, m) for m in (attention.wqkv, attention.wo))
        w13 = self._pack(_gate_and_up(ffn.w1.weight, ffn.w3.weight), ffn.w1, ffn.w3)
        w2 = self._pack(ffn.w2.weight, ffn.w2)
        norms = [block.attention_norm.weight.float(), block.ffn_norm.weight.float()]
        self._kept += norms
        return _Layer(*(w.data_ptr() for w in (wqkv, wo, w13, w2, *norms)))

    def _pack(self, weight: torch.Tensor, *modules: nn.Linear) -> torch.Tensor:
        """Copy ``weight`` into our memory as panels; ``modules`` let go of theirs."""
        panels = _panels(weight.detach())
        size = panels.numel() * panels.element_size()
        packed, self._free = self._free[:size], self._free[size:]
        packed.view(weight.dtype).view(panels.shape).copy_(panels)
        for module in modules:
            module.weight.data = weight.new_empty(0)
        return packed

    def new_cache(self, batch: int) -> PackedCache:
        """A cache for ``batch`` rows and all slots."""
        config, slot_units = self.config, _units(self.slots, self.dtype)
        slots = slot_units * UNIT_BYTES // self.dtype.itemsize
        head = slots * _units(config.head_dim, self.dtype) + slot_units * _round_up(config.head_dim, LANES)
        shape = (config.n_layer, batch, config.kv_heads, head)
        return PackedCache(_pages(UNIT_BYTES * torch.Size(shape).numel()).view(torch.int32).view(shape))

    def trunk(self, x: torch.Tensor, start: int, cache: PackedCache) -> torch.Tensor:
        """As ``GPT.trunk``: slots from ``start``, (B, t, D) of any type -> (B, t, D) float32."""
        batch, t, _ = x.shape
        store = cache.store
        assert start + t <= self.slots and batch <= store.shape[1], "more slots or rows than the cache has"
        x = x.to(torch.float32, copy=True).contiguous()  # (B, t, D), overwritten by the kernels
        hidden = torch.empty_like(x)  # (B, t, D)
        where = _Cache(store.data_ptr(), *store.stride()[:3])
        self._trunk(self._handle, x.data_ptr(), hidden.data_ptr(), ctypes.byref(where), batch, t, start)
        return hidden

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output layer: (..., D) -> logits (..., V) float32."""
        hidden = hidden.float().contiguous()  # (..., D)
        rows = hidden.numel() // self.config.dim
        logits = hidden.new_empty(*hidden.shape[:-1], self.config.vocab_size)  # (..., V)
        self._head(self._handle, hidden.data_ptr(), logits.data_ptr(), rows)
        return logits
