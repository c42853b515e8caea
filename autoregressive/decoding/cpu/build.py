"""Compile the kernels with the machine's C++ compiler, at first use, and load them.

x86 with AVX2, AVX-512 or AMX, Arm, and anything else that GCC or Clang compiles for. Without a
compiler there are no kernels, and decoding falls back to torch's operators.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch

from utils.precision import cpu_name

FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-std=c++17", "-Wno-psabi", "-fopenmp", "-shared", "-fPIC")
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
DECLARED_MARCH = {None: "native", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}


def cache_folder() -> Path:
    """Return the folder of kernels and measurements: ``par`` in ``XDG_CACHE_HOME`` or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "par"


def compile_command() -> list[str]:
    """Return compiler and flags for this CPU: ``CXX`` (or c++), our flags, then ``CXXFLAGS``."""
    cpu = f"-march={DECLARED_MARCH[cpu_name()]}"
    if platform.machine() in ("aarch64", "arm64"):
        cpu = "-mcpu=native"
    compiler, further = os.environ.get("CXX", "c++"), os.environ.get("CXXFLAGS", "")
    return [*shlex.split(compiler), *FLAGS, cpu, *shlex.split(further)]


def build_key(command: list[str]) -> str:
    """Return a hash of all that compiled kernels depend on: sources, compiler, flags and CPU."""
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True).stdout
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    sources = [path.read_bytes() for path in sorted(FOLDER.glob("*.[ch]*"))]
    parts = [*sources, version, *(s.encode() for s in (platform.machine(), cpu, *command))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def build() -> Path:
    """Compile for this CPU and return the library's path; cached by ``build_key``.

    Raises ``OSError`` or ``subprocess.SubprocessError`` if that fails.
    """
    command = compile_command()
    folder = cache_folder()
    library = folder / f"decoder-{build_key(command)}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # renamed when whole: other processes do the same
        with tempfile.TemporaryDirectory(dir=folder) as work:
            output = Path(work) / library.name
            command += [str(FOLDER / "decoder.cpp"), "-o", str(output)]
            subprocess.run(command, capture_output=True, check=True, text=True)
            output.replace(library)
    return library


class Kernels(ctypes.CDLL):
    """The library; ``key`` names its build, ``has_tiles`` says whether the processor has AMX."""

    key: str
    has_tiles: bool


@functools.cache
def load() -> Kernels | str:
    """Load the library, compiled first if need be; return the reason as text if that fails."""
    try:
        path = build()
        library = Kernels(str(path))
    except subprocess.CalledProcessError as error:
        lines = str(error.stderr).splitlines()
        first = next((s for s in lines if "error" in s), f"exit status {error.returncode}")
        return f"the C++ compiler fails: {first}"
    except (OSError, ValueError, RuntimeError) as error:
        return f"no C++ compiler (set CXX), or its result cannot be kept or loaded: {error}"
    library.start.restype = ctypes.c_bool
    library.has_tiles = library.start()
    library.key = path.stem
    return library


def unavailable_reason(dtype: torch.dtype) -> str | None:
    """Return why this machine has no kernels for weights of ``dtype``; None if it has them."""
    library = load()
    if isinstance(library, str):
        return library
    if dtype not in NAMES:
        return f"none are written for {str(dtype).removeprefix('torch.')}"
    return None
