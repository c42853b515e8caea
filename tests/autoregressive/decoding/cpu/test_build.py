"""Compiling the kernels, and what happens where that fails."""

import platform
import shutil
import subprocess

import pytest
import torch

from autoregressive.decoding.cpu import build
from autoregressive.decoding.cpu.build import unavailable_reason
from autoregressive.decoding.cpu.decoder import CPUDecoder
from autoregressive.decoding.decoder import Way, possible_ways
from autoregressive.models.gpt import GPT
from scripts.diagnosis.models import fill_from_names
from tests.helpers import small_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "compiler, reason", [("no-such-compiler", "no C\\+\\+ compiler"), ("false", "compiler")]
)
def test_without_a_compiler_torch_decodes(monkeypatch, tmp_path, compiler, reason):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load.cache_clear()
    try:
        with pytest.raises(ValueError, match=reason):
            CPUDecoder.consume(fill_from_names(GPT(small_config())).eval(), 1)
        ways, note = possible_ways(CPU, "none", None, quantized=False)
        assert ways == [Way("none", "eager")] and "compiler" in note
        with pytest.raises(ValueError, match="--compile: no kernels"):
            possible_ways(CPU, "none", True, quantized=False)
    finally:
        build.load.cache_clear()
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "compiler, flags",
    [("aarch64-linux-gnu-g++", []), ("g++", ["-march=sapphirerapids", "-Wno-maybe-uninitialized"])],
)
def test_kernels_compile_without_warnings(tmp_path, compiler, flags):
    """For Arm and for AMX, compiled only: neither need be at hand."""
    if shutil.which(compiler) is None or (flags and platform.machine() != "x86_64"):
        pytest.skip(f"{compiler} for these is not installed")
    command = [compiler, *build.FLAGS, "-Wall", "-Werror", *flags]
    command += [str(build.FOLDER / "decoder.cpp"), "-o", str(tmp_path / "kernels.so")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_kernels_for_float16():
    if (reason := unavailable_reason(torch.float32)) is not None:
        pytest.skip(reason)
    assert "float16" in unavailable_reason(torch.float16)
    assert possible_ways(CPU, "fp16", None, quantized=False)[0] == [Way("fp16", "eager")]
