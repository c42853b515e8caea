"""A tokenizer's training step against the straightforward published one: seconds, images/s and peak
memory in one run.

Published: the whole distance matrix |z|^2 + |e|^2 - 2 z.e by einsum, the discriminator in float32
at every step, before --disc-start too, its parameters' gradients computed in the generator's
backward as well, plain Adam, NCHW. Ours: train_vq.py's step before and after --disc-start. No
LPIPS, which is the same in both. Each way runs in a process of its own, all of them under the
allocator settings of scripts/launch.sh.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.benchmarks.common import (
    KEPT_MEMORY,
    add_output_options,
    add_precision_option,
    figures_of,
    precisions,
    time_steps,
    warm_up_steps,
    write_figures,
    write_results,
)
from tokenizer.discriminator import make_discriminator
from tokenizer.layout import place_tokenizer
from tokenizer.options import DISCRIMINATORS
from tokenizer.vq_loss import Adversary, ReconstructionLoss, discriminator_hinge, generator_hinge
from tokenizer.vq_model import VectorQuantizer, VQ_models, VQModel, make_vq_config
from utils.distributed import World, init_distributed
from utils.options import make_parser, positive_int, run_main
from utils.performance import peak_memory
from utils.precision import autocast
from utils.training.state import Guard, TrainingState, make_adamw

WAYS = ("published", "ours, before disc-start", "ours, from disc-start")
DISC_WEIGHT = 0.5


def published_search(self: VectorQuantizer, z: Tensor) -> Tensor:
    """Nearest entries of (N, C) from the (N, V) matrix of squared distances: (N,)."""
    z, codebook = self._normalize(z), self.codebook()  # (N, C), (V, C)
    distances = (
        z.square().sum(1, keepdim=True)
        + codebook.square().sum(1)
        - 2 * torch.einsum("nc,vc->nv", z, codebook)
    )
    return distances.argmin(1)


def published_step(args: Namespace, model: VQModel, world: World) -> Callable[[Tensor], Tensor]:
    """The published arithmetic on our parameters."""
    VectorQuantizer.search = published_search
    discriminator = make_discriminator(args.disc_type, args.image_size).to(world.device)
    optimizers = [
        torch.optim.Adam(m.parameters(), lr=1e-4, betas=(0.9, 0.95)) for m in (model, discriminator)
    ]

    def update(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

    def step(images: Tensor) -> Tensor:
        optimizers[0].zero_grad()
        with autocast(world.device, args.precision):
            made, quantizer, codes = model(images)  # (B, 3, S, S), -, (B, h, w)
        made = made.float().contiguous()  # (B, 3, S, S)
        supervised = F.mse_loss(made, images) + sum(quantizer)
        (supervised + DISC_WEIGHT * generator_hinge(discriminator(made))).backward()
        update(model, optimizers[0])
        optimizers[1].zero_grad()
        (
            DISC_WEIGHT * discriminator_hinge(discriminator(images), discriminator(made.detach()))
        ).backward()
        update(discriminator, optimizers[1])
        model.quantize.record_usage(codes)
        return supervised.detach()

    return step


def our_step(
    args: Namespace, model: VQModel, world: World, gan: bool
) -> Callable[[Tensor], Tensor]:
    """The step of train_vq.py on one process."""
    options = dict(
        perceptual_weight=0.0,
        reconstruction_loss="l2",
        reconstruction_weight=1.0,
        codebook_weight=1.0,
    )
    options |= dict(
        disc_type=args.disc_type,
        disc_weight=DISC_WEIGHT,
        disc_loss="hinge",
        gen_loss="hinge",
        disc_start=0,
    )
    options |= dict(
        disc_adaptive_weight=False,
        image_size=args.image_size,
        mixed_precision=args.precision,
        lr=1e-4,
    )
    options = Namespace(**options, weight_decay=0.05, beta1=0.9, beta2=0.95, max_skipped_steps=20)
    memory_format = torch.channels_last if world.device.type == "cuda" else torch.contiguous_format
    place_tokenizer(model, world.device, memory_format)
    supervised = ReconstructionLoss(options, world.device, memory_format)
    adversary = Adversary(options, world, memory_format)
    scaler = torch.amp.GradScaler(world.device.type, enabled=False)
    state = TrainingState(
        model,
        make_adamw(model, 1e-4, 0.05, (0.9, 0.95)),
        scaler,
        None,
        Guard(world.device, 1.0, 20),
    )

    def step(images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=memory_format)  # (B, 3, S, S)
        with autocast(world.device, args.precision):
            made, quantizer, codes = model(images)  # (B, 3, S, S), -, (B, h, w)
            made = made.float()  # (B, 3, S, S)
            total, decoded, terms = supervised(images, made, quantizer)
            if gan:
                adversarial, weight = adversary.generator_loss(
                    made, decoded, model.decoder.last_layer, 1.0
                )
                total = total + weight * adversarial
        total.backward()
        if gan:
            with autocast(world.device, args.precision):
                told, _, _ = adversary.discriminator_loss(images, made)
            told.backward()
        state.update(0, terms["loss"], state.gradient_norm(), 1.0)
        if gan:
            adversary.state.update(0, told.detach(), adversary.state.gradient_norm(), 1.0)
        model.quantize.record_usage(codes)
        return terms["loss"]

    return step


def measure(args: Namespace) -> dict[str, float]:
    """Time ``args.way`` over ``args.steps`` steps after a warm-up."""
    world = init_distributed()
    torch.manual_seed(0)
    model = VQModel(make_vq_config(args.vq_model))
    model.init_weights()
    model.to(world.device).train()
    published = args.way == "published"
    step = (
        published_step(args, model, world)
        if published
        else our_step(args, model, world, "from" in args.way)
    )
    shape = (args.batch, 3, args.image_size, args.image_size)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))  # (B, 3, S, S)
    images = noise.to(world.device) * 2 - 1  # (B, 3, S, S)
    figures = time_steps(
        step, [(images,)] * (warm_up_steps(world.device) + args.steps), world.device
    )
    return figures | {
        "images/s": args.batch / figures["seconds"],
        "peak GiB": peak_memory(world.device) / 2**30,
    }


def main() -> None:
    """Measure each way in a process of its own, print, write JSON."""
    parser = make_parser(
        __doc__,
        "python3 scripts/benchmarks/tokenizer.py --vq-model VQ-16 --image-size 256 --batch 2",
    )
    parser.add_argument("--vq-model", choices=list(VQ_models), default="VQ-16", help="size")
    parser.add_argument(
        "--image-size", type=positive_int, default=256, help="side of the images, pixels"
    )
    parser.add_argument("--batch", type=positive_int, default=2, help="images a step")
    parser.add_argument(
        "--disc-type", choices=DISCRIMINATORS, default="patchgan", help="discriminator"
    )
    parser.add_argument(
        "--steps", type=positive_int, default=3, help="steps timed, of which the fastest counts"
    )
    add_precision_option(parser)
    add_output_options(parser, "tokenizer.json")
    args = parser.parse_args()
    if args.way:
        args.precision = args.precision[0]
        write_figures(args.work, measure(args))
        return
    args.precision = precisions(args)
    results: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="par-tokenizer-") as work:
        for precision in args.precision:
            for way in WAYS:
                options = dict(
                    vq_model=args.vq_model,
                    image_size=args.image_size,
                    batch=args.batch,
                    steps=args.steps,
                )
                options |= dict(disc_type=args.disc_type, precision=precision, way=way)
                figures = figures_of(__file__, KEPT_MEMORY, work, **options)
                results.setdefault(precision, {})[way] = figures
                base = results[precision]["published"]
                figures["over published"] = base["seconds"] / figures["seconds"]
                print(
                    f"{precision:5} {way:24} {figures['seconds']:8.3f} s/step "
                    f"{figures['images/s']:8.2f} images/s {figures['over published']:5.2f}x "
                    f"{figures['peak GiB']:6.2f} GiB  "
                    f"loss {figures['first loss']:.4f} -> {figures['last loss']:.4f}",
                    flush=True,
                )
    write_results(args, results)


if __name__ == "__main__":
    run_main(main)
