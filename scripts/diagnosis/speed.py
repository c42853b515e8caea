"""How fast the machine is: ceilings, a sampled batch, a training step; beside the published way.

Sampling and training are timed by the functions of scripts/benchmarks. MBU is the share of the
memory's speed at which weights and cache are read, MFU the share of the arithmetic ceiling; the
larger of both is what counts.
"""

from __future__ import annotations

import gc
from argparse import Namespace
from dataclasses import replace

import torch

from autoregressive.decoding.decoder import make_decoder, place_for_decoding
from scripts.benchmarks import sampling, training
from scripts.benchmarks.common import read_bandwidth
from scripts.diagnosis.check import BROKEN, OK, SLOW, Context, NotHere, Result, short
from utils.performance import measured_flops, peak_flops
from utils.precision import AUTOCAST_DTYPE, has_bfloat16, resolve_precision

# smallest share of the ceiling that is not slow; on a GPU, small models wait for kernels to be
# launched more than for memory
SAMPLING_SHARE = {"cpu": 0.30, "cuda": 0.05, "mps": 0.05}
TRAINING_SHARE = {"cpu": 0.25, "cuda": 0.20, "mps": 0.10}
PRODUCT_SHARE = 0.5  # of the data sheet's figure
TOLERANCE = 1.1  # figures vary by as much from run to run
NAMES = {"bf16": "bfloat16", "fp16": "float16", "none": "float32"}


def batch_size(context: Context) -> int:
    """Return the images per batch: ``--batch``, else 1 on a CPU and 32 on a GPU."""
    return context.options.batch or (1 if context.device == "cpu" else 32)


def check_bandwidth(context: Context) -> Result:
    """Measure how fast memory is read: a sum over 512 MiB."""
    figure = read_bandwidth(torch.device(context.device))
    return Result(
        OK, f"{figure / 1e9:.1f} GB/s (a sum over 512 MiB)", figures={"GB/s": figure / 1e9}
    )


def check_products(context: Context, precision: str) -> Result:
    """Measure how fast matrices are multiplied; beside the data sheet for GPUs that it lists."""
    device = torch.device(context.device)
    if precision == "bf16" and not has_bfloat16(device):
        raise NotHere("it would be computed only by emulation, or slower than float32")
    dtype = AUTOCAST_DTYPE[precision] or torch.float32
    measured = measured_flops(device, dtype, 8192 if device.type == "cuda" else None)
    figures = {"TFLOP/s": measured / 1e12}
    detail = f"{measured / 1e12:.3g} TFLOP/s (a matrix product)"
    ceiling, source = peak_flops(device, precision)
    if source != "data sheet":
        return Result(OK, detail, figures=figures)
    share = measured / ceiling
    detail += f", {share:.0%} of the data sheet's {ceiling / 1e12:.0f}"
    figures["share of the data sheet"] = share
    return Result(OK if share >= PRODUCT_SHARE else SLOW, detail, figures=figures)


def judge(
    detail: str,
    figures: dict[str, float],
    share: float,
    enough: float,
    others: dict[str, dict[str, float]],
) -> Result:
    """Return ``slow`` if ``share`` is below ``enough`` or another way was faster, else ``ok``.

    figures: ``seconds`` and more of this way; others: the figures of other ways, by name in words.
    """
    reasons = [f"below {enough:.0%} of a ceiling"] if share < enough else []
    for name, other in others.items():
        if "seconds" not in other:  # it did not end
            continue
        ratio = other["seconds"] / figures["seconds"]
        detail += f", {ratio:.2f}x as fast as {name}"
        figures[f"speed relative to {name}"] = ratio
        if ratio * TOLERANCE < 1.0:
            reasons.append(f"slower than {name}")
    if reasons:
        detail += f": {' and '.join(reasons)}"
    return Result(SLOW if reasons else OK, detail, figures=figures)


def sampling_case(context: Context, way: str) -> sampling.Case:
    """Return what scripts/benchmarks/sampling.py is to time for one way of sampling."""
    options, device = context.options, torch.device(context.device)
    precision = "auto" if way == "compiled" else resolve_precision("auto", device)[0]
    repeats = 1 if options.quick else 2
    batch = batch_size(context)
    return sampling.Case(options.gpt_model, options.ar_token_num, batch, precision, way, repeats)


