"""Images -> VQ tokenizer: reconstruction and codebook losses.

Rerunning the same command resumes from the newest checkpoint, at the very next step. SIGTERM and SIGUSR1 save and exit
within a step.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from argparse import BooleanOptionalAction, Namespace
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.utils.data import DataLoader

from dataset.epochs import EpochOrder
from dataset.imagenet import ImageFiles, RandomCrop, list_images, to_model_range
from tokenizer.vq_model import VQ_models, VQModel, load_vq, make_vq_config
from utils.checkpoint import resolve
from utils.distributed import World, autocast, init_distributed
from utils.logger import ScalarLog, create_logger, progress
from utils.options import add_retired, amount, count, fraction, make_parser, positive_int, run, write_options
from utils.parallel import delay_sync, replicate
from utils.performance import Window, peak_memory
from utils.run_folder import RunFolder
from utils.stop_signal import StopSignal
from utils.training import (
    Ema,
    Guard,
    TrainingState,
    add_optimizer_options,
    add_output_options,
    make_adamw,
    seed_step,
    split_batch,
)

LOG_LINE = (
    "loss {loss:.4f}, reconstruction {reconstruction:.4f}, codebook {codebook:.4f}, codebook used {codebook_used:.1%}, "
    "grad norm {grad_norm:.3f}, lr {lr:.2e}, {images/s:.4g} images/s, peak {memory_gib:.2f} GiB, {skipped} skipped"
)


def parse_args() -> Namespace:
    """Options; names and defaults of the published script."""
    parser = make_parser(
        __doc__,
        "bash scripts/tokenizer/train_vq.sh --data-path IMAGENET/train --cloud-save-path DIR --image-size 256",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data-path", required=True, help="folder with one sub-folder of images per class")
    data.add_argument("--image-size", type=positive_int, default=256, help="side of the training crops, pixels")
    data.add_argument("--no-flip", action="store_true", help="never mirror images (for text, digits)")
    data.add_argument("--num-workers", type=count, default=16, help="decoding processes, at most one per core")
    model = parser.add_argument_group("model")
    model.add_argument("--vq-model", choices=list(VQ_models), default="VQ-16", help="size")
    model.add_argument("--vq-ckpt", help="start from these weights")
    model.add_argument("--codebook-size", type=positive_int, help="entries (default: the size's)")
    model.add_argument("--codebook-embed-dim", type=positive_int, help="width of an entry (default: 8)")
    model.add_argument(
        "--codebook-l2-norm",
        action=BooleanOptionalAction,
        default=True,
        help="unit-length entries and latents",
    )
    model.add_argument("--dropout-p", type=fraction, default=0.0, help="dropout in residual blocks")
    loss = parser.add_argument_group("loss")
    loss.add_argument("--reconstruction-loss", choices=["l1", "l2"], default="l2", help="pixel loss")
    loss.add_argument("--reconstruction-weight", type=amount, default=1.0, help="its weight")
    loss.add_argument("--codebook-weight", type=amount, default=1.0, help="weight of the quantizer's losses")
    loss.add_argument("--commit-loss-beta", type=amount, default=0.25, help="weight of commitment within them")
    loss.add_argument("--entropy-loss-ratio", type=amount, default=0.0, help="weight of the entropy loss")
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=positive_int, default=40, help="passes over the images")
    training.add_argument("--global-batch-size", type=positive_int, default=128, help="images a step, all processes")
    training.add_argument("--lr", type=amount, default=1e-4, help="learning rate")
    training.add_argument("--lr-schedule", choices=["constant", "cosine"], default="constant", help="cosine ends at 0")
    training.add_argument("--mixed-precision", choices=["none", "fp16", "bf16"], default="bf16", help="autocast")
    training.add_argument("--compile", action="store_true", help="torch.compile the model")
    add_optimizer_options(parser)
    add_output_options(parser, "results_tokenizer_image")
    add_retired(parser, {"--dataset": (True, "any folder of class folders is read the same way")})
    return parser.parse_args()


def make_model(args: Namespace) -> VQModel:
    """A new tokenizer, or the weights of ``--vq-ckpt`` under this run's losses and dropout."""
    written = dict(codebook_size=args.codebook_size, codebook_embed_dim=args.codebook_embed_dim)
    losses = dict(
        commit_loss_beta=args.commit_loss_beta, entropy_loss_ratio=args.entropy_loss_ratio, dropout_p=args.dropout_p
    )
    if args.vq_ckpt is None:
        model = VQModel(make_vq_config(args.vq_model, **written, **losses, codebook_l2_norm=args.codebook_l2_norm))
        model.init_weights()
        return model
    pretrained, _ = load_vq(args.vq_ckpt, args.vq_model, **written)
    resolve(
        "--codebook-l2-norm", args.codebook_l2_norm, pretrained.config.codebook_l2_norm, f"--vq-ckpt {args.vq_ckpt}"
    )
    model = VQModel(replace(pretrained.config, **losses))
    model.load_state_dict(pretrained.state_dict())
    return model


def make_loader(args: Namespace, order: EpochOrder, world: World, first_step: int, last_step: int) -> DataLoader:
    """This rank's images of steps [first, last), as uint8 (B, S, S, 3); crops and flips depend on (index, epoch)."""
    augment = RandomCrop(args.image_size, flip=not args.no_flip, seed=args.global_seed)
    files = ImageFiles(list_images(args.data_path).samples, augment)
    keys = order.rank_keys(first_step, last_step, world.rank, world.size)
    workers = min(args.num_workers, os.cpu_count() or 1)
    return DataLoader(files, batch_sampler=keys, num_workers=workers, pin_memory=torch.cuda.is_available())


