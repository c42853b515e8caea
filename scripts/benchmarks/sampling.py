"""Sampling against the published decoding: seconds a batch, images/s, what bounds them, in one run.

Published: the same model decoded with a mask over the padded length, all positions of the cache
read at every step, every step's probabilities kept, softmax and multinomial over the whole
vocabulary, guidance on logits; keys and values copied in every layer (repeat_interleave in
LlamaGen's gpt.py) and attention by torch's plain operators, to which the published loop confines
it (sdp_kernel in its generate.py, commit 5a50452). Fused: that without the copies and with
torch's fused attention. Published-compiled: the published arithmetic through torch.compile, block
by block, each step replayed as a CUDA graph; the published code compiles the whole step in
"reduce-overhead" mode, which makes nearly the same kernels but takes minutes per size. Ours:
Generator, eager by torch's operators, compiled by our kernels on a CPU, by torch.compile and one
CUDA graph on CUDA. Random weights, guidance on, no image decoding.
For all of ours but eager float32 also the share of greedy tokens equal to those of eager float32
after the same tokens, and the difference of the logits. "compiled" is what the samplers do by
default, so where a measurement finds torch's operators faster it is eager. A device that emulates
bfloat16 is measured in it by our kernels alone, which only store it there, against published
float32. Each figure is from a process of its own, all under the allocator settings of
scripts/launch.sh. Bytes are those that must be read (weights, once a call, and the keys and
values there are), FLOPs those of the products; the ceilings beside them are a long sum and a
matrix product, measured in the same process.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from autoregressive.decoding.decoder import (
    Decoder,
    Way,
    choose_way,
    make_decoder,
    place_for_decoding,
    possible_ways,
)
from autoregressive.decoding.generate import Generator
from autoregressive.decoding.sampling import SamplingOptions
from autoregressive.models.config import GPT_models, GPTConfig
from autoregressive.models.gpt import GPT
from autoregressive.sample.pipeline import quantize
from scripts.benchmarks.common import (
    ALLOCATOR,
    add_output_options,
    fastest,
    figures_of,
    read_bandwidth,
    seconds,
    write_figures,
    write_results,
)
from scripts.benchmarks.published_sampling import make_published
from utils.distributed import init_distributed
from utils.options import make_parser, positive_int, run_main
from utils.performance import peak_flops, peak_memory
from utils.precision import has_bfloat16, is_emulated

CFG_SCALE = 1.5
PUBLISHED = ("published", "fused", "published-compiled")  # ways that are not ours


def random_model(gpt_model: str, n: int, device: torch.device | str = "cpu") -> GPT:
    """The same weights at every call, float32, made on ``device``, where a GPU is quicker."""
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT(GPTConfig(**GPT_models[gpt_model], ar_token_num=n))
    model.init_weights()
    nn.init.normal_(model.output.weight, std=0.02)
    return model.to(device).eval()


@dataclass(frozen=True)
class Case:
    """What is timed: ``batch`` images at a time by one way, n tokens at once, in ``precision``."""

    gpt_model: str
    n: int
    batch: int
    precision: str
    way: str
    repeats: int


def way_of(model: GPT, case: Case, device: torch.device) -> Way:
    """How ``case.way`` decodes: ``compiled`` is the samplers' default with this precision."""
    if case.way != "compiled":
        return Way(case.precision, "eager")
    ways, _ = possible_ways(
        device, case.precision, True if device.type == "cuda" else None, quantized=False
    )
    return choose_way(model, ways, case.batch, guided=True)[0]


@torch.inference_mode()
def step_logits(decoder: Decoder, tokens: Tensor) -> Tensor:
    """Guided logits (T, V) float32 of class 0, each step after region-ordered ``tokens`` (T,)."""
    cache = decoder.new_cache(2)
    labels = torch.tensor([0, decoder.config.num_classes], device=decoder.device)  # (2,)
    both = tokens.expand(2, -1)  # (2, T)
    steps = [
        decoder.decode_step(both, labels, i, i + 1, cache, CFG_SCALE)[0]
        for i in range(len(decoder.order.steps))
    ]
    return torch.cat(steps).float()  # (T, V)


