"""A GPT training step against the published one: seconds, tokens/s, FLOP utilisation and peak
memory in one run.

Published: mask repeated over the batch, whole logits in float32, RMSNorm written out, attention in
autocast's type, one .npy of codes and one of labels an image through a DataLoader. Ours:
train_c2i.py's step, eager and compiled, on CUDA also with FlexAttention, and with the paper's
attention dropout, which excludes FlexAttention. Dropout is on; attention's is on only in ways that
name it, as the published code has none. Each way runs in a process of its own, all of them under
the allocator settings of scripts/launch.sh; "default malloc" is the published way without.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from autoregressive.models import gpt
from autoregressive.models.causal_attention import make_causal_mask
from autoregressive.models.config import GPT_models, GPTConfig
from autoregressive.models.gpt import GPT
from scripts.benchmarks.common import (
    KEPT_MEMORY,
    PublishedDataset,
    add_output_options,
    add_precision_option,
    figures_of,
    precisions,
    time_steps,
    use_published_norm,
    warm_up_steps,
    write_figures,
    write_published_codes,
    write_results,
)
from utils.distributed import init_distributed
from utils.options import make_parser, positive_int, run_main
from utils.performance import peak_flops, peak_memory
from utils.precision import autocast
from utils.training.run import prefetch
from utils.training.state import Guard, TrainingState, make_adamw

TOKENS = 576
CROPS = 10


def published_batches(work: Path, batch: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Codes (B, T) and labels (B,) of ``steps`` batches."""
    loader = DataLoader(
        PublishedDataset(work, batch * steps),
        batch,
        num_workers=2,
        pin_memory=torch.cuda.is_available(),
    )
    for x, y in loader:
        yield x, y.view(-1)


