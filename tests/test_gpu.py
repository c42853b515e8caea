"""What only a CUDA device can show; skipped without one."""

import numpy as np
import pytest
import torch

from autoregressive.decoding.decoder import Way, make_decoder, place_for_decoding
from autoregressive.decoding.generate import Generator
from autoregressive.decoding.sampling import SamplingOptions
from autoregressive.models.gpt import GPT
from scripts.diagnosis.models import fill_from_names
from scripts.diagnosis.models import golden_gpt as tiny_gpt
from tests.helpers import small_config
from utils.checkpoints.folder import read_sharded, save_sharded
from utils.files import write_json
from utils.precision import autocast
from utils.training.log import Window
from utils.training.state import Ema, Guard, TrainingState, make_adamw

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("n", [4, 16])
@pytest.mark.parametrize("compiled", [False, True])
def test_greedy_tokens_are_golden_on_cuda(golden, n, compiled):
    """Eager, and compiled into one CUDA graph, which is then replayed for a shorter batch."""
    file = golden(f"gpt_tiny_n{n}.npz")
    model = tiny_gpt(file).cuda()
    cond = torch.from_numpy(file["cond"][:-1]).cuda()
    uniforms = torch.zeros(len(cond), model.order.num_tokens, device="cuda")
    options = SamplingOptions(cfg_scale=1.75, temperature=0.0)
    decoder = make_decoder(
        model, Way("none", "compiled" if compiled else "eager"), 2 * len(cond) * n
    )
    generator = Generator(decoder, model.order, options, len(cond))
    expected = file["greedy_raster_cfg1.75"].tolist()
    assert generator(cond, uniforms).cpu().tolist() == expected
    assert generator(cond[:1], uniforms[:1]).cpu().tolist() == expected[:1]
    assert generator(cond.flip(0), uniforms).cpu().tolist() == expected[::-1]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("size", [dict(dim=200, n_head=2), dict(dim=128, n_head=2)], ids=str)
def test_decoding_in_bf16_copies_no_cache(size, compiled):
    """Heads of 100 channels, as GPT-3B's, and of 64: no attention kernel but flash, no padding."""
    config = small_config(**size, grid_height=8, grid_width=8)
    model = place_for_decoding(
        fill_from_names(GPT(config)).eval(), torch.bfloat16, torch.device("cuda")
    )
    decoder = make_decoder(model, Way("bf16", "compiled" if compiled else "eager"), 16)
    generator = Generator(decoder, model.order, SamplingOptions(cfg_scale=1.5), 2)
    cond, uniforms = torch.tensor([0, 1]).cuda(), torch.rand(2, 64).cuda()
    generator(cond, uniforms)
    with torch.profiler.profile() as profile:
        generator(cond, uniforms)
    names = {event.key.lower() for event in profile.key_averages()}
    assert not [name for name in names if "constant_pad_nd" in name or "cudnn" in name]
    assert any("flash" in name for name in names)


def test_compiled_bf16_training_step(golden):
    file = golden("gpt_tiny_n4.npz")
    model = tiny_gpt(file).cuda().train()
    step = torch.compile(model)
    with autocast(torch.device("cuda"), "bf16"):
        loss, _ = step(
            torch.from_numpy(file["raster_tokens"]).long().cuda(),
            torch.from_numpy(file["cond"]).cuda(),
        )
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def training_state(model) -> TrainingState:
    optimizer = make_adamw(model, 1e-3, 0.05, (0.9, 0.95))
    guard = Guard(torch.device("cuda"), 1.0, 20)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    return TrainingState(model, optimizer, scaler, Ema(model), guard)


def test_a_training_step_never_waits_for_the_device(golden):
    """From the batch on the host to the average: torch raises where a step would synchronise."""
    file = golden("gpt_tiny_n4.npz")
    model = tiny_gpt(file).cuda().train()
    state, window = training_state(model), Window(("loss", "grad_norm"), torch.device("cuda"))
    # more than 3072 indices, as in a real step: the gradient of an embedding has a kernel for fewer
    codes, cond = (
        torch.from_numpy(np.tile(file[k], (32,) + (1,) * (file[k].ndim - 1))).long().pin_memory()
        for k in ("raster_tokens", "cond")
    )
    assert codes.numel() > 3072
    for step in range(4):
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            with autocast(torch.device("cuda"), "bf16"):
                loss, _ = model(codes.cuda(non_blocking=True), cond.cuda(non_blocking=True))
            loss.backward()
            norm = state.gradient_norm()
            state.update(step, loss.detach(), norm, 1.0)
            window.add({"loss": loss.detach(), "grad_norm": norm})
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert window.read(1)["loss"] > 0


@pytest.mark.parametrize("n", [1, 4])
def test_flex_attention_trains_like_the_dense_mask(golden, n):
    """Compiled FlexAttention against the dense mask in float32: loss and every gradient."""
    file = golden(f"gpt_tiny_n{n}.npz")
    codes = torch.from_numpy(file["raster_tokens"]).long().cuda()
    cond = torch.from_numpy(file["cond"]).cuda()
    grads = []
    for flex in (False, True):
        model = tiny_gpt(file).cuda()
        if flex:
            model.use_flex_attention(torch.device("cuda"))
            for block in model.layers:
                block.compile()
        loss, _ = model(codes, cond)
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in model.parameters())])
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-2)


def test_a_checkpoint_keeps_what_was_when_it_was_taken(tmp_path, golden):
    """Written in the background while training on the device goes on."""
    model = tiny_gpt(golden("gpt_tiny_n4.npz")).cuda()
    state = training_state(model)
    before = {k: v.cpu().clone() for k, v in state.tensors().items()}
    future = save_sharded(tmp_path / "a", state.tensors(), None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    write_json(tmp_path / "a" / "meta.json", future.result())
    assert all(torch.equal(read_sharded(tmp_path / "a", k)[""], v) for k, v in before.items())
