"""Images -> VQ tokenizer: reconstruction, perceptual (LPIPS), codebook and GAN losses.

Rerunning the same command resumes from the newest checkpoint, at the very next step. SIGTERM and SIGUSR1 save and exit
within a step.
"""

from __future__ import annotations

import json
import logging
import sys
from argparse import BooleanOptionalAction, Namespace
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn
from torch.utils.data import DataLoader

from dataset.epochs import EpochOrder
from dataset.imagenet import ImageFiles, RandomCrop, list_images, to_model_range
from tokenizer.discriminator import DISCRIMINATORS
from tokenizer.vq_loss import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, PIXEL_LOSSES, Adversary, Supervised
from tokenizer.vq_model import VQ_models, VQModel, load_vq, make_vq_config
from utils.checkpoint import resolve
from utils.distributed import World, init_distributed
from utils.logger import ScalarLog, create_logger, progress
from utils.options import add_retired, amount, count, fraction, make_parser, positive_int, run, write_options
from utils.parallel import delay_sync, replicate
from utils.performance import Window, peak_memory, usable_cores
from utils.precision import autocast, log_level, resolve_precision
from utils.run_folder import RunFolder
from utils.sharded_checkpoint import read_sharded
from utils.stop_signal import StopSignal
from utils.training import (
    Ema,
    Guard,
    TrainingState,
    add_optimizer_options,
    add_output_options,
    add_precision_option,
    learning_rate,
    make_adamw,
    seed_step,
    split_batch,
)

KMEANS_ITERATIONS = 10
LATENTS_PER_ENTRY = 8  # of the first images, to place each entry of a new codebook
LOG_LINE = (
    "loss {loss:.4f}, reconstruction {reconstruction:.4f}, {terms}codebook {codebook:.4f}, "
    "codebook used {codebook_used:.1%}, perplexity {perplexity:.4g}, grad norm {grad_norm:.3f}, lr {lr:.2e}, "
    "{images/s:.4g} images/s, peak {memory_gib:.2f} GiB, {skipped} skipped"
)
GAN_LINE = (
    "adversarial {adversarial:.4f} x {adversarial_weight:.3g}, discriminator {discriminator:.4f}, logits "
    "{logits_real:.3f} real {logits_fake:.3f} made, "
)


