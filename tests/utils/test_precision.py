"""Precision follows the machine: which one is taken where and why, said and recorded, and
changed in mid-run.
"""

import json
import platform
import shutil
from pathlib import Path

import pytest
import torch

from autoregressive.models.config import GPT_models
from autoregressive.train import extract_codes_c2i
from tests.helpers import GPT_RUN as NAME
from tests.helpers import NO_DROPOUT, TRAIN_OPTIONS, curve, quietly, run_command
from utils import precision
from utils.precision import has_bfloat16, is_emulated, limit_cpu, resolve_precision

CPU = torch.device("cpu")
EMULATED = (
    "none (float32): this CPU computes in bfloat16 only by emulation, or slower than in float32"
)
# many processors compute in bf16 and fp16 by emulation, a hundred times slower
TINY = dict(n_layer=1, dim=32, n_head=1)
X86 = platform.machine().lower() in ("x86_64", "amd64")


@pytest.fixture
def machine(monkeypatch):
    """``machine(flags, capability, name, gain)`` declares a processor; the real one is hidden."""

    def declare(
        flags: str, capability: str = "AVX512", name: str = "x86_64", gain: float = 2.0
    ) -> None:
        monkeypatch.setattr(precision, "bfloat16_gain", lambda: gain)
        monkeypatch.delenv("PAR_CPU", raising=False)
        monkeypatch.setattr(precision.platform, "machine", lambda: name)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        flags = dict.fromkeys(flags.split(), True) | {"amx_fp16": False, "num_sockets": 1}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)

    return declare


@pytest.mark.parametrize("processor, expected, reason", [
    (("avx2 amx_bf16 avx512_bf16",), "bf16", "bf16: this CPU computes in bfloat16 (AMX)"),
    (("avx2 avx512_bf16",), "bf16", "bf16: this CPU computes in bfloat16 (AVX-512 BF16)"),
    (("bf16", "DEFAULT", "aarch64"), "bf16", "bf16: this CPU computes in bfloat16 (Arm BF16)"),
    (("bf16", "SVE256", "arm64"), "bf16", "bf16: this CPU computes in bfloat16 (Arm BF16)"),
    (("avx2", "AVX2"), "none", EMULATED),
    (("avx2 avx512_f",), "none", EMULATED),
    (("", "DEFAULT", "aarch64"), "none", EMULATED),
    (("avx2 avx512_bf16", "AVX512", "x86_64", 0.5), "none", EMULATED),  # a Xeon whose AMX is hidden
    # ATEN_CPU_CAPABILITY=avx2 on a better one
    (("avx2 amx_bf16 avx512_bf16", "AVX2"), "none", EMULATED),
])  # fmt: skip
def test_auto_on_processors(machine, processor, expected, reason):
    machine(*processor)
    assert has_bfloat16(CPU) is (expected == "bf16")
    assert resolve_precision("auto", CPU) == (expected, reason)


@pytest.mark.parametrize("name", ["avx2", "avx512"])
def test_a_declared_processor_has_no_bfloat16(machine, monkeypatch, name):
    machine("avx2 amx_bf16 avx512_bf16")
    monkeypatch.setenv("PAR_CPU", name)
    assert not has_bfloat16(CPU)
    assert resolve_precision("auto", CPU)[1].endswith(f"than in float32 (PAR_CPU={name})")


@pytest.mark.parametrize("flags, expected", [
    ("flags\t\t: fpu avx2 amx_bf16 avx512_bf16", True),
    ("Features\t: fp asimd bf16", True),
    ("flags\t\t: fpu avx2\nbugs\t\t: bf16", False),
    (None, False),
])  # fmt: skip
def test_before_torch_2_10_the_system_is_asked(machine, monkeypatch, flags, expected):
    def read_text(path: Path) -> str:
        if flags is None:
            raise FileNotFoundError(path)
        return f"processor\t: 0\n{flags}\n"

    machine("")
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(precision.Path, "read_text", read_text)
    assert has_bfloat16(CPU) is expected


