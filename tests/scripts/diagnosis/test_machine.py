"""What the doctor says of machines: compiler, packages, memory, disk, load, GPU."""

import os
import sys
from argparse import Namespace
from functools import partial

import torch

from autoregressive.decoding.cpu import build
from scripts import requirements
from scripts.diagnosis import golden, machine
from scripts.diagnosis.check import BROKEN, NOT_HERE, OK, SLOW, run_here
from scripts.diagnosis.checks import list_checks
from tests.scripts.diagnosis.helpers import NO_FILES, context, result_of


def test_no_compiler_is_slow_and_its_kernels_are_not_here(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load.cache_clear()
    try:
        check = next(
            c for c in list_checks(Namespace(**NO_FILES), ["cpu"]) if c.name == "C++ compiler"
        )
        result = run_here(check, context())
        assert (
            result.status == SLOW
            and "no-such-compiler" in result.detail
            and "apt install g++" in result.advice
        )
        assert result_of(partial(golden.check_greedy, way="kernels")).status == NOT_HERE
        assert machine.describe_machine({"here": tmp_path})["C++ compiler"] == "none"
    finally:
        build.load.cache_clear()


def test_missing_and_old_packages_are_named(monkeypatch):
    versions = {"torch": "1.13.0", "timm": "missing"}
    monkeypatch.setattr(requirements, "version_of", lambda package: versions.get(package, "99.1"))
    result = result_of(machine.check_packages)
    assert (
        result.status == BROKEN
        and "torch>=2.7 (1.13.0)" in result.detail
        and "timm>=1.0 (missing)" in result.detail
    )
    versions.clear()
    assert result_of(machine.check_packages).status == OK


def test_versions_newer_than_those_tried_are_named(monkeypatch):
    names = {"torch": "2.99.1", "numpy": "2.0"}
    monkeypatch.setattr(requirements, "version_of", lambda package: names.get(package, "unknown"))
    monkeypatch.setattr(requirements, "NEWEST_PYTHON", (3, 9))
    here = f"Python {sys.version_info[0]}.{sys.version_info[1]} (3.9)"
    result = result_of(machine.check_packages)
    assert result.status == OK
    assert f"newer than any version that was tried: {here}, torch 2.99.1 (2." in result.detail
    assert "numpy" not in result.detail


def test_too_little_memory_or_disk_is_broken(monkeypatch, tmp_path):
    assert result_of(machine.check_memory, gpt_model="GPT-T").status == OK
    monkeypatch.setattr(machine, "memory", lambda: (2**33, 2**33))
    assert result_of(machine.check_memory, gpt_model="GPT-3B").status == BROKEN
    assert result_of(machine.check_disk, places={"kernels": tmp_path}).status == OK
    monkeypatch.setattr(machine, "LEAST_DISK", 1 << 60)
    result = result_of(machine.check_disk, places={"kernels": tmp_path})
    assert result.status == BROKEN and str(tmp_path) in result.detail


def test_a_busy_machine_and_a_gpu_that_torch_cannot_use(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0, 0))
    assert result_of(machine.check_idle).status == SLOW
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0, 0))
    assert result_of(machine.check_idle).status == OK
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "first_line", lambda *command: "GPU 0: NVIDIA H100 (UUID: GPU-1)")
    result = result_of(machine.check_gpu)
    assert result.status == BROKEN and "GPU 0: NVIDIA H100 is there" in result.detail
    monkeypatch.setattr(machine, "first_line", lambda *command: None)
    assert result_of(machine.check_gpu).status == NOT_HERE