@dataclass
class Run:
    """Everything a training run is made of, ready for its loop."""

    args: Namespace
    world: World
    model: VQModel
    forward: nn.Module
    state: TrainingState
    schedule: CosineLRScheduler
    order: EpochOrder
    memory_format: torch.memory_format
    facts: dict  # what a checkpoint says of the run
    folder: RunFolder
    first_step: int
    last_step: int


def build(args: Namespace, world: World) -> Run:
    """Check the options, make or load everything, resume; writes nothing."""
    order = EpochOrder(len(list_images(args.data_path).samples), args.global_batch_size, args.global_seed)
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
    optimizer = make_adamw(model, args.lr, args.weight_decay, (args.beta1, args.beta2))
    scaler = torch.amp.GradScaler(world.device.type, enabled=args.mixed_precision == "fp16")
    ema = Ema(model, args.ema_decay) if args.ema else None
    guard = Guard(world.device, args.max_loss_spike, args.max_skipped_steps)
    state = TrainingState(model, optimizer, scaler, ema, guard)
    lr_min = 0.0 if args.lr_schedule == "cosine" else args.lr
    schedule = CosineLRScheduler(optimizer, t_initial=total_steps, lr_min=lr_min, t_in_epochs=False)

    fixed = ("image_size", "epochs", "global_batch_size", "global_seed", "lr_schedule")
    same = {k: getattr(args, k) for k in fixed} | {"config": asdict(model.config), "images": order.length}
    facts = dict(vq_model=args.vq_model, config=asdict(model.config), run=json.loads(json.dumps(same)))
    places = (args.results_dir, args.cloud_save_path, args.no_local_save, args.keep_last, args.keep_every)
    folder = RunFolder.of(world, f"{args.vq_model}-{args.image_size}", *places)
    first_step = folder.resume(state, facts["run"])
    last_step = min(first_step + 2, total_steps) if args.dry_run else total_steps
    forward = replicate(world, model)
    return Run(args, world, model, forward, state, schedule, order, memory_format, facts, folder, first_step, last_step)


def introduce(r: Run, logger: logging.Logger) -> None:
    """Say once what runs and where it stands."""
    parameters = sum(p.numel() for p in r.model.parameters())
    steps = r.args.epochs * r.order.steps_per_epoch
    logger.info(f"{r.args.vq_model}: {parameters:,} parameters, {r.order.length:,} images, {steps:,} steps")
    for note in r.folder.notes:
        logger.info(note)
    where = r.folder.folder
    logger.info(f"{where}: resumed at step {r.first_step}" if r.first_step else f"{where}: new run")


def main() -> None:
    """Build or resume, then the loop."""
    args = parse_args()
    world = init_distributed()
    device = world.device
    micro_batch = split_batch(args.global_batch_size, world.size, args.gradient_accumulation_steps)
    stop = StopSignal(world)
    r = build(args, world)
    model, state, forward = r.model, r.state, r.forward
    total_steps = args.epochs * r.order.steps_per_epoch
    folder = None if args.dry_run else r.folder.folder
    if folder is not None:
        r.folder.make()
    logger = create_logger(world, folder)
    curves = ScalarLog(world, folder, None if args.no_wandb else args.wandb_project, vars(args))
    if world.is_main and folder is not None:
        write_options(folder / "options.json", args, config=asdict(model.config), steps=total_steps)
    introduce(r, logger)
    pixel_loss = {"l1": F.l1_loss, "l2": F.mse_loss}[args.reconstruction_loss]

    bar = progress(world, "training", r.last_step, r.first_step, "steps")
    window = Window(("loss", "reconstruction", "codebook", "grad_norm"), device)
    stopping, seconds = False, 0.0
    loader = make_loader(args, r.order, world, r.first_step, r.last_step)
    for step, (pixels, _, _) in enumerate(loader, start=r.first_step):
        # ---------------------------------------------------------------- one training step
        stop.ask()
        seed_step(args.global_seed, step, world.rank)
        r.schedule.step_update(step)
        losses = torch.zeros(3, device=device)
        for i, micro in enumerate(pixels.split(micro_batch)):
            images = to_model_range(micro, device).contiguous(memory_format=r.memory_format)  # (b, 3, S, S)
            with delay_sync(forward, i + 1 < args.gradient_accumulation_steps):
                with autocast(device, args.mixed_precision):
                    reconstruction, quantizer, _ = forward(images)  # (b, 3, S, S)
                pixel, codebook = pixel_loss(reconstruction.float(), images), sum(quantizer)  # ()
                loss = args.reconstruction_weight * pixel + args.codebook_weight * codebook
                state.scaler.scale(loss / args.gradient_accumulation_steps).backward()
            losses += torch.stack([loss, pixel, codebook]).detach() / args.gradient_accumulation_steps
        losses = world.mean(losses)
        norm = state.gradient_norm()
        state.update(step, losses[0], norm, args.max_grad_norm)  # clip, skip if harmful, step, EMA
        # ---------------------------------------------------------------------------------
        done, stopping = step + 1, stop.agreed()
        last = done == r.last_step or stopping
        window.add(*losses, norm)
        bar.update()
        if done % args.log_every == 0 or last or args.dry_run:
            figures = window.read(args.global_batch_size)
            seconds = figures.pop("seconds/step")
            figures |= {"lr": r.schedule.optimizer.param_groups[0]["lr"], "skipped": state.guard.skipped}
            figures |= {"codebook_used": model.quantize.usage(), "memory_gib": peak_memory(device) / 2**30}
            left = timedelta(seconds=round(seconds * (total_steps - done)))
            logger.info(f"step {done}: {LOG_LINE.format(**figures)}, {left} left")
            curves.write(done, figures)
            state.guard.check(done, figures["lr"], last)
        with window.paused():
            if folder is not None and (done % args.ckpt_every == 0 or last) and state.guard.sound:
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
