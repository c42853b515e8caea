"""What only a CUDA device can show; skipped without one."""

import pytest
import torch

from autoregressive.models.generate import SamplingOptions, generate
from tests.test_gpt import tiny_gpt
from utils.distributed import autocast

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("n", [4, 16])
@pytest.mark.parametrize("compiled", [False, True])
def test_greedy_tokens_are_golden_on_cuda(golden, n, compiled):
    file = golden(f"gpt_tiny_n{n}.npz")
    model = tiny_gpt(file).cuda()
    if compiled:
        model.trunk = torch.compile(model.trunk, dynamic=True)
    cond = torch.from_numpy(file["cond"][:-1]).cuda()
    uniforms = torch.zeros(len(cond), model.order.num_tokens, device="cuda")
    codes = generate(model, cond, uniforms, SamplingOptions(cfg_scale=1.75, temperature=0.0))
    assert codes.cpu().tolist() == file["greedy_raster_cfg1.75"].tolist()


def test_compiled_bf16_training_step(golden):
    file = golden("gpt_tiny_n4.npz")
    model = tiny_gpt(file).cuda().train()
    step = torch.compile(model)
    with autocast(torch.device("cuda"), "bf16"):
        loss, _ = step(torch.from_numpy(file["raster_tokens"]).long().cuda(), torch.from_numpy(file["cond"]).cuda())
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