@pytest.mark.parametrize("capability, expected, reason", [
    ((7, 5), "fp16", "fp16 with a loss scale: this GPU does not compute in bfloat16"),
    ((8, 0), "bf16", "bf16: this GPU computes in bfloat16 (compute capability 8.0)"),
    ((12, 1), "bf16", "bf16: this GPU computes in bfloat16 (compute capability 12.1)"),
])  # fmt: skip
def test_auto_on_gpus(monkeypatch, capability, expected, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda", 0)
    assert resolve_precision("auto", gpu) == (expected, reason)
    assert is_emulated("bf16", gpu) is (expected == "fp16") and not is_emulated("fp16", gpu)


@pytest.mark.parametrize("kind", ["mps", "xpu", "meta", "privateuseone"])
def test_auto_on_devices_that_are_none_of_ours(kind):
    device = torch.device(kind)
    assert not has_bfloat16(device)
    assert resolve_precision("auto", device) == ("none", f"none (float32): the default on {kind}")
    assert resolve_precision("bf16", device) == ("bf16", "bf16, as asked") and not is_emulated(
        "bf16", device
    )


@pytest.mark.parametrize("flags, written, emulated", [
    ("avx2", "bf16", True),
    ("amx_bf16", "bf16", False),
    ("amx_bf16", "fp16", True),
    ("avx2", "none", False),
    ("avx2", "tf32", False),
])  # fmt: skip
def test_what_is_asked_for_is_taken_and_its_emulation_said(machine, flags, written, emulated):
    machine(flags)
    name, reason = resolve_precision(written, CPU)
    assert name == written and is_emulated(written, CPU) is emulated
    warning = "; slow on this CPU: it may take many times as long as none (float32)"
    assert reason == f"{written}, as asked" + warning * emulated


PROBE = """
import torch
from utils.precision import has_bfloat16
print(torch.backends.cpu.get_cpu_capability(), has_bfloat16(torch.device("cpu")))
a = torch.randn(8, 3, 32, 32)
torch.nn.functional.conv2d(a, torch.randn(16, 3, 3, 3))
"""


@pytest.mark.skipif(
    not (X86 and torch.backends.cpu.get_cpu_capability() != "NO AVX"), reason="declares AVX2"
)
def test_torch_and_its_libraries_keep_to_the_declared_processor():
    done = run_command("python3", "-c", PROBE, PAR_CPU="avx2", ONEDNN_VERBOSE="1")
    assert "AVX2 False" in done.stdout
    assert "isa:Intel AVX2" in done.stdout and "avx512" not in done.stdout


@pytest.mark.slow
def test_compiled_code_of_a_declared_processor_is_kept_apart(monkeypatch):
    """torch.compile's cache is for one width of registers: another's code overruns buffers."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    probe = (
        "import utils.precision; from torch._inductor.runtime.cache_dir_utils import cache_dir; "
        "print(cache_dir())"
    )
    folders = {run_command("python3", "-c", probe, PAR_CPU=name).stdout for name in ("", "avx2")}
    assert len(folders) == 2


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs a better processor than AVX2"
)
def test_a_declaration_that_comes_too_late_is_an_error():
    done = run_command(
        "python3", "-c", "import torch; torch.ones(3) + 1\n" + PROBE, PAR_CPU="avx2", check=False
    )
    assert done.returncode != 0
    assert "ValueError: PAR_CPU=avx2, but torch uses AVX512: " in done.stderr


@pytest.mark.parametrize("name, message", [
    ("pentium", "PAR_CPU=pentium: expected avx2 or avx512, or no PAR_CPU"),
    ("avx512", r"PAR_CPU=avx512: this processor \(x86_64\) does not have avx512"),
])  # fmt: skip
def test_declarations_that_make_no_sense_are_refused(machine, monkeypatch, name, message):
    machine("avx2", "AVX2")
    monkeypatch.setenv("PAR_CPU", name)
    with pytest.raises(ValueError, match=message):
        limit_cpu()


def written_options(folder: Path) -> dict:
    return json.loads((folder / "options.json").read_text())["options"]


def train_words(work: Path, cloud: Path, *options: object) -> list[object]:
    base = [
        "--code-path", work / "codes", "--cloud-save-path", cloud, "--no-local-save",
        *TRAIN_OPTIONS,
    ]  # fmt: skip
    return [*base, *NO_DROPOUT, "--log-every", 1, *options]


def test_training_says_and_records_what_it_takes(work, machine, monkeypatch, capfd, tmp_path):
    monkeypatch.setitem(GPT_models, "GPT-T", TINY)
    machine("avx2", "AVX2")
    log = quietly(capfd, monkeypatch, *train_words(work, tmp_path / "a", "--epochs", 1))
    assert f"--mixed-precision {EMULATED}" in log
    assert "--mixed-precision none (paper: bf16)" in log
    assert written_options(tmp_path / "a" / NAME)["mixed_precision"] == "none"
    machine("amx_bf16")
    log = quietly(capfd, monkeypatch, *train_words(work, tmp_path / "b", "--epochs", 1))
    assert "--mixed-precision bf16: this CPU computes in bfloat16 (AMX)" in log
    assert "(paper: bf16)" not in log
    assert written_options(tmp_path / "b" / NAME)["mixed_precision"] == "bf16"


def test_extraction_is_in_float32_on_every_machine(work, machine, monkeypatch, capfd, tmp_path):
    machine("amx_bf16")
    words = [
        "--vq-ckpt", work / "vq.pt", "--data-path", work / "images", "--image-size", 32,
        "--num-workers", 0,
    ]  # fmt: skip
    main = extract_codes_c2i.main
    log = quietly(capfd, monkeypatch, *words, "--code-path", tmp_path / "a", main=main)
    assert "--precision none (float32), on every machine: bf16 would change some codes" in log
    assert json.loads((tmp_path / "a" / "meta.json").read_text())["precision"] == "none"
    assert written_options(tmp_path / "a")["precision"] == "none"
    machine("avx2", "AVX2")
    log = quietly(
        capfd, monkeypatch, *words, "--code-path", tmp_path / "b", "--precision", "bf16", main=main
    )
    assert "--precision bf16, as asked; slow on this CPU: it may take many times as long" in log
    assert json.loads((tmp_path / "b" / "meta.json").read_text())["precision"] == "bf16"


def test_a_run_goes_on_in_another_precision(work, monkeypatch, capfd, tmp_path):
    """As on another machine: 3 steps of each from the last checkpoint; losses near float32's."""
    monkeypatch.setitem(GPT_models, "GPT-T", TINY)
    quietly(capfd, monkeypatch, *train_words(work, tmp_path / "one", "--mixed-precision", "none"))
    cloud, checkpoints = tmp_path / "changing", tmp_path / "changing" / NAME / "checkpoints"
    for i, name in enumerate(("bf16", "fp16", "bf16", "none", "bf16")):
        options = (
            "--mixed-precision", name, "--ckpt-every", 3, "--keep-last", 9, "--export", "none",
        )  # fmt: skip
        log = quietly(capfd, monkeypatch, *train_words(work, cloud, *options))
        assert ("new run" if i == 0 else f"resumed at step {3 * i}") in log
        for step in range(3 * (i + 2), 16, 3):
            shutil.rmtree(checkpoints / f"{step:07d}")
        scaler = json.loads((checkpoints / f"{3 * i + 3:07d}" / "meta.json").read_text())[
            "scalars"
        ]["scaler"]
        assert bool(scaler) is (name == "fp16")
        assert written_options(cloud / NAME)["mixed_precision"] == name
    lines = map(json.loads, (cloud / NAME / "metrics.jsonl").read_text().splitlines())
    losses = {line["step"]: line["loss"] for line in lines}  # of a step taken twice, the later one
    assert [losses[step] for step in range(1, 16)] == pytest.approx(
        curve(tmp_path / "one"), abs=5e-3
    )
