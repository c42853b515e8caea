"""What only a CUDA device can show; skipped without one."""

import sys
from functools import partial

import numpy as np
import pytest
import torch

from autoregressive.decoding.decoder import Way, make_decoder, place_for_decoding
from autoregressive.decoding.generate import Generator
from autoregressive.decoding.sampling import SamplingOptions, sample
from autoregressive.models.causal_attention import make_causal_mask
from autoregressive.models.gpt import GPT
from autoregressive.train import kernels
from scripts.diagnosis import resume
from scripts.diagnosis.check import OK, Check, run_apart
from scripts.diagnosis.check import Context as CheckContext
from scripts.diagnosis.models import fill_from_names
from scripts.diagnosis.models import golden_gpt as tiny_gpt
from tests.helpers import ROOT, kill, newest, random_codes, small_config, start, wait_for
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


# heads of 64 channels, as most sizes have, and of 100, as GPT-3B's, over all slots of a 384 image
REAL = dict(grid_height=24, grid_width=24, vocab_size=1024)
HEADS = [dict(dim=128, n_head=2), dict(dim=200, n_head=2)]


@pytest.mark.parametrize("heads", HEADS, ids=["64", "100"])
@pytest.mark.parametrize("n", [1, 4, 16])
def test_a_replayed_graph_makes_the_tokens_of_its_kernels(heads, n):
    """T = 576 in bf16: tokens of the graph are those of the same kernels launched one by one.

    At n = 1 the schedule is too long for one graph. Logits are near those of float32.
    """
    config = small_config(**heads, **REAL, ar_token_num=n)
    model = fill_from_names(GPT(config)).eval()
    reference = fill_from_names(GPT(config)).eval().cuda()
    placed = place_for_decoding(model, torch.bfloat16, torch.device("cuda"))
    decoder = make_decoder(placed, Way("bf16", "compiled"), 4 * n)
    generator = Generator(decoder, model.order, SamplingOptions(cfg_scale=1.5), 2)
    cond, uniforms = torch.tensor([0, 1]).cuda(), torch.rand(2, 576).cuda()
    codes = generator(cond, uniforms)
    with torch.inference_mode():
        assert torch.equal(codes, generator._decode(cond, uniforms))
    assert torch.equal(codes, generator(cond, uniforms)) and codes.unique().numel() > 100

    logits = []
    for each in (decoder, reference):
        cache, tokens = each.new_cache(2), codes[:, model.order.permutation]  # (2, T)
        with torch.inference_mode():
            steps = [
                each.decode_step(tokens, cond, i, i + 1, cache, None)
                for i in range(len(model.order.steps))
            ]
        logits.append(torch.cat(steps, dim=1).float())  # (2, T, V)
    ours, expected = logits
    assert (ours - expected).norm() < 4e-2 * expected.norm()


@pytest.mark.parametrize("options", [{}, {"top_k": 50}, {"top_k": 50, "top_p": 0.9}], ids=str)
def test_the_compiled_draw_is_the_draw(options):
    """One function on a GPU: the same tokens but for rounding, and none that top-k cuts off."""
    logits, uniforms = 4 * torch.randn(64, 4, 16384).cuda(), torch.rand(64, 4).cuda()
    options = SamplingOptions(**options)
    draw = torch.compile(sample, dynamic=False)
    found, again = (draw(logits, uniforms, options) for _ in range(2))
    assert torch.equal(found, again)
    assert (found == sample(logits, uniforms, options)).float().mean() > 0.98
    if options.top_k:
        least = logits.topk(50).values[..., -1]  # (64, 4)
        assert (logits.gather(-1, found[..., None])[..., 0] >= least).all()


def gradients(model: GPT, codes, cond) -> list[torch.Tensor]:
    with autocast(torch.device("cuda"), "bf16"):
        loss, _ = model(codes, cond)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("heads", HEADS, ids=["64", "100"])
@pytest.mark.parametrize("n", [4, 16])
def test_attention_kernels_train_like_the_dense_mask_over_all_slots(heads, n):
    """T = 576 in bf16: loss and gradient of compiled blocks, each way against the mask."""
    rates = ("class_dropout_prob", "token_dropout_p", "attn_dropout_p", "resid_dropout_p")
    no_dropout = dict.fromkeys((*rates, "ffn_dropout_p"), 0.0)
    config = small_config(**heads, **REAL, ar_token_num=n, **no_dropout)
    codes, cond = (x.cuda() for x in random_codes(config, 4))
    found = []
    for kind in ("dense", "flash", "flex"):
        model = fill_from_names(GPT(config)).cuda().train()
        if kind == "flex":
            model.use_flex_attention(torch.device("cuda"))
        if kind == "flash":
            assert kernels.unavailable_reason(model, "bf16", torch.device("cuda")) is None
            model.block_mask = make_causal_mask(model.order.mask()).to(torch.device("cuda"))
        for block in model.layers:
            block.compile()
        found.append(gradients(model, codes, cond))
    for expected, *others in zip(*found, strict=True):
        for ours in others:
            assert (ours - expected).norm() <= 8e-2 * expected.norm() + 1e-6


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


@pytest.mark.parametrize("kind", ["dense", "flash", "flex"])
def test_a_real_step_never_waits_for_the_device(kind):
    """32 images of 576 codes, compiled blocks, with and without attention dropout."""
    device, rate = torch.device("cuda"), 0.0 if kind == "flex" else 0.1
    model = GPT(small_config(dim=128, n_head=2, **REAL, attn_dropout_p=rate)).cuda().train()
    model.init_weights()
    if kind == "flex":
        model.use_flex_attention(device)
    if kind == "flash":
        model.block_mask = make_causal_mask(model.order.mask()).to(device)
    for block in model.layers:
        block.compile()
    state = training_state(model)
    codes, cond = (x.pin_memory() for x in random_codes(model.config, 32))
    losses = []
    for step in range(6):
        torch.cuda.set_sync_debug_mode("error" if step > 3 else "default")
        try:
            with autocast(device, "bf16"):
                loss, _ = model(codes.cuda(non_blocking=True), cond.cuda(non_blocking=True))
            loss.backward()
            state.update(step, loss.detach(), state.gradient_norm(), 1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        losses.append(loss.detach())
    assert losses[-1] < losses[0]


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


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    """SIGKILL in mid-run; losses after it are those of a run that nothing stopped."""
    resume.write_codes(tmp_path / "codes")
    script = ROOT / "autoregressive" / "train" / "train_c2i.py"

    def begin(name: str):
        words = [sys.executable, script, "--code-path", tmp_path / "codes", *resume.OPTIONS]
        words += ["--cloud-save-path", tmp_path / name, *resume.NO_DROPOUT]
        return start(words, CUDA_VISIBLE_DEVICES="0")

    assert begin("whole").wait() == 0
    killed, folder = begin("killed"), tmp_path / "killed" / resume.RUN / "checkpoints"
    wait_for(lambda: newest(folder) > 0, killed)
    kill(killed)
    assert begin("killed").wait() == 0
    assert resume.loss_difference(tmp_path, "whole", "killed") <= resume.ROUNDING


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_processes_of_nccl_shard_a_model(tmp_path):
    """FSDP over two GPUs goes on from a checkpoint of one, with the same losses."""
    check = Check("", "", partial(resume.check_sharded, processes=2), "", "cuda:0", 120)
    result = run_apart(check, CheckContext(None, ROOT, tmp_path), 120)
    assert result.status == OK, result.detail