def parse_args() -> Namespace:
    """Options; names and defaults of the published script."""
    parser = make_parser(
        __doc__,
        "bash scripts/tokenizer/train_vq.sh --data-path IMAGENET/train --cloud-save-path DIR --image-size 256",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data-path", required=True, help="folder with one sub-folder of images per class")
    data.add_argument("--data-face-path", help="second such folder, trained on as well; published for images of faces")
    data.add_argument("--image-size", type=positive_int, default=256, help="side of the training crops, pixels")
    data.add_argument("--no-flip", action="store_true", help="never mirror images (for text, digits)")
    data.add_argument("--num-workers", type=count, default=16, help="decoding processes, at most one per core")
    model = parser.add_argument_group("model")
    model.add_argument("--vq-model", choices=list(VQ_models), default="VQ-16", help="size")
    model.add_argument(
        "--vq-ckpt",
        help="start from the weights of this file, released or exported; or a training checkpoint's folder, to go on "
        "from its step if the run has no checkpoint of its own yet",
    )
    model.add_argument(
        "--finetune",
        action="store_true",
        help="take only weights from the folder of --vq-ckpt, its discriminator's included, and start at step 0",
    )
    model.add_argument("--codebook-size", type=positive_int, help="entries (default: the size's)")
    model.add_argument("--codebook-embed-dim", type=positive_int, help="width of an entry (default: 8)")
    model.add_argument(
        "--codebook-l2-norm",
        action=BooleanOptionalAction,
        default=True,
        help="unit-length entries and latents",
    )
    model.add_argument("--dropout-p", type=fraction, default=0.0, help="dropout in residual blocks")
    model.add_argument(
        "--codebook-init",
        choices=["uniform", "data", "kmeans"],
        default="uniform",
        help="entries of a new codebook: drawn as published, from the first images' latents, or by k-means over them",
    )
    model.add_argument(
        "--revive-dead-codes",
        type=count,
        default=0,
        help="every so many steps, move entries that the last 65,536 codes lack to latents at hand; 0: never",
    )
    loss = parser.add_argument_group("loss")
    loss.add_argument("--reconstruction-loss", choices=list(PIXEL_LOSSES), default="l2", help="pixel loss")
    loss.add_argument("--reconstruction-weight", type=amount, default=1.0, help="its weight")
    loss.add_argument("--codebook-weight", type=amount, default=1.0, help="weight of the quantizer's losses")
    loss.add_argument("--commit-loss-beta", type=amount, default=0.25, help="weight of commitment within them")
    loss.add_argument("--entropy-loss-ratio", type=amount, default=0.0, help="weight of entropy within them")
    loss.add_argument("--perceptual-weight", type=amount, default=1.0, help="of LPIPS; 0 goes without")
    loss.add_argument("--vgg-weights", help="torchvision's vgg16-397923af.pth, for LPIPS (default: torch.hub's copy)")
    gan = parser.add_argument_group("GAN loss")
    gan.add_argument("--disc-weight", type=amount, default=0.5, help="its weight; 0: no discriminator is made")
    gan.add_argument("--disc-start", type=count, default=20000, help="first step with it, as the log counts")
    gan.add_argument("--disc-type", choices=DISCRIMINATORS, default="patchgan", help="discriminator")
    gan.add_argument("--disc-loss", choices=list(DISCRIMINATOR_LOSSES), default="hinge", help="the discriminator's")
    gan.add_argument("--gen-loss", choices=list(GENERATOR_LOSSES), default="hinge", help="the tokenizer's")
    gan.add_argument(
        "--disc-adaptive-weight",
        action="store_true",
        help="also weigh it by the ratio of gradients at the decoder's last layer (VQGAN)",
    )
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=positive_int, default=40, help="passes over the images")
    training.add_argument("--global-batch-size", type=positive_int, default=128, help="images a step, all processes")
    training.add_argument("--lr", type=amount, default=1e-4, help="learning rate")
    training.add_argument("--lr-schedule", choices=["constant", "cosine"], default="constant", help="cosine ends at 0")
    add_precision_option(training, ["none", "fp16", "bf16"])
    training.add_argument("--compile", action="store_true", help="torch.compile the model")
    add_optimizer_options(parser)
    add_output_options(parser, "results_tokenizer_image")
    add_retired(parser, {"--dataset": (True, "any folder of class folders is read the same way")})
    return parser.parse_args()


def start_folder(args: Namespace) -> Path | None:
    """The training checkpoint to go on from, if ``--vq-ckpt`` is one and nothing is to start anew."""
    folder = args.vq_ckpt is not None and Path(args.vq_ckpt).is_dir() and not args.finetune
    return Path(args.vq_ckpt) if folder else None


def check_options(args: Namespace) -> None:
    """``ValueError`` for options that exclude each other."""
    if args.finetune and args.vq_ckpt is None:
        raise ValueError("--finetune needs --vq-ckpt, the weights to start from")
    if args.vq_ckpt is not None and args.codebook_init != "uniform":
        raise ValueError(f"--codebook-init {args.codebook_init} makes a new codebook, but --vq-ckpt brings one")
    if args.compile and args.disc_adaptive_weight:
        raise ValueError("--disc-adaptive-weight takes gradients apart, which a model under --compile does not allow")


def make_model(args: Namespace) -> VQModel:
    """A new tokenizer, or the weights of ``--vq-ckpt`` under this run's losses and dropout."""
    written = dict(codebook_size=args.codebook_size, codebook_embed_dim=args.codebook_embed_dim)
    losses = dict(
        commit_loss_beta=args.commit_loss_beta, entropy_loss_ratio=args.entropy_loss_ratio, dropout_p=args.dropout_p
    )
    if args.vq_ckpt is None or start_folder(args) is not None:
        model = VQModel(make_vq_config(args.vq_model, **written, **losses, codebook_l2_norm=args.codebook_l2_norm))
        model.init_weights()
        return model
    pretrained, _ = load_vq(args.vq_ckpt, args.vq_model, **written)
    resolve(
        "--codebook-l2-norm", args.codebook_l2_norm, pretrained.config.codebook_l2_norm, f"--vq-ckpt {args.vq_ckpt}"
    )
    model = VQModel(replace(pretrained.config, **losses))
    model.load_state_dict(pretrained.state_dict())
    model.quantize.codebook_used.fill_(-1)  # codes of another run
    return model