def agreement(decoder: Decoder, reference: GPT) -> dict[str, float]:
    """Share of greedy tokens equal to ``reference`` after equal tokens; distance of logits."""
    order = reference.order
    cond = torch.zeros(1, dtype=torch.int64, device=reference.device)
    uniforms = torch.zeros(1, order.num_tokens, device=cond.device)
    greedy = SamplingOptions(cfg_scale=CFG_SCALE, temperature=0.0)
    tokens = Generator(reference, order, greedy, 1)(cond, uniforms)[0, order.permutation]  # (T,)
    expected, logits = step_logits(reference, tokens), step_logits(decoder, tokens)  # (T, V)
    return {
        "equal tokens": (logits.argmax(-1) == tokens).float().mean().item(),
        "logit error": ((logits - expected).square().mean() / expected.square().mean())
        .sqrt()
        .item(),
    }


def work_of(model: GPT, batch: int, way: str) -> tuple[float, float]:
    """Bytes to read and FLOPs of products of a guided batch; int8 and fp8 weights are a byte."""
    config, order = model.config, model.order
    size = model.tok_embeddings.weight.element_size()  # embeddings keep the weights' type
    rows = 2 * batch
    block = config.dim * (config.n_head + 2 * config.kv_heads) * config.head_dim
    block += config.dim**2 + 3 * config.dim * config.ffn_dim
    weights, head = config.n_layer * block, config.dim * config.vocab_size
    bytes_read, flops = 0, 0
    for start, stop, _, _ in order.steps:
        cached = config.n_layer * 2 * rows * config.kv_heads * stop * config.head_dim
        bytes_read += (1 if way in ("int8", "fp8") else size) * (weights + head) + size * cached
        attention = 4 * config.n_layer * rows * (stop - start) * stop * config.dim
        flops += 2 * (stop - start) * (rows * weights + batch * head) + attention
    return bytes_read, flops


def time_batches(case: Case, device: torch.device) -> tuple[dict[str, float | str], Decoder | None]:
    """Time one way, the best of ``case.repeats`` batches after a warm-up: figures, our decoder.

    With no repeats the first batch is what counts, for ways that compile nothing.
    """
    batch = case.batch
    model = random_model(case.gpt_model, case.n, device)
    ours = case.way not in PUBLISHED
    way, decoder = way_of(model, case, device), None
    if ours:
        model = place_for_decoding(model, way.dtype, device)
    else:
        model = model.cast_weights(way.dtype).to(device)
    if case.way in ("int8", "fp8"):
        quantize(model, case.way)
    if ours:
        decoder = make_decoder(model, way, 2 * batch * case.n)
        generator = Generator(decoder, model.order, SamplingOptions(cfg_scale=CFG_SCALE), batch)
        uniforms = torch.rand(batch, model.order.num_tokens, device=device)  # (B, T)
        sample = partial(generator, randomness=uniforms)
    else:
        sample = make_published(model, case.way, CFG_SCALE)
    cond = torch.arange(batch, device=device)
    first = seconds(lambda: sample(cond).cpu())
    best = fastest(lambda: sample(cond).cpu(), case.repeats) if case.repeats else first
    bytes_read, flops = work_of(model, batch, case.way)
    figures = {"decoder": str(way) if ours else case.way, "seconds": best, "first batch": first}
    figures |= {"images/s": batch / best, "calls": len(model.order.steps)}
    figures |= {
        "GB/s": bytes_read / best / 1e9,
        "TFLOP/s": flops / best / 1e12,
        "peak GiB": peak_memory(device) / 2**30,
    }
    computed_in = "none" if is_emulated(way.precision, device) else way.precision
    figures |= {
        "ceiling GB/s": read_bandwidth(device) / 1e9,
        "ceiling TFLOP/s": peak_flops(device, computed_in)[0] / 1e12,
    }
    return figures, decoder


