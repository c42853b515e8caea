"""What the machine is, and whether it has what the code needs."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from autoregressive.decoding.cpu import build
from scripts.diagnosis.check import BROKEN, OK, ROOT, SLOW, Context, NotHere, Result, reason_of
from scripts.diagnosis.models import parameter_count
from scripts.requirements import missing, untried, version_of
from utils.files import prepare_folder
from utils.options import git_revision
from utils.performance import device_name, processor_name, usable_cores
from utils.precision import cpu_flags, resolve_precision

GIB = 2**30
INSTRUCTION_SETS = re.compile(
    r"sse4_2|avx|avx2|fma3?|f16c|avx512.*|avx_vnni.*|avx10.*|amx.*|neon|asimd|sve.*|i8mm|bf16|fp16"
)
PACKAGES = ("torchvision", "numpy", "timm", "pillow", "scipy", "safetensors")
OPTIONAL_PACKAGES = ("torchao", "tensorboard", "wandb", "torchmetrics", "matplotlib")
VARIABLES = (
    "PAR_CPU",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CXX",
    "CXXFLAGS",
    "ATEN_CPU_CAPABILITY",
)
LEAST_DISK = 2 * GIB
BUSY = 0.5  # programs waiting per core, over the last minute


def devices() -> list[str]:
    """Return the names of the devices that torch computes on here, the CPU last."""
    names = (
        [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return names + ["mps"] * torch.backends.mps.is_available() + ["cpu"]


def memory() -> tuple[int, int]:
    """Return bytes of memory in all and available now, in this container; (0, 0) if unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        names = {"SC_PAGE_SIZE", "SC_PHYS_PAGES"}
        total = (
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            if names <= os.sysconf_names.keys()
            else 0
        )
        return total, total
    sizes = {
        line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")
    }
    total, available = sizes["MemTotal"], sizes["MemAvailable"]
    try:  # cgroup version 2
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # none, or "max"
        return total, available
    return min(total, limit), min(available, max(limit - used, 0))


def first_line(*command: str) -> str | None:
    """Return the first line that a program prints; None if it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""


def describe_gpus() -> str:
    """Return name, memory and compute capability of each GPU, and the driver, as one line."""
    if torch.backends.mps.is_available():
        return "Apple GPU (MPS)"
    if not torch.cuda.is_available():
        return "none that torch can use"
    parts = []
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        parts.append(
            f"{found.name}, {found.total_memory / GIB:.0f} GiB, compute capability "
            f"{found.major}.{found.minor}"
        )
    driver = first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return "; ".join(parts) + (f"; driver {driver}" if driver else "")


def describe_torch() -> str:
    """Return the version of torch and of the libraries that it was built with."""
    parts = [
        torch.__version__,
        f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA",
    ]
    if torch.cuda.is_available():
        parts += [
            f"cuDNN {torch.backends.cudnn.version()}",
            f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}",
        ]
    return ", ".join(parts)


def describe_processor() -> str:
    """Return the processor's name, and how many of its cores may be used."""
    return f"{processor_name()}, cores to use: {usable_cores()}, {platform.machine()}"


def describe_instruction_sets() -> str:
    """Return the instruction sets that matter here, and the one that torch takes."""
    flags = sorted(name for name in cpu_flags() if INSTRUCTION_SETS.fullmatch(name))
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{', '.join(flags) or 'unknown'}; torch uses {capability}"


def describe_memory() -> str:
    """Return the memory that is there and available."""
    total, available = memory()
    return f"{available / GIB:.1f} of {total / GIB:.1f} GiB available" if total else "unknown"


def describe_disk(places: dict[str, Path]) -> str:
    """Return the room in ``places``, folders to be written to by purpose."""
    free = {name: shutil.disk_usage(place).free / GIB for name, place in places.items()}
    return "; ".join(f"{free[k]:.1f} GiB free for {k} ({places[k]})" for k in places)


def describe_packages() -> str:
    """Return the versions of installed packages that matter here."""
    versions = {name: version_of(name) for name in (*PACKAGES, *OPTIONAL_PACKAGES)}
    return ", ".join(f"{k} {v}" for k, v in versions.items() if v != "missing")


def describe_environment() -> str:
    """Return the environment variables that matter here."""
    variables = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return ", ".join(variables) or "none of the variables that matter is set"