def list_all_images(args: Namespace) -> list[tuple[str, int]]:
    """(path, label) of every image to train on."""
    faces = [] if args.data_face_path is None else list_images(args.data_face_path, "--data-face-path").samples
    return list_images(args.data_path).samples + faces


def make_loader(args: Namespace, order: EpochOrder, steps: range, rank: int, size: int) -> DataLoader:
    """One rank's images of ``steps``, as uint8 (B, S, S, 3); crops and flips depend on (index, epoch)."""
    augment = RandomCrop(args.image_size, flip=not args.no_flip, seed=args.global_seed)
    files = ImageFiles(list_all_images(args), augment)
    keys = order.rank_keys(steps.start, steps.stop, rank, size)
    workers = min(args.num_workers, usable_cores())
    return DataLoader(files, batch_sampler=keys, num_workers=workers, pin_memory=torch.cuda.is_available())


@dataclass
class VQState(TrainingState):
    """The tokenizer's state and its discriminator's, saved and resumed as one."""

    discriminator: TrainingState | None = None

    def set_learning_rate(self, lr: float) -> None:
        """Of both."""
        super().set_learning_rate(lr)
        if self.discriminator:
            self.discriminator.set_learning_rate(lr)

    def parameters(self) -> list[nn.Parameter]:
        """Of both."""
        return super().parameters() + (self.discriminator.parameters() if self.discriminator else [])

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tokenizer's, and the discriminator's under ``discriminator.``."""
        others = self.discriminator.tensors() if self.discriminator else {}
        return super().tensors() | {f"discriminator.{k}": v for k, v in others.items()}

    def scalars(self) -> dict[str, Any]:
        """The tokenizer's, and the discriminator's under ``discriminator``."""
        others = {"discriminator": self.discriminator.scalars()} if self.discriminator else {}
        return super().scalars() | others

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        """Take ``scalars`` back."""
        super().load_scalars(scalars)
        if self.discriminator:
            self.discriminator.load_scalars(scalars["discriminator"])


@dataclass
class Run:
    """Everything a training run is made of, ready for its loop."""

    args: Namespace
    world: World
    model: VQModel
    forward: nn.Module
    state: VQState
    supervised: Supervised
    adversary: Adversary | None
    order: EpochOrder
    memory_format: torch.memory_format
    facts: dict  # what a checkpoint says of the run
    folder: RunFolder
    first_step: int
    last_step: int


def build(args: Namespace, world: World) -> Run:
    """Check the options, make or load everything, resume; writes nothing."""
    check_options(args)
    order = EpochOrder(len(list_all_images(args)), args.global_batch_size, args.global_seed)
    total_steps = args.epochs * order.steps_per_epoch
    torch.manual_seed(args.global_seed)
    model = make_model(args)
    if args.image_size % model.config.downsample:
        raise ValueError(
            f"--image-size {args.image_size} is no multiple of {args.vq_model}'s {model.config.downsample}"
        )
    # measured: on the CPU channels-last halves the speed of a bf16 training step
    memory_format = torch.channels_last if world.device.type == "cuda" else torch.contiguous_format
    model.to(world.device, memory_format=memory_format).train()
    if args.compile:
        model.compile()
    supervised = Supervised(args, world.device, memory_format)
    adversary = Adversary(args, world, memory_format) if args.disc_weight else None
    if args.finetune and adversary and Path(args.vq_ckpt).is_dir():
        pretrained = read_sharded(Path(args.vq_ckpt), "discriminator.model.")
        if pretrained.keys() == adversary.model.state_dict().keys():
            adversary.model.load_state_dict(pretrained)
    optimizer = make_adamw(model, args.lr, args.weight_decay, (args.beta1, args.beta2))
    scaler = torch.amp.GradScaler(world.device.type, enabled=args.mixed_precision == "fp16")
    ema = Ema(model, args.ema_decay) if args.ema else None
    guard = Guard(world.device, args.max_loss_spike, args.max_skipped_steps)
    state = VQState(model, optimizer, scaler, ema, guard, adversary.state if adversary else None)

    fixed = ("image_size", "epochs", "global_batch_size", "global_seed", "lr_schedule")
    same = {k: getattr(args, k) for k in fixed} | {"disc_type": args.disc_type if adversary else None}
    same |= {"config": asdict(model.config), "images": order.length}
    facts = dict(vq_model=args.vq_model, config=asdict(model.config), run=json.loads(json.dumps(same)))
    places = (args.results_dir, args.cloud_save_path, args.no_local_save, args.keep_last, args.keep_every)
    folder = RunFolder.of(world, f"{args.vq_model}-{args.image_size}", *places)
    first_step = folder.resume(state, facts["run"], start_folder(args))
    if first_step == 0 and args.codebook_init != "uniform":
        place_codebook(args, model, order, world)
        if ema:
            ema.start(model)
    last_step = min(first_step + 2, total_steps) if args.dry_run else total_steps
    forward = replicate(world, model)
    if adversary:
        adversary.replicate()
    return Run(
        args, world, model, forward, state, supervised, adversary, order, memory_format, facts, folder,
        first_step, last_step,
    )  # fmt: skip


@torch.no_grad()
def place_codebook(args: Namespace, model: VQModel, order: EpochOrder, world: World) -> None:
    """Entries of a new codebook from the latents of the first images, on rank 0 for all."""
    size, tokens = model.config.codebook_size, (args.image_size // model.config.downsample) ** 2
    available = order.steps_per_epoch * order.batch * tokens
    if available < size:
        raise ValueError(
            f"--codebook-init {args.codebook_init}: {order.length} images have {available} latents for {size} entries"
        )
    if world.is_main:
        steps = min(-(-LATENTS_PER_ENTRY * size // (order.batch * tokens)), order.steps_per_epoch)
        batches = make_loader(args, order, range(steps), 0, 1)
        latents = torch.cat([model.quantize.rows(model.latent(to_model_range(p, world.device))) for p, _, _ in batches])
        iterations = KMEANS_ITERATIONS if args.codebook_init == "kmeans" else 0
        model.quantize.fit(latents, iterations, torch.Generator().manual_seed(args.global_seed))
    entries = world.broadcast(model.quantize.embedding.weight.cpu())  # (V, C)
    model.quantize.embedding.weight.copy_(entries)


@torch.no_grad()
def revive_dead_codes(r: Run, images: torch.Tensor, step: int) -> None:
    """Move dead entries, of weights and moving average, to latents of ``images`` (b, 3, S, S) of all ranks."""
    dead = r.model.quantize.dead()  # (V,)
    with autocast(r.world.device, r.args.mixed_precision):
        rows = r.model.quantize.rows(r.model.latent(images))  # (N, C)
    generator = torch.Generator().manual_seed(r.args.global_seed + step)
    r.model.quantize.move(dead, r.world.gather(rows), generator)
    if r.state.ema:
        r.state.ema.average["quantize.embedding.weight"][dead] = r.model.quantize.embedding.weight[dead]


def introduce(r: Run, logger: logging.Logger) -> None:
    """Say once what runs and where it stands."""
    parameters = sum(p.numel() for p in r.model.parameters())
    steps = r.args.epochs * r.order.steps_per_epoch
    logger.info(f"{r.args.vq_model}: {parameters:,} parameters, {r.order.length:,} images, {steps:,} steps")
    if r.adversary:
        discriminator = sum(p.numel() for p in r.adversary.model.parameters())
        logger.info(f"{r.args.disc_type}: {discriminator:,} parameters, from step {r.args.disc_start}")
    for note in r.folder.notes:
        logger.info(note)
    where = r.folder.folder
    logger.info(f"{where}: resumed at step {r.first_step}" if r.first_step else f"{where}: new run")


def main() -> None:
    """Build or resume, then the loop."""
    args = parse_args()
    world = init_distributed()
    device = world.device
    args.mixed_precision, reason = world.broadcast(resolve_precision(args.mixed_precision, device))
    micro_batch = split_batch(args.global_batch_size, world.size, args.gradient_accumulation_steps)
    stop = StopSignal(world)
    r = build(args, world)
    model, state, forward, adversary = r.model, r.state, r.forward, r.adversary
    total_steps = args.epochs * r.order.steps_per_epoch
    folder = None if args.dry_run else r.folder.folder
    if folder is not None:
        r.folder.make()
    logger = create_logger(world, folder)
    curves = ScalarLog(world, folder, None if args.no_wandb else args.wandb_project, vars(args))
    if world.is_main and folder is not None:
        write_options(folder / "options.json", args, config=asdict(model.config), steps=total_steps)
    logger.log(log_level(args.mixed_precision, device), f"--mixed-precision {reason}")
    introduce(r, logger)
    names = Supervised.names + (Adversary.names if adversary else ())
    guards = [state.guard] + ([adversary.state.guard] if adversary else [])
    accumulation = args.gradient_accumulation_steps

    bar = progress(world, "training", r.last_step, r.first_step, "steps")
    window = Window((*names, "grad_norm"), device)
    stopping, seconds = False, 0.0
    loader = make_loader(args, r.order, range(r.first_step, r.last_step), world.rank, world.size)
    for step, (pixels, _, _) in enumerate(loader, start=r.first_step):
        # ---------------------------------------------------------------- one training step
        stop.ask()
        seed_step(args.global_seed, step, world.rank)
        lr = learning_rate(step, args.lr, args.lr_schedule, total_steps)
        state.set_learning_rate(lr)
        adversarial = adversary is not None and (adversary.active(step + 1) or args.dry_run)
        terms, codes = torch.zeros(len(names), device=device), []
        for i, micro in enumerate(pixels.split(micro_batch)):
            images = to_model_range(micro, device).contiguous(memory_format=r.memory_format)  # (b, 3, S, S)
            more = i + 1 < accumulation
            with delay_sync(forward, more):
                with autocast(device, args.mixed_precision):
                    made, quantizer, found = forward(images)  # (b, 3, S, S), -, (b, h, w)
                    made = made.float()  # (b, 3, S, S)
                    loss, decoded, now = r.supervised(images, made, quantizer)  # (), (), (K,)
                    if adversarial:
                        scale = state.scaler.get_scale()
                        gan, weight = adversary.generator_loss(made, decoded, model.decoder.last_layer, scale)  # ()
                        loss = loss + weight * gan  # ()
                state.scaler.scale(loss / accumulation).backward()
            if adversarial:
                with delay_sync(adversary.forward, more):
                    with autocast(device, args.mixed_precision):
                        told, real, fake = adversary.discriminator_loss(images, made)  # () each
                    adversary.state.scaler.scale(told / accumulation).backward()
                now = torch.cat([now, torch.stack([gan, weight, told, real, fake]).detach()])  # (K + 5,)
            terms[: len(now)] += now / accumulation
            codes.append(found)
        terms = world.mean(terms)  # (K,)
        norm = state.gradient_norm()
        # without the GAN loss, which has no mean to keep near: where it is not a number, the norm says so
        state.update(step, terms[0], norm, args.max_grad_norm)  # clip, skip if harmful, step, EMA
        if adversarial:
            told = terms[names.index("discriminator")]  # ()
            adversary.state.update(step, told, adversary.state.gradient_norm(), args.max_grad_norm)
        model.quantize.record_usage(world.gather(torch.cat(codes)))
        if args.revive_dead_codes and (step + 1) % args.revive_dead_codes == 0:
            revive_dead_codes(r, images, step)
        # ---------------------------------------------------------------------------------
        done, stopping = step + 1, stop.agreed()
        last = done == r.last_step or stopping
        window.add(*terms, norm)
        bar.update()
        if done % args.log_every == 0 or last or args.dry_run:
            figures = window.read(args.global_batch_size)
            seconds = figures.pop("seconds/step")
            figures |= {"lr": lr, "skipped": state.guard.skipped}
            figures |= {"codebook_used": model.quantize.usage(), "perplexity": model.quantize.perplexity()}
            figures["memory_gib"] = peak_memory(device) / 2**30
            extra = "perceptual {perceptual:.4f}, " if args.perceptual_weight else ""
            extra = (extra + (GAN_LINE if adversarial else "")).format(**figures)
            left = timedelta(seconds=round(seconds * (total_steps - done)))
            logger.info(f"step {done}: {LOG_LINE.format(**figures, terms=extra)}, {left} left")
            curves.write(done, figures)
            for guard in guards:
                guard.check(done, lr, last)
        with window.paused():
            if folder is not None and (done % args.ckpt_every == 0 or last) and all(g.sound for g in guards):
                r.folder.save(done, state, r.facts)
        if stopping:
            break
    bar.close()
    curves.close()
    if args.dry_run:
        r.folder.forecast(state, total_steps - r.first_step, seconds, logger)
    else:
        r.folder.finish(r.last_step, stopping, "pt", logger)


if __name__ == "__main__":
    run(main)
