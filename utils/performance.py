"""Speed and memory of a device: peak FLOP/s, cores, name, peak memory."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from utils.precision import AUTOCAST_DTYPE, cpu_name

# dense bf16 and fp16 matrix products, operations per second, from the data sheets; the first key in
# the name counts
DATA_SHEET = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "H20": 148e12, "B200": 2250e12}
DATA_SHEET |= {
    "A100": 312e12,
    "A800": 312e12,
    "H800": 989e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "V100": 125e12,
}


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """Return operations per second of matrix products on ``device``, and the source of the figure.

    precision: a key of ``AUTOCAST_DTYPE``. GPUs in half precision have the figure of their data
    sheet where it is listed; otherwise a product of square matrices is measured now.
    """
    dtype = AUTOCAST_DTYPE[precision] or torch.float32
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for part, figure in DATA_SHEET.items():
            if part in name:
                return figure, "data sheet"
    return measured_flops(device, dtype), "a matrix product measured at start"


def measured_flops(device: torch.device, dtype: torch.dtype, width: int | None = None) -> float:
    """Return operations per second of a product of square matrices, measured now.

    width: side of the matrices (default: 1024 on a CPU, 4096 elsewhere).
    """
    width = width or (1024 if device.type == "cpu" else 4096)
    a = torch.randn(width, width, device=device, dtype=dtype)
    seconds: list[float] = []
    # five times, or once where the type is emulated: bf16 takes 2.3 s on one core with AVX2
    while len(seconds) < 5 and sum(seconds) < 1.0:
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return 2 * width**3 / min(seconds)


class Ceiling:
    """Operations per second that a device can reach, for the share that a program reaches.

    A figure that was measured while others used the machine is too low: a share above 1 has it
    measured again.
    """

    def __init__(self, device: torch.device, precision: str):
        self.flops, self.source = peak_flops(device, precision)
        self._measure = (device, precision)

    def share(self, flops: float) -> float:
        """Return the share of the ceiling that ``flops`` per second are, at most 1."""
        if flops > self.flops:
            self.flops = max(flops, peak_flops(*self._measure)[0])
        return flops / self.flops


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count(asked: int) -> int:
    """Return the worker processes that this rank may start: ``asked``, at most its share of cores.

    The ranks of a machine share its cores, as torchrun tells by LOCAL_WORLD_SIZE.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(asked, max(1, usable_cores() // ranks))


def processor_name() -> str:
    """Return the processor's name, with the one that ``PAR_CPU`` declares."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [
        line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))
    ]
    if sys.platform == "darwin":
        words = ["sysctl", "-n", "machdep.cpu.brand_string"]
        names = [subprocess.run(words, capture_output=True, text=True).stdout.strip()]
    declared = f", declared {cpu_name()}" if cpu_name() else ""
    return (next(filter(None, names), "") or platform.processor() or platform.machine()) + declared


def device_name() -> str:
    """Return the GPU's name, else the processor's."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()


def peak_memory(device: torch.device) -> int:
    """Return peak memory in bytes: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):  # only Linux has it, and not in every sandbox: gVisor leaves out VmHWM
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    # on Linux this also counts the process that started this one
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