def our_batches(work: Path, batch: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same from a memory map, gathered on a thread."""
    codes = np.load(work / "codes.npy", mmap_mode="r")  # (N, crops, T)
    labels = np.load(work / "labels.npy")  # (N,)

    def make(step: int) -> tuple[Tensor, Tensor]:
        images = np.arange(step * batch, (step + 1) * batch)
        x = torch.from_numpy(codes[images, images % CROPS].astype(np.int64))  # (B, T)
        y = torch.from_numpy(labels[images])  # (B,)
        return (x.pin_memory(), y.pin_memory()) if torch.cuda.is_available() else (x, y)

    for _, pair in prefetch(make, range(steps)):
        yield pair


def published_attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, p: float, _: float) -> Tensor:
    """The fused attention of torch, in autocast's type."""
    return F.scaled_dot_product_attention(q, k, v, mask, p)  # (B, H, T, hd)


def published_step(model: GPT, precision: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The published arithmetic on our parameters."""
    gpt.attend, gpt.Dropout.forward = published_attend, nn.Dropout.forward
    use_published_norm(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )

    def step(x: Tensor, y: Tensor) -> Tensor:
        with autocast(x.device, precision):
            targets = x[:, model.permutation]  # (B, T)
            mask = model.mask.repeat(len(x), 1, 1)[:, None]  # (B, 1, T, T)
            hidden = model.trunk(model.embed_slots(targets, y, 0, TOKENS), 0, mask)  # (B, T, D)
            logits = model.output(hidden).float()  # (B, T, V)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def our_step(model: GPT, precision: str, way: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The step of train_c2i.py on one process; ``way``: words of its options, see ``measure``."""
    device = model.mask.device
    model.recompute_activations(next((w for w in ("selective", "full") if w in way), "none"))
    if "flex" in way:
        model.use_flex_attention(device)
    if "flash" in way:
        model.block_mask = make_causal_mask(model.order.mask()).to(device)
    if "compiled" in way:
        for block in model.layers:
            block.compile()
    optimizer = make_adamw(model, 1e-4, 0.05, (0.9, 0.95))
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    state = TrainingState(model, optimizer, scaler, None, Guard(device, 1.0, 20))

    def step(x: Tensor, y: Tensor) -> Tensor:
        with autocast(device, precision):
            loss, _ = model(x, y)
        loss.backward()
        state.update(0, loss.detach(), state.gradient_norm(), 1.0)
        return loss.detach()

    return step


def measure(args: Namespace, work: Path) -> dict[str, float]:
    """Time ``args.way`` over ``args.steps`` steps after a warm-up, on codes in ``work``.

    way: ``published``, or ``ours`` with any of the words ``compiled``, ``flash`` or ``flex``,
    ``attention dropout``, and ``selective`` or ``full``, which activations are computed again.
    """
    device = init_distributed().device
    torch.manual_seed(0)
    dropout = 0.1 if "attention dropout" in args.way else 0.0
    config = GPTConfig(
        **GPT_models[args.gpt_model], ar_token_num=args.ar_token_num, attn_dropout_p=dropout
    )
    with torch.device(device):  # a GPU makes large models sooner
        model = GPT(config)
    model.init_weights()
    model.to(device).train()
    published = args.way.startswith("published")
    step = (
        published_step(model, args.precision)
        if published
        else our_step(model, args.precision, args.way)
    )
    batches = (published_batches if published else our_batches)(
        work, args.batch, warm_up_steps(device) + args.steps
    )
    gc.collect()
    figures = time_steps(step, batches, device)
    per_second = args.batch / figures["seconds"]
    peak, _ = peak_flops(device, args.precision)
    figures |= {"tokens/s": TOKENS * per_second, "mfu": model.flops_per_image() * per_second / peak}
    return figures | {"peak TFLOP/s": peak / 1e12, "peak GiB": peak_memory(device) / 2**30}


def write_codes(work: Path, count: int) -> None:
    """Random codes in both layouts."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16384, (count, CROPS, TOKENS))
    labels = rng.integers(0, 1000, count)
    np.save(work / "codes.npy", codes.astype(np.uint16))
    np.save(work / "labels.npy", labels)
    write_published_codes(work, codes, labels)


def main() -> None:
    """Measure each way in a process of its own, print, write JSON."""
    parser = make_parser(
        __doc__, "python3 scripts/benchmarks/training.py --gpt-model GPT-B --batch 8"
    )
    parser.add_argument("--gpt-model", choices=list(GPT_models), default="GPT-B", help="size")
    parser.add_argument(
        "--ar-token-num", type=positive_int, default=4, help="tokens predicted at once, n"
    )
    parser.add_argument("--batch", type=positive_int, default=8, help="images a step")
    parser.add_argument(
        "--steps", type=positive_int, default=3, help="steps timed, of which the fastest counts"
    )
    add_precision_option(parser)
    add_output_options(parser, "training.json")
    args = parser.parse_args()
    if args.way:
        args.precision = args.precision[0]
        write_figures(args.work, measure(args, Path(args.work)))
        return
    args.precision = precisions(args)
    ways = ["published, default malloc", "published", "ours", "ours, compiled"]
    if torch.cuda.is_available():
        ways += ["ours, compiled, flex", "ours, compiled, attention dropout"]
        ways += ["ours, compiled, flash, attention dropout"]
    results: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="par-training-") as work:
        write_codes(Path(work), args.batch * (args.steps + 5))
        for precision in args.precision:
            for way in ways:
                options = dict(
                    gpt_model=args.gpt_model, ar_token_num=args.ar_token_num, batch=args.batch
                )
                options |= dict(steps=args.steps, precision=precision, way=way)
                figures = figures_of(
                    __file__, {} if "default" in way else KEPT_MEMORY, work, **options
                )
                results.setdefault(precision, {})[way] = figures
                base = results[precision].get("published", figures)
                figures["over published"] = base["seconds"] / figures["seconds"]
                print(
                    f"{precision:5} {way:27} {figures['seconds']:8.3f} s/step "
                    f"{figures['tokens/s']:10.1f} tokens/s {figures['over published']:5.2f}x  "
                    f"{figures['mfu']:6.1%} of {figures['peak TFLOP/s']:.3g} TFLOP/s "
                    f"{figures['peak GiB']:6.2f} GiB  "
                    f"loss {figures['first loss']:.4f} -> {figures['last loss']:.4f}",
                    flush=True,
                )
    write_results(args, results)


if __name__ == "__main__":
    run_main(main)
