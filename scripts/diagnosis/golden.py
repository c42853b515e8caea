"""Numbers that the published code produced, made again by each way of computing on a device.

In float32 on a CPU, logits must agree to 1e-4, and tokens and codes exactly.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from autoregressive.decoding.compiled import CompiledDecoder
from autoregressive.decoding.cpu.build import unavailable_reason
from autoregressive.decoding.cpu.decoder import CPUDecoder
from autoregressive.decoding.decoder import Decoder, place_for_decoding
from autoregressive.decoding.generate import Generator
from autoregressive.decoding.sampling import SamplingOptions, filter_logits
from autoregressive.models.causal_attention import make_causal_mask
from autoregressive.models.gpt import GPT
from scripts.benchmarks.sampling import agreement
from scripts.diagnosis.check import BROKEN, OK, Context, NotHere, Result, short
from scripts.diagnosis.models import fill_from_names, golden_gpt
from tokenizer.vq_model import VQModel, make_vq_config
from utils.images import to_uint8
from utils.precision import AUTOCAST_DTYPE, autocast, has_bfloat16, is_emulated

FORWARD, GREEDY = (1, 4, 9, 16), (4, 9, 16)  # tokens predicted at once in the files
SCALES = (1.0, 1.75)  # guidance, of which 1 is none
LOGITS = {"cpu": 1e-4}  # largest difference of float32 logits
LOGITS_ELSEWHERE = 1e-3
# relative errors (root mean square) that rounding may cause: three times what it does on a CPU
ROUNDING = {"bf16": 4e-2, "fp16": 5e-3}
FILTERS = ((5, 1.0), (0, 0.8), (20, 0.7), (0, 0.05))  # top-k, top-p


def open_golden(context: Context, name: str) -> Mapping[str, np.ndarray]:
    """Return the arrays of a golden file, read whole; a damaged file raises."""
    with np.load(context.golden / name, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def use_device(context: Context) -> torch.device:
    """Make the check's device the current one and return it; float32 is not rounded to TF32."""
    device = torch.device(context.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return device


def inputs(file: Mapping[str, np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return codes (B, T) and class ids (B,) of a golden file."""
    codes = torch.from_numpy(file["raster_tokens"]).long()  # (B, T)
    return codes.to(device), torch.from_numpy(file["cond"]).long().to(device)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return |found - expected| / |expected| in 2-norms."""
    return ((found - expected).norm() / expected.norm()).item()


@torch.no_grad()
def check_forward(context: Context) -> Result:
    """Compare logits and loss of the GPT, in float32, with the published code's."""
    device, logits_errors, loss_errors = use_device(context), [], []
    for n in FORWARD:
        file = open_golden(context, f"gpt_tiny_n{n}.npz")
        model = golden_gpt(file).to(device)
        codes, cond = inputs(file, device)
        expected = torch.from_numpy(file["train_logits"]).to(device)  # (B, T, V)
        logits_errors.append((model.logits(codes, cond) - expected).abs().max().item())
        loss_errors.append(abs(model(codes, cond)[0].item() - float(file["train_loss"])))
    # numpy's maximum is NaN if one of them is
    logits_error, loss_error = float(np.max(logits_errors)), float(np.max(loss_errors))
    figures = {"logits error": logits_error, "loss error": loss_error}
    errors = f"logits differ by at most {short(logits_error)}, the loss by {short(loss_error)}"
    detail = f"{errors} (n = {_list(FORWARD)})"
    allowed = LOGITS.get(device.type, LOGITS_ELSEWHERE)
    fine = logits_error <= allowed and loss_error <= allowed
    return Result(
        OK if fine else BROKEN, detail + ("" if fine else f"; allowed: {allowed}"), figures=figures
    )


def make_decoder(model: GPT, way: str, rows: int) -> Decoder:
    """Return an ``eager``, ``kernels`` or ``compiled`` decoder, which may consume ``model``."""
    if way == "kernels":
        if (reason := unavailable_reason(model.output.weight.dtype)) is not None:
            raise NotHere(f"no decoding kernels: {reason}")
        return CPUDecoder.consume(model, rows)
    return CompiledDecoder(model) if way == "compiled" else model


def check_greedy(context: Context, way: str, sizes: tuple[int, ...] = GREEDY) -> Result:
    """Compare greedily decoded tokens, with guidance and without, with the published code's.

    way: as for ``make_decoder``; ``compiled`` includes the CUDA graph on CUDA. sizes: values of n.
    """
    device, equal, total = use_device(context), 0, 0
    for n in sizes:
        file = open_golden(context, f"gpt_tiny_n{n}.npz")
        _, cond = inputs(file, device)
        cond = cond[:-1]  # (B,), the last is the null class
        for scale in SCALES:
            model = golden_gpt(file).to(device)
            uniforms = torch.zeros(len(cond), model.order.num_tokens, device=device)  # (B, T)
            decoder = make_decoder(model, way, 2 * len(cond) * n)
            options = SamplingOptions(cfg_scale=scale, temperature=0.0)
            tokens = Generator(decoder, model.order, options, len(cond))(cond, uniforms)  # (B, T)
            expected = file[f"greedy_raster_cfg{scale}"]
            equal += int((tokens.cpu().numpy() == expected).sum())
            total += expected.size
    detail = f"{equal} of {total} tokens are those of the published code (n = {_list(sizes)})"
    return Result(OK if equal == total else BROKEN, detail, figures={"equal tokens": equal / total})


def check_stored(context: Context, way: str, precision: str) -> Result:
    """Compare logits of decoding with weights and cache in ``precision`` with float32's."""
    device = use_device(context)
    file = open_golden(context, "gpt_tiny_n4.npz")
    model = place_for_decoding(golden_gpt(file), AUTOCAST_DTYPE[precision], device)
    found = agreement(make_decoder(model, way, 8), golden_gpt(file).to(device))
    error = found["logit error"]
    equal = f"{found['equal tokens']:.0%} of greedy tokens equal float32's"
    detail = f"logits are off by {short(error)} of their size, {equal}"
    return Result(OK if error <= ROUNDING[precision] else BROKEN, detail, figures=found)


def gradient(model: GPT, codes: Tensor, cond: Tensor, precision: str) -> tuple[float, Tensor]:
    """Return the loss, and the gradient of all parameters as one vector; fp16 has a loss scale."""
    scale = 2.0**12 if precision == "fp16" else 1.0
    model.zero_grad(set_to_none=True)
    with autocast(codes.device, precision):
        loss, _ = model(codes, cond)  # ()
    (loss * scale).backward()
    parts = [p.grad.flatten() / scale for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(parts)  # (P,)


def check_training(
    context: Context, precision: str, compiled: bool = False, attention: str = "dense"
) -> Result:
    """Compare a step's loss with the published code's, and its gradient with plain float32's.

    attention: as ``--attention`` of the trainer, which dense, flash and flex are.
    """
    device = use_device(context)
    file = open_golden(context, "gpt_tiny_n4.npz")
    codes, cond = inputs(file, device)
    model = golden_gpt(file).to(device)
    _, expected = gradient(model, codes, cond, "none")  # (P,)
    if attention == "flex":
        model.use_flex_attention(device)
    if attention == "flash":
        if device.type == "cuda" and not has_bfloat16(device):
            raise NotHere("flash attention needs a GPU of compute capability 8.0")
        model.block_mask = make_causal_mask(model.order.mask()).to(device)
    if compiled:
        for block in model.layers:
            block.compile()
    loss, found = gradient(model, codes, cond, precision)  # (), (P,)
    loss_error, error = abs(loss - float(file["train_loss"])), relative_error(found, expected)
    allowed = ROUNDING.get(precision, 1e-3)
    slow = "; emulated on this processor, so slow" if is_emulated(precision, device) else ""
    errors = f"loss differs by {short(loss_error)}, the gradient by {short(error)} of its size"
    fine = loss_error <= allowed and error <= 2 * allowed
    figures = {"loss error": loss_error, "gradient error": error}
    return Result(OK if fine else BROKEN, errors + slow, figures=figures)


@torch.no_grad()
def check_tokenizer(context: Context) -> Result:
    """Compare codes and images of the VQ-16 tokenizer, in float32, with the published code's."""
    device = use_device(context)
    file = open_golden(context, "vq16.npz")
    model = fill_from_names(VQModel(make_vq_config("VQ-16"))).eval().to(device)
    expected = torch.from_numpy(file["codes"]).long().to(device)  # (B, h, w)
    codes = model.encode(torch.from_numpy(file["image"]).to(device))  # (B, h, w)
    images = model.decode_code(expected).cpu()  # (B, 3, H, W)
    error = (images - torch.from_numpy(file["reconstruction"])).abs().max().item()
    equal = (codes == expected).float().mean().item()
    allowed = LOGITS.get(device.type, LOGITS_ELSEWHERE)
    detail = (
        f"{equal:.0%} of codes are equal, images differ by at most {short(error)} of a range of 2"
    )
    fine = equal == 1.0 and error <= allowed
    return Result(
        OK if fine else BROKEN, detail, figures={"equal codes": equal, "pixel error": error}
    )


def check_sampling(context: Context) -> Result:
    """Compare top-k and top-p filtering, and resized and rounded pixels, with published ones."""
    device, errors = use_device(context), []
    file = open_golden(context, "sampling.npz")
    logits = torch.from_numpy(file["logits"]).to(device)  # (B, V)
    for k, p in FILTERS:
        expected = torch.from_numpy(file[f"probs_k{k}_p{p}"])  # (B, V)
        found = filter_logits(logits, k, p).softmax(-1).cpu()  # (B, V)
        errors.append((found - expected).abs().max().item())
    worst = float(np.max(errors))
    images = torch.from_numpy(file["pixels_in"]).to(device)  # (B, 3, S, S)
    pixels = to_uint8(images, 64).cpu().numpy()  # (B, 64, 64, 3)
    difference = np.abs(pixels.astype(int) - file["pixels_uint8_64"].astype(int)).max()
    detail = (
        f"probabilities differ by at most {short(worst)}, resized pixels by {difference} of 255"
    )
    # other devices may round a value that lies on the border between two pixel values the other way
    fine = worst <= 1e-6 and difference <= (0 if device.type == "cpu" else 1)
    return Result(OK if fine else BROKEN, detail, figures={"probability error": worst})


def _list(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