def measure(case: Case) -> dict[str, float | str]:
    """Time one way and compare its logits with those of eager float32."""
    device = init_distributed().device
    figures, decoder = time_batches(case, device)
    if decoder is not None and (case.precision, case.way) != ("none", "eager"):
        figures |= agreement(decoder, random_model(case.gpt_model, case.n).to(device))
    return figures


def main() -> None:
    """Measure each way in a process of its own, print, write JSON."""
    parser = make_parser(
        __doc__,
        "python3 scripts/benchmarks/sampling.py --ar-token-num 4 16 --batch 1 8 --output s.json",
    )
    parser.add_argument("--gpt-model", choices=list(GPT_models), default="GPT-B", help="size")
    parser.add_argument(
        "--ar-token-num", type=positive_int, nargs="+", default=[4, 16, 1], help="tokens at once, n"
    )
    parser.add_argument(
        "--batch", type=positive_int, nargs="+", default=[1, 8], help="images at once"
    )
    parser.add_argument(
        "--precision",
        choices=["none", "bf16"],
        nargs="+",
        default=["none", "bf16"],
        help="of weights",
    )
    parser.add_argument(
        "--repeats", type=positive_int, default=2, help="batches timed, of which the fastest counts"
    )
    ways = ["published", "eager", "compiled"]
    parser.add_argument(
        "--ways",
        choices=[*ways, "fused", "published-compiled", "int8", "fp8"],
        nargs="+",
        default=ways,
        help="what to measure; fused is published but for its attention, int8 and fp8 need torchao",
    )
    add_output_options(parser, "sampling.json")
    args = parser.parse_args()
    if args.way:
        (n,), (batch,), (precision,) = args.ar_token_num, args.batch, args.precision
        write_figures(
            args.work, measure(Case(args.gpt_model, n, batch, precision, args.way, args.repeats))
        )
        return
    results = []
    published: dict[tuple[int, int, str], float] = {}  # seconds by n, batch, precision
    emulated = not has_bfloat16(init_distributed().device)
    for n, batch, precision in product(args.ar_token_num, args.batch, args.precision):
        for way in args.ways:
            if emulated and precision == "bf16" and way != "compiled":
                print(
                    f"n {n:2}  batch {batch:2}  {precision:5} {way:9} left out: this "
                    "device emulates bfloat16"
                )
                continue
            options = dict(
                gpt_model=args.gpt_model, ar_token_num=n, batch=batch, precision=precision
            )
            with tempfile.TemporaryDirectory(prefix="par-sampling-") as work:
                figures = figures_of(
                    __file__, ALLOCATOR, work, **options, way=way, repeats=args.repeats
                )
            if way == "published":
                published[n, batch, precision] = figures["seconds"]
            base = published.get((n, batch, precision)) or published.get((n, batch, "none"))
            if base:
                figures["over published"] = base / figures["seconds"]
            results.append({"n": n, "batch": batch, "precision": precision, "way": way, **figures})
            print(describe(results[-1]), flush=True)
    write_results(args, results)


def describe(result: dict[str, object]) -> str:
    """One line of figures; the gain is over the published way's seconds, in float32 if need be."""
    gain = f"{result['over published']:5.2f}x" if "over published" in result else ""
    agreed = ""
    if "equal tokens" in result:
        equal, error = result["equal tokens"], result["logit error"]
        agreed = f"  {equal:.1%} of greedy tokens equal, logits off by {error:.1e}"
    line = (
        "n {n:2}  batch {batch:2}  {precision:5} {way:9} {seconds:7.2f} s {images/s:7.3f} "
        f"images/s {gain}  {{calls}} calls  {{GB/s:6.1f}} of {{ceiling GB/s:.0f}} GB/s  "
        "{TFLOP/s:.3f} of {ceiling TFLOP/s:.2f} TFLOP/s  {peak GiB:.2f} GiB  by {decoder}"
    )
    return line.format(**result) + agreed


if __name__ == "__main__":
    run_main(main)