def describe_machine(places: dict[str, Path]) -> dict[str, str]:
    """Return what the machine is, as name -> text. places: folders to be written to, by purpose."""
    descriptions = {
        "Processor": describe_processor,
        "Instruction sets": describe_instruction_sets,
        "GPUs": describe_gpus,
        "Memory": describe_memory,
        "Disk": partial(describe_disk, places),
        "System": platform.platform,
        "Python": lambda: f"{platform.python_version()} ({sys.executable})",
        "Torch": describe_torch,
        "Packages": describe_packages,
        "C++ compiler": lambda: first_line(build.compile_command()[0], "--version") or "none",
        "Code": lambda: f"commit {git_revision() or 'unknown: not a git clone'}",
    }
    facts = {}
    for name, describe in descriptions.items():
        try:
            facts[name] = describe()
        except Exception as error:  # a driver or a system may fail in any way
            facts[name] = f"unknown ({reason_of(error)})"
    return facts


def check_packages(context: Context) -> Result:
    """Check that the packages of requirements.txt are installed, new enough, and none too new."""
    wrong = [f"{name} ({version})" for name, version in missing(ROOT / "requirements.txt")]
    if wrong:
        return Result(BROKEN, f"missing or too old: {', '.join(wrong)}")
    detail = "all of requirements.txt are there, new enough"
    if newer := untried(ROOT / "requirements-newest.txt"):
        versions = ", ".join(f"{name} {here} ({tried})" for name, here, tried in newer)
        detail += f"; newer than any version that was tried: {versions}"
    return Result(OK, detail)


def check_compiler(context: Context) -> Result:
    """Check that the decoding kernels can be compiled and loaded; they are, and kept for later."""
    library = build.load()
    if isinstance(library, str):
        return Result(
            SLOW, f"no decoding kernels: {library}; sampling falls back to torch's operators"
        )
    tiles = "with AMX" if library.has_tiles else "without AMX"
    return Result(
        OK, f"the decoding kernels compile and load ({tiles}; kept in {build.cache_folder()})"
    )


def check_disk(context: Context) -> Result:
    """Check that the folders to be written to can be written to and have room."""
    figures = {}
    for name, place in context.options.places.items():
        prepare_folder(place, name)
        figures[f"{name} GiB"] = shutil.disk_usage(place).free / GIB
        if shutil.disk_usage(place).free < LEAST_DISK:
            return Result(
                BROKEN,
                f"{place} ({name}) has only {figures[f'{name} GiB']:.2f} GiB free",
                figures=figures,
            )
    return Result(
        OK,
        f"at least {min(figures.values()):.1f} GiB free wherever the code writes",
        figures=figures,
    )


def check_memory(context: Context) -> Result:
    """Check that training ``--gpt-model`` fits in memory: 16 bytes per parameter, and 1 GiB."""
    name = context.options.gpt_model
    needed = 16 * parameter_count(name) + GIB
    if context.device.startswith("cuda"):
        available, total = torch.cuda.mem_get_info(torch.device(context.device))
    else:
        total, available = memory()
    if not total:
        raise NotHere("the system does not tell how much memory it has")
    room = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    detail = f"{room}; training {name} takes {needed / GIB:.1f} GiB or more"
    return Result(
        OK if available >= needed else BROKEN, detail, figures={"available GiB": available / GIB}
    )


def check_idle(context: Context) -> Result:
    """Check that no other programs keep the processor busy, which would make all figures low."""
    if not hasattr(os, "getloadavg"):
        raise NotHere("the system does not tell how busy it is")
    load = os.getloadavg()[0]
    detail = f"{load:.1f} programs at work over the last minute; cores to use: {usable_cores()}"
    return Result(
        SLOW if load > BUSY * usable_cores() + 0.5 else OK, detail, figures={"load": load}
    )


def check_gpu(context: Context) -> Result:
    """Check that torch can use the NVIDIA GPU that the system has."""
    listed = first_line("nvidia-smi", "--list-gpus")
    if torch.cuda.is_available():
        return Result(OK, f"{torch.cuda.device_count()} usable, {device_name()}")
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        raise NotHere("CUDA_VISIBLE_DEVICES is empty, which hides all GPUs")
    if listed:
        return Result(
            BROKEN,
            f"{listed.partition(' (')[0]} is there, but torch {torch.__version__} cannot use it",
        )
    raise NotHere("none, so there is no CUDA graph and no FlexAttention to check")


def check_precision(context: Context) -> Result:
    """Report what ``--mixed-precision auto`` takes on the device."""
    _, reason = resolve_precision("auto", torch.device(context.device))
    return Result(OK, f"auto takes {reason}")
