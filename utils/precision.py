"""Precision follows the machine: what a device computes in, what ``auto`` means there, autocast.

``PAR_CPU=avx2`` or ``PAR_CPU=avx512`` in the environment declares the processor to be a lesser one,
without bfloat16: torch, oneDNN and MKL are held to these instructions. For tests and benchmarks.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import tempfile
import time
from pathlib import Path

import torch

# none, fp32 and tf32 compute in float32; tf32 lets CUDA round the factors of matrix products
AUTOCAST_DTYPE = {
    "none": None,
    "fp32": None,
    "tf32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# flag -> name
CPU_BFLOAT16 = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "bf16": "Arm BF16"}
PRODUCT_WIDTH = 512  # of the matrices that are timed
WORTHWHILE_GAIN = 1.2  # of bfloat16 over float32

# PAR_CPU -> settings of ATen, oneDNN and MKL, each of which reads its own when its
# first operator runs
CPU_LIMITS = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}


def cpu_name() -> str | None:
    """Return the processor that ``PAR_CPU`` declares: ``avx2``, ``avx512``, or None if unset."""
    return os.environ.get("PAR_CPU") or None


def cpu_flags() -> set[str]:
    """Return the processor's instruction sets as torch or Linux names them; empty if unknown."""
    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.10 and newer
        return {name for name, value in torch.cpu.get_capabilities().items() if value is True}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {
        word
        for line in lines
        if line.startswith(("flags", "Features"))
        for word in line.split(":", 1)[1].split()
    }


def limit_cpu() -> None:
    """Hold torch to the processor of ``PAR_CPU``; to be called before any operator has run."""
    name = cpu_name()
    if name is None:
        return
    if name not in CPU_LIMITS:
        raise ValueError(f"PAR_CPU={name}: expected {' or '.join(CPU_LIMITS)}, or no PAR_CPU")
    # Linux and torch spell it differently
    needed = {"avx2": {"avx2"}, "avx512": {"avx512bw", "avx512_bw"}}[name]
    if not needed & cpu_flags():
        raise ValueError(
            f"PAR_CPU={name}: this processor ({platform.machine()}) does not have {name}"
        )
    for variable, value in CPU_LIMITS[name].items():
        os.environ.setdefault(variable, value)
    # torch.compile keeps C++ for one width of registers and compiles it again for another, which
    # then writes past the end of its buffers (seen with torch 2.14.1): each declared processor has
    # a cache of its own
    os.environ.setdefault(
        "TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"torchinductor_{name}")
    )
    capability = torch.backends.cpu.get_cpu_capability()
    if capability != name.upper():
        raise ValueError(
            f"PAR_CPU={name}, but torch uses {capability}: ATEN_CPU_CAPABILITY says so, or an "
            "operator of torch ran before utils.precision was imported"
        )


limit_cpu()


def bfloat16_unit(device: torch.device) -> str | None:
    """Return what computes in bfloat16 on ``device``, in words; None if nothing does or unknown."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"compute capability {major}.{minor}" if major >= 8 else None
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    held = x86 and torch.backends.cpu.get_cpu_capability() != "AVX512"
    if device.type != "cpu" or cpu_name() is not None or held:
        return None
    flags = cpu_flags()
    unit = next((name for flag, name in CPU_BFLOAT16.items() if flag in flags), None)
    return unit if unit is not None and bfloat16_gain() >= WORTHWHILE_GAIN else None


@functools.cache
def bfloat16_gain() -> float:
    """Return the speed of a bfloat16 product relative to float32 on this CPU, measured in 0.1 s.

    An Intel Xeon whose AMX is hidden by a virtual machine has AVX-512 BF16 and takes twice as long
    by it.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(PRODUCT_WIDTH, PRODUCT_WIDTH, dtype=dtype)
        times = []
        for _ in range(6):
            started = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - started)
        seconds[dtype] = min(times)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def has_bfloat16(device: torch.device) -> bool:
    """Return whether ``device`` computes in bfloat16, on a CPU faster than in float32."""
    return bfloat16_unit(device) is not None


def is_emulated(precision: str, device: torch.device) -> bool:
    """Return whether ``device`` emulates ``precision``, a key of ``AUTOCAST_DTYPE``.

    fp16 counts as emulated on every CPU, as few compute in it.
    """
    if precision == "fp16":
        return device.type == "cpu"
    return precision == "bf16" and device.type in ("cpu", "cuda") and not has_bfloat16(device)


def log_level(precision: str, device: torch.device) -> int:
    """Return the log level for ``resolve_precision``'s reason: a warning where it is emulated."""
    return logging.WARNING if is_emulated(precision, device) else logging.INFO


def resolve_precision(written: str, device: torch.device) -> tuple[str, str]:
    """Return the precision to compute in on ``device`` and the reason, for one log line.

    ``written``: ``auto`` (see the help of ``--mixed-precision``) or a key of ``AUTOCAST_DTYPE``,
    which is returned as it is; where ``is_emulated`` is true of it, the reason is a warning.
    """
    if written != "auto":
        slow = f"; slow on this {_kind(device)}: it may take many times as long as none (float32)"
        return written, f"{written}, as asked" + (slow if is_emulated(written, device) else "")
    if unit := bfloat16_unit(device):
        return "bf16", f"bf16: this {_kind(device)} computes in bfloat16 ({unit})"
    if device.type == "cuda":
        return "fp16", "fp16 with a loss scale: this GPU does not compute in bfloat16"
    if device.type != "cpu":
        return "none", f"none (float32): the default on {device.type}"
    declared = f" (PAR_CPU={cpu_name()})" if cpu_name() else ""
    return "none", (
        "none (float32): this CPU computes in bfloat16 only by emulation, or slower "
        f"than in float32{declared}"
    )


def _kind(device: torch.device) -> str:
    return "GPU" if device.type == "cuda" else "CPU"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return an autocast context for ``precision`` of ``AUTOCAST_DTYPE``; off for float32 kinds."""
    dtype = AUTOCAST_DTYPE[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def allow_tf32(allowed: bool) -> None:
    """Allow CUDA to round the factors of float32 products and convolutions to TF32, or forbid it.

    By default torch rounds those of convolutions, which a float32 that was asked for does not mean.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
