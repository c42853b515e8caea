"""Kernels built for lesser and greater processors give the model's logits."""

import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from autoregressive.decoding.cpu import build
from autoregressive.decoding.cpu.build import unavailable_reason
from autoregressive.decoding.cpu.decoder import CPUDecoder
from autoregressive.decoding.generate import Generator
from autoregressive.decoding.sampling import SamplingOptions, image_randomness
from autoregressive.models.gpt import GPT
from scripts.diagnosis.models import fill_from_names
from scripts.diagnosis.models import golden_gpt as tiny_gpt
from tests.helpers import random_codes, small_config

# name -> flags after our own, and what the processor must have to run the result
BUILDS = {
    "this processor": ("", None),
    "AVX2": ("-march=x86-64-v3", "avx2"),
    "no vectors wider than Arm's": ("-march=x86-64", "sse2"),
    "AVX-512 without bfloat16": ("-march=x86-64-v4", "avx512vl"),
    "AMX, emulated": (
        f"-march=native -D__AMX_BF16__ -include {Path(__file__).with_name('emulated_tiles.h')}",
        "avx512_bf16",
    ),
}


@pytest.fixture(params=list(BUILDS), scope="module")
def kernels(request):
    """The kernels as built for this processor, and for others; skips what cannot run here."""
    flags, needs = BUILDS[request.param]
    if needs is not None and (
        platform.machine() != "x86_64" or needs not in Path("/proc/cpuinfo").read_text()
    ):
        pytest.skip(f"this processor has no {needs}")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("CXXFLAGS", flags)
        build.load.cache_clear()
        if (reason := unavailable_reason(torch.float32)) is not None:
            pytest.skip(reason)
        yield request.param
        build.load.cache_clear()


@pytest.mark.parametrize("n", [4, 9, 16])
def test_greedy_tokens_by_kernels_are_golden(golden, kernels, n):
    """What the samplers decode with on a CPU, in float32."""
    file = golden(f"gpt_tiny_n{n}.npz")
    model, cond = tiny_gpt(file), torch.from_numpy(file["cond"][:-1])
    uniforms = torch.zeros(len(cond), model.order.num_tokens)
    decoder = CPUDecoder.consume(model, 2 * len(cond) * n)
    generator = Generator(
        decoder, model.order, SamplingOptions(cfg_scale=1.75, temperature=0.0), len(cond)
    )
    assert np.array_equal(generator(cond, uniforms).numpy(), file["greedy_raster_cfg1.75"])


# width of a head and of the feed-forward not a multiple of 16, grouped heads, a vocabulary that
# ends within a panel
ODD = dict(
    dim=72, n_head=6, n_kv_head=2, multiple_of=20, vocab_size=301, grid_height=8, grid_width=12
)
WIDE = dict(dim=200, n_head=2)  # heads of 100 channels, as GPT-3B's


# of float32, with tiles, 35 rows have kernels of their own
@pytest.mark.parametrize("batch", [5, 35])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    "shape",
    [
        *(ODD | {"ar_token_num": n} for n in (1, 4, 16)),
        *({"grid_height": 8, "grid_width": 8} | s for s in ({}, WIDE)),
    ],
)
def test_kernels_give_the_logits_of_the_model(kernels, shape, dtype, tolerance, batch):
    """Each step, against float64 and torch's operators; 35 rows are in no block whole."""
    config = small_config(**shape)
    reference = fill_from_names(GPT(config)).double().eval()
    model = fill_from_names(GPT(config)).eval().cast_weights(dtype)
    decoder = CPUDecoder.consume(model, batch * config.ar_token_num)
    tokens = torch.randint(config.vocab_size, (batch, model.order.num_tokens))
    cond = torch.arange(batch) % (config.num_classes + 1)
    caches = [reference.new_cache(batch), decoder.new_cache(batch)]
    with torch.no_grad():
        for i in range(len(model.order.steps)):
            expected = reference.decode_step(tokens, cond, i, i + 1, caches[0])
            logits = decoder.decode_step(tokens, cond, i, i + 1, caches[1]).double()
            assert logits.shape == expected.shape
            assert (logits - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("n", [1, 4])  # 20 rows and 80, see above
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_round_alike_in_any_batch_after_any_other_and_on_any_number_of_threads(
    kernels, dtype, n
):
    options, threads = SamplingOptions(cfg_scale=1.5, cfg_interval=20), torch.get_num_threads()
    config = small_config(grid_height=8, grid_width=8, vocab_size=301, dim=64, ar_token_num=n)
    model = fill_from_names(GPT(config)).eval().cast_weights(dtype)
    generator = Generator(CPUDecoder.consume(model, 20 * n), model.order, options, 10)
    labels, uniforms = map(torch.from_numpy, image_randomness(3, range(10), 3, 64))
    together = generator(labels, uniforms)
    assert together.unique().numel() > 100
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for first, stop in ((0, 1), (1, 6), (6, 10)):
                # NaN in both types, as a diverged batch leaves behind
                generator.cache.store.fill_(0x7FC07FC0)
                alone = generator(labels[first:stop], uniforms[first:stop])
                assert torch.equal(alone, together[first:stop])
    finally:
        torch.set_num_threads(threads)


def test_a_consumed_model_refuses_by_name(kernels):
    """It looked healthy and failed with shape errors, or gave an empty state dict."""
    model = fill_from_names(GPT(small_config())).eval()
    codes, cond = random_codes(model.config)
    CPUDecoder.consume(model, 8)
    for use in (lambda: model(codes, cond), lambda: model.logits(codes, cond), model.state_dict):
        with pytest.raises(RuntimeError, match="CPUDecoder.consume has taken the weights"):
            use()


def run_alone(tmp_path, compiler: list[str], emulator: list[str]) -> np.ndarray:
    """Logits of kernels_alone.cpp: a half in float32, a half over stored bfloat16."""
    program = tmp_path / "-".join([*compiler, "alone"]).replace("/", "-")
    source = Path(__file__).with_name("kernels_alone.cpp")
    command = [
        *compiler,
        "-O3",
        "-std=c++17",
        "-Wno-psabi",
        "-fopenmp",
        str(source),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run([*emulator, program], check=True, capture_output=True, text=True)
    return np.array([float(line) for line in done.stdout.splitlines()])


@pytest.mark.slow
def test_kernels_on_arm_give_what_they_give_here(tmp_path):
    """On an emulated Arm processor: the machine that the tests run on is mostly another."""
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64"
    if shutil.which(compiler) is None or shutil.which(emulator) is None:
        pytest.skip(f"{compiler} and {emulator} are not installed")
    here = run_alone(tmp_path, ["c++"], [])
    arm = run_alone(tmp_path, [compiler, "-static"], [emulator])
    in_float32, in_bfloat16 = np.split(np.abs(here - arm), 2)
    assert len(here) == 8000 and np.abs(here).max() > 1
    assert in_float32.max() < 1e-5 and in_bfloat16.max() < 1e-3
