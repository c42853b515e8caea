"""What the samplers share: quantised weights, fingerprint, precision of the tokenizer."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import pytest
import torch

from autoregressive.decoding.decoder import Way
from autoregressive.decoding.sampling import SamplingOptions
from autoregressive.models.gpt import GPT
from autoregressive.sample.pipeline import Pipeline, quantize
from scripts.diagnosis.models import golden_gpt as tiny_gpt
from tests.fake_cuda import CUDA
from tests.helpers import small_config
from utils.distributed import World


@pytest.mark.parametrize("what", ["int8", "fp8"])
def test_quantised_weights_are_near(golden, what):
    pytest.importorskip("torchao")
    file = golden("gpt_tiny_n4.npz")
    model, rounded = tiny_gpt(file), tiny_gpt(file)
    quantize(rounded, what)
    codes = torch.from_numpy(file["raster_tokens"]).long()
    logits, found = (m.logits(codes, torch.from_numpy(file["cond"])) for m in (model, rounded))
    error = ((found - logits).square().mean() / logits.square().mean()).sqrt().item()
    assert 1e-4 < error < {"int8": 0.05, "fp8": 0.2}[what]


def test_samples_of_another_gpu_do_not_mix_in(monkeypatch):
    """Chunks of an A100 and an H100 went into one file, whose bytes are said to be a function."""
    names = ("gpt", "vq", "gpt_name", "vq_name", "classes", "ways", "note")
    pipeline = Pipeline(
        **dict.fromkeys(names),
        options=SamplingOptions(),
        window=1,
        world=World(0, 1, CUDA),
        hashes={"gpt_ckpt": "a"},
    )
    args = Namespace(quantize="none", gpt_ema=False, image_size_eval=8, per_proc_batch_size=2)
    vars(args).update(num_fid_samples=4, global_seed=0, class_protocol="random")
    fingerprints = []
    for name in ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        fingerprints.append(pipeline.fingerprint(args, Way("bf16", "compiled")))
    assert fingerprints[0] == fingerprints[2] != fingerprints[1]


@pytest.fixture
def tf32_flags() -> Iterator[None]:
    """Let a test change what CUDA may round."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


@pytest.mark.parametrize("precision, allowed", [("none", False), ("bf16", True)])
def test_samples_in_float32_are_decoded_in_float32(tf32_flags, monkeypatch, precision, allowed):
    """torch rounds factors of convolutions to TF32 unless told not to: so was --precision none."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not allowed)
    names = ("vq", "gpt_name", "vq_name", "classes", "ways", "note", "hashes")
    world = World(0, 1, torch.device("cpu"))
    gpt = GPT(small_config()).eval()
    pipeline = Pipeline(
        **dict.fromkeys(names), gpt=gpt, options=SamplingOptions(), window=1, world=world
    )
    pipeline.make_generator(Way(precision, "eager"), 2, "none")
    assert torch.backends.cudnn.allow_tf32 is allowed