def check_sampling(context: Context, way: str, others: dict[str, str]) -> Result:
    """Time one batch sampled with guidance, without image decoding; compare with earlier ways.

    way: of the benchmark, ``compiled`` is the samplers' default. others: ways in words -> names of
    their checks.
    """
    device = torch.device(context.device)
    timed, _ = sampling.time_batches(sampling_case(context, way), device)
    figures = {k: v for k, v in timed.items() if isinstance(v, (int, float))}
    figures["MBU"], figures["MFU"] = (timed[k] / timed[f"ceiling {k}"] for k in ("GB/s", "TFLOP/s"))
    batch, precision = batch_size(context), resolve_precision("auto", device)[0]
    by = f"by {timed['decoder']}" if way == "compiled" else f"in {NAMES[precision]}"
    detail = (
        f"{by}, {timed['seconds']:.3g} s per batch of {batch} ({timed['images/s']:.3g} images/s), "
        f"{timed['calls']} calls, MBU {figures['MBU']:.0%} of {timed['ceiling GB/s']:.3g} GB/s, "
        f"MFU {figures['MFU']:.0%} of {timed['ceiling TFLOP/s']:.3g} TFLOP/s"
    )
    if not others:  # a way to compare with
        return Result(OK, detail, figures=figures)
    earlier = {words: context.earlier.get(check, {}) for words, check in others.items()}
    share, enough = max(figures["MBU"], figures["MFU"]), SAMPLING_SHARE[device.type]
    detail += f" (slow if both are below {enough:.0%})"
    return judge(detail, figures, share, enough, earlier)


def check_agreement(context: Context) -> Result:
    """Compare the samplers' default decoder with float32 by torch's operators, at full size."""
    device = torch.device(context.device)
    case = replace(sampling_case(context, "compiled"), batch=1)
    model = sampling.random_model(case.gpt_model, case.n)
    way = sampling.way_of(model, case, device)
    decoder = make_decoder(place_for_decoding(model, way.dtype, device), way, 2 * case.n)
    reference = sampling.random_model(case.gpt_model, case.n).to(device)
    found = sampling.agreement(decoder, reference)
    error, equal = found["logit error"], found["equal tokens"]
    tokens = f"{equal:.1%} of greedy tokens equal float32's"
    detail = f"{way}: logits are off by {short(error)} of their size, {tokens}"
    allowed = 1e-4 if way.dtype == torch.float32 else 4e-2
    return Result(OK if error <= allowed else BROKEN, detail, figures=found)


def check_training(context: Context, way: str, others: dict[str, str]) -> Result:
    """Time a training step on codes of 24x24 tokens, and compare it with earlier ways.

    way: a way of scripts/benchmarks/training.py. others: names of ways in words -> names of checks.
    """
    options, device = context.options, torch.device(context.device)
    precision, _ = resolve_precision("auto", device)
    batch, steps = batch_size(context), 2 if options.quick else 3
    training.write_codes(context.work, batch * (steps + 5))
    shape = dict(
        gpt_model=options.gpt_model, ar_token_num=options.ar_token_num, batch=batch, steps=steps
    )
    gc.collect()
    timed = training.measure(Namespace(**shape, way=way, precision=precision), context.work)
    figures = {"seconds": timed["seconds"], "tokens/s": timed["tokens/s"], "MFU": timed["mfu"]}
    figures |= {"ceiling TFLOP/s": timed["peak TFLOP/s"], "peak GiB": timed["peak GiB"]}
    detail = (
        f"{timed['seconds']:.3g} s per step of {batch} ({timed['tokens/s']:.4g} tokens/s) in "
        f"{NAMES[precision]}, MFU {timed['mfu']:.0%} of {timed['peak TFLOP/s']:.3g} TFLOP/s, peak "
        f"{timed['peak GiB']:.2f} GiB"
    )
    if not timed["last loss"] <= timed["first loss"] + 0.1:
        return Result(
            BROKEN,
            f"the loss went from {timed['first loss']:.3f} to {timed['last loss']:.3f}",
            figures=figures,
        )
    if not others:
        return Result(OK, detail, figures=figures)
    earlier = {words: context.earlier.get(check, {}) for words, check in others.items()}
    enough = TRAINING_SHARE[device.type]
    detail += f" (slow below {enough:.0%})"
    return judge(detail, figures, timed["mfu"], enough, earlier)
