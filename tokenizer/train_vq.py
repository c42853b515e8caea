"""Images -> VQ tokenizer: reconstruction and codebook losses.

Rerunning the same command resumes from the newest checkpoint, at the very next step.
"""

from __future__ import annotations

import os
import sys
from argparse import BooleanOptionalAction, Namespace
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from timm.scheduler import CosineLRScheduler
from torch.utils.data import DataLoader

from dataset.epochs import EpochOrder
from dataset.imagenet import ImageFiles, RandomCrop, list_images, to_model_range
from tokenizer.vq_model import VQ_models, VQModel, load_vq, make_vq_config
from utils.checkpoint import resolve
from utils.distributed import World, autocast, init_distributed
from utils.logger import create_logger, progress
from utils.options import add_retired, amount, count, fraction, make_parser, positive_int, run, write_options
from utils.training import Ema, RunFolder, TrainingState, check_finite, make_adamw, seed_step, split_batch


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
    training.add_argument("--gradient-accumulation-steps", type=positive_int, default=1, help="micro-batches a step")
    training.add_argument("--lr", type=amount, default=1e-4, help="learning rate")
    training.add_argument("--lr-schedule", choices=["constant", "cosine"], default="constant", help="cosine ends at 0")
    training.add_argument("--weight-decay", type=amount, default=0.05, help="AdamW, matrices and convolutions only")
    training.add_argument("--beta1", type=fraction, default=0.9, help="AdamW")
    training.add_argument("--beta2", type=fraction, default=0.95, help="AdamW")
    training.add_argument("--max-grad-norm", type=amount, default=1.0, help="clip gradients to this norm; 0: never")
    training.add_argument("--mixed-precision", choices=["none", "fp16", "bf16"], default="bf16", help="autocast")
    training.add_argument("--ema", action="store_true", help="keep a moving average of the weights as well")
    training.add_argument("--compile", action="store_true", help="torch.compile the model")
    training.add_argument("--global-seed", type=count, default=0, help="weights, data order, crops, dropout")
    output = parser.add_argument_group("output")
    output.add_argument("--cloud-save-path", required=True, help="durable folder for checkpoints")
    output.add_argument("--no-local-save", action="store_true", help="write to --cloud-save-path only")
    output.add_argument("--results-dir", default="results_tokenizer_image", help="local folder for logs, checkpoints")
    output.add_argument("--log-every", type=positive_int, default=100, help="steps")
    output.add_argument("--ckpt-every", type=positive_int, default=5000, help="steps")
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


def main() -> None:
    """Build or resume, then the loop."""
    args = parse_args()
    world = init_distributed()
    device = world.device
    micro_batch = split_batch(args.global_batch_size, world.size, args.gradient_accumulation_steps)
    order = EpochOrder(len(list_images(args.data_path).samples), args.global_batch_size, args.global_seed)
    total_steps = args.epochs * order.steps_per_epoch
    torch.manual_seed(args.global_seed)
    model = make_model(args)
    if args.image_size % model.config.downsample:
        raise ValueError(
            f"--image-size {args.image_size} is no multiple of {args.vq_model}'s {model.config.downsample}"
        )
    # measured: on the CPU channels-last halves the speed of a bf16 training step
    memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model.to(device, memory_format=memory_format).train()
    optimizer = make_adamw(model, args.lr, args.weight_decay, (args.beta1, args.beta2))
    scaler = torch.amp.GradScaler(device.type, enabled=args.mixed_precision == "fp16")
    state = TrainingState(model, optimizer, scaler, Ema(model) if args.ema else None)

    folder = RunFolder.of(
        args.results_dir, args.cloud_save_path, args.no_local_save, f"{args.vq_model}-{args.image_size}"
    )
    run_facts = {
        k: getattr(args, k) for k in ("image_size", "epochs", "global_batch_size", "global_seed", "lr_schedule")
    }
    run_facts |= {"config": asdict(model.config), "images": order.length}
    first_step = folder.resume(world, state, run_facts)
    if world.is_main:
        folder.make()
        write_options(folder.folder / "options.json", args, config=asdict(model.config), steps=total_steps)
    logger = create_logger(world, folder.folder)
    parameters = sum(p.numel() for p in model.parameters())
    logger.info(f"{args.vq_model}: {parameters:,} parameters, {order.length:,} images, {total_steps:,} steps")
    logger.info(f"{folder.folder}: resumed at step {first_step}" if first_step else f"{folder.folder}: new run")

    forward = torch.compile(model) if args.compile else model
    forward = world.data_parallel(forward)
    schedule = CosineLRScheduler(optimizer, t_initial=total_steps, t_in_epochs=False)
    pixel_loss = {"l1": F.l1_loss, "l2": F.mse_loss}[args.reconstruction_loss]

    facts = dict(vq_model=args.vq_model, config=asdict(model.config), run=run_facts)
    bar = progress(world, "training", total_steps, first_step, "steps")
    sums, since = torch.zeros(3, device=device), 0
    loader = make_loader(args, order, world, first_step, total_steps)
    for step, (pixels, _, _) in enumerate(loader, start=first_step):
        # ---------------------------------------------------------------- one training step
        seed_step(args.global_seed, step, world.rank)
        if args.lr_schedule == "cosine":
            schedule.step_update(step)
        for i, micro in enumerate(pixels.split(micro_batch)):
            images = to_model_range(micro, device).contiguous(memory_format=memory_format)  # (b, 3, S, S)
            last = i == args.gradient_accumulation_steps - 1
            with nullcontext() if last or world.size == 1 else forward.no_sync():
                with autocast(device, args.mixed_precision):
                    reconstruction, quantizer, _ = forward(images)  # (b, 3, S, S)
                reconstruction_loss = pixel_loss(reconstruction.float(), images)
                loss = args.reconstruction_weight * reconstruction_loss + args.codebook_weight * sum(quantizer)
                scaler.scale(loss / args.gradient_accumulation_steps).backward()
            losses = torch.stack([loss.detach(), reconstruction_loss.detach(), sum(quantizer).detach()])  # (3,)
            sums += losses / args.gradient_accumulation_steps
        if args.max_grad_norm > 0:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if state.ema:
            state.ema.update(model, step)
        # ---------------------------------------------------------------------------------
        done, since = step + 1, since + 1
        bar.update()
        saving = done % args.ckpt_every == 0 or done == total_steps
        if done % args.log_every == 0 or saving:
            means = world.mean(sums / since)
            check_finite([means, *(model.parameters() if saving else ())], done, optimizer.param_groups[0]["lr"])
            names = ("loss", "reconstruction", "codebook")
            text = ", ".join(f"{k} {v:.4f}" for k, v in zip(names, means.tolist(), strict=True))
            lr = optimizer.param_groups[0]["lr"]
            logger.info(f"step {done}: {text}, codebook used {model.quantize.usage():.1%}, lr {lr:.2e}")
            sums, since = torch.zeros(3, device=device), 0
        if saving:
            if world.is_main:
                logger.info(f"saved {folder.save(done, state.checkpoint(done, **facts))}")
            world.barrier()
    bar.close()


if __name__ == "__main__":
    run(main)
