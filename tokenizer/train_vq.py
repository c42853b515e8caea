"""Images -> VQ tokenizer: reconstruction, perceptual (LPIPS), codebook and GAN losses.

Rerunning the same command resumes from the newest checkpoint, at the very next step. SIGTERM,
SIGUSR1 and Ctrl-C save and exit within a step.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import asdict, replace
from logging import Logger
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tokenizer.options import parse_args
from utils.options import answer_early, resolve, run_main

if __name__ == "__main__":
    answer_early(parse_args, __doc__)

import torch
from torch.utils.data import DataLoader

from dataset.epochs import EpochOrder
from dataset.imagenet import ImageFiles, RandomCrop, list_images, to_model_range
from tokenizer.layout import place_tokenizer
from tokenizer.load import load_vq
from tokenizer.vq_loss import Adversary, ReconstructionLoss
from tokenizer.vq_model import VQModel, make_vq_config
from tokenizer.vq_state import VQState, place_codebook, revive_dead_codes
from utils.checkpoints.folder import read_sharded
from utils.distributed import init_distributed
from utils.parallel import delay_sync, replicate
from utils.performance import worker_count
from utils.precision import allow_tf32, autocast, log_level, resolve_precision
from utils.training.options import split_batch
from utils.training.run import TrainingRun
from utils.training.state import learning_rate, make_training_state
from utils.training.stop_signal import StopSignal

LOG_LINE = (
    ": loss {loss:.4f}, reconstruction {reconstruction:.4f}, {terms}codebook {codebook:.4f}, "
    "codebook used {codebook_used:.1%}, perplexity {perplexity:.4g}, grad norm {grad_norm:.3f}, lr "
    "{lr:.2e}, {images/s:.4g} images/s, peak {memory_gib:.2f} GiB, {skipped} skipped"
)
GAN_LINE = (
    "adversarial {adversarial:.4f} x {adversarial_weight:.3g}, discriminator {discriminator:.4f}, "
    "logits {logits_real:.3f} real {logits_fake:.3f} made, "
)


def start_folder(args: Namespace) -> Path | None:
    """Return the checkpoint folder to resume from: ``--vq-ckpt`` if it is one, not to finetune."""
    folder = args.vq_ckpt is not None and Path(args.vq_ckpt).is_dir() and not args.finetune
    return Path(args.vq_ckpt) if folder else None


def check_options(args: Namespace) -> None:
    """Raise ``ValueError`` for options that exclude each other."""
    if args.finetune and args.vq_ckpt is None:
        raise ValueError("--finetune needs --vq-ckpt, the weights to start from")
    if args.vq_ckpt is not None and args.codebook_init != "uniform":
        raise ValueError(
            f"--codebook-init {args.codebook_init} makes a new codebook, but --vq-ckpt brings one"
        )
    if args.compile and args.disc_adaptive_weight:
        raise ValueError(
            "--disc-adaptive-weight takes gradients apart, which a model under "
            "--compile does not allow"
        )


def make_model(args: Namespace) -> VQModel:
    """Return a new tokenizer, or ``--vq-ckpt`` with this run's losses and dropout."""
    written = dict(codebook_size=args.codebook_size, codebook_embed_dim=args.codebook_embed_dim)
    losses = dict(
        commit_loss_beta=args.commit_loss_beta,
        entropy_loss_ratio=args.entropy_loss_ratio,
        dropout_p=args.dropout_p,
    )
    if args.vq_ckpt is None or start_folder(args) is not None:
        losses["codebook_l2_norm"] = args.codebook_l2_norm
        model = VQModel(make_vq_config(args.vq_model, **written, **losses))
        model.init_weights()
        return model
    pretrained, _ = load_vq(args.vq_ckpt, args.vq_model, **written)
    l2_norm, source = pretrained.config.codebook_l2_norm, f"--vq-ckpt {args.vq_ckpt}"
    resolve("--codebook-l2-norm", args.codebook_l2_norm, l2_norm, source)
    model = VQModel(replace(pretrained.config, **losses))
    model.load_state_dict(pretrained.state_dict())
    model.quantize.codebook_used.fill_(-1)  # codes of another run
    return model


def open_images(args: Namespace) -> ImageFiles:
    """Return every image to train on, under random crops seeded by (image, epoch)."""
    samples = list_images(args.data_path).samples
    if args.data_face_path is not None:
        samples += list_images(args.data_face_path, "--data-face-path").samples
    augment = RandomCrop(args.image_size, flip=not args.no_flip, seed=args.global_seed)
    return ImageFiles(samples, augment)


def make_loader(
    args: Namespace, files: ImageFiles, order: EpochOrder, steps: range, rank: int, size: int
) -> DataLoader:
    """Return a loader of one rank's images in ``steps``: (B, S, S, 3) uint8."""
    keys = order.rank_keys(steps.start, steps.stop, rank, size)
    workers = worker_count(args.num_workers)
    return DataLoader(
        files, batch_sampler=keys, num_workers=workers, pin_memory=torch.cuda.is_available()
    )


def fixed_options(args: Namespace, model: VQModel, order: EpochOrder) -> dict[str, Any]:
    """Return what may not change between a run and its resumption."""
    fixed = ("image_size", "epochs", "global_batch_size", "global_seed", "lr_schedule")
    options = {k: getattr(args, k) for k in fixed}
    options["disc_type"] = args.disc_type if args.disc_weight else None
    return options | {"config": asdict(model.config), "images": order.length}


def load_discriminator(args: Namespace, adversary: Adversary | None) -> None:
    """Load the discriminator of a training checkpoint along with ``--finetune``, if it fits."""
    if not (args.finetune and adversary and Path(args.vq_ckpt).is_dir()):
        return
    pretrained = read_sharded(Path(args.vq_ckpt), "discriminator.model.")
    if pretrained.keys() == adversary.model.state_dict().keys():
        adversary.model.load_state_dict(pretrained)


def log_header(
    logger: Logger,
    args: Namespace,
    model: VQModel,
    adversary: Adversary | None,
    images: int,
    steps: int,
) -> None:
    """Log once what is trained."""
    parameters = sum(p.numel() for p in model.parameters())
    logger.info(f"{args.vq_model}: {parameters:,} parameters, {images:,} images, {steps:,} steps")
    if adversary:
        discriminator = sum(p.numel() for p in adversary.model.parameters())
        logger.info(f"{args.disc_type}: {discriminator:,} parameters, from step {args.disc_start}")


def main() -> None:
    """Make or load what is trained, resume, then the loop."""
    args = parse_args(__doc__)
    world = init_distributed()
    device = world.device
    precision, precision_note = world.broadcast(resolve_precision(args.mixed_precision, device))
    args.mixed_precision = precision
    allow_tf32(False)
    micro_batch = split_batch(args.global_batch_size, world.size, args.gradient_accumulation_steps)
    stop = StopSignal(world)
    check_options(args)
    files = open_images(args)
    order = EpochOrder(len(files), args.global_batch_size, args.global_seed)
    total_steps = args.epochs * order.steps_per_epoch

    # models, losses, optimizers
    torch.manual_seed(args.global_seed)
    model = make_model(args)
    model.config.grid(args.image_size)  # they fit
    # measured: on the CPU channels-last halves the speed of a bf16 training step
    memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    place_tokenizer(model, device, memory_format, args.compile).train()
    if args.compile:
        model.compile()
    reconstruction_loss = ReconstructionLoss(args, device, memory_format)
    adversary = Adversary(args, world, memory_format) if args.disc_weight else None
    load_discriminator(args, adversary)
    generator = make_training_state(model, args, world, args.ema, args.max_loss_spike)
    state = VQState(**vars(generator), discriminator=adversary.state if adversary else None)

    # where an earlier run of the same command stopped
    name, fixed = f"{args.vq_model}-{args.image_size}", fixed_options(args, model, order)
    run = TrainingRun(args, world, name, state, fixed, total_steps, start_folder(args))
    if run.first_step == 0 and args.codebook_init != "uniform":
        first = make_loader(args, files, order, range(order.steps_per_epoch), 0, 1)
        first_images = (pixels for pixels, _, _ in first)
        place_codebook(args, world, model, first_images, order.steps_per_epoch * order.batch)
        if state.ema:
            state.ema.start(model)
    forward = replicate(world, model)
    if adversary:
        adversary.replicate()

    config = asdict(model.config)
    names = ReconstructionLoss.names + (Adversary.names if adversary else ())
    logger = run.open(stop, (*names, "grad_norm"), config=config)
    logger.log(log_level(args.mixed_precision, device), f"--mixed-precision {precision_note}")
    log_header(logger, args, model, adversary, order.length, total_steps)
    accumulation = args.gradient_accumulation_steps
    steps = range(run.first_step, run.last_step)
    loader = make_loader(args, files, order, steps, world.rank, world.size)
    with run:
        for step, (pixels, _, _) in run.steps(enumerate(loader, start=run.first_step)):
            # ------------------------------------------------------------ one training step
            lr = learning_rate(step, args.lr, args.lr_schedule, total_steps)
            state.set_learning_rate(lr)
            active = adversary and (adversary.active(step + 1) or args.dry_run)
            opponent = adversary if active else None
            terms, codes = dict.fromkeys(names, torch.zeros((), device=device)), []
            for i, micro in enumerate(pixels.split(micro_batch)):
                images = to_model_range(micro, device)  # (b, 3, S, S)
                images = images.contiguous(memory_format=memory_format)  # (b, 3, S, S)
                more = i + 1 < accumulation
                with delay_sync(forward, more):
                    with autocast(device, args.mixed_precision):
                        reconstruction, quantizer_losses, micro_codes = forward(images)
                        reconstruction = reconstruction.float()  # (b, 3, S, S)
                        loss, decoder_loss, micro_terms = reconstruction_loss(
                            images, reconstruction, quantizer_losses
                        )
                        if opponent:
                            last_layer, scale = model.decoder.last_layer, state.scaler.get_scale()
                            gan_loss, weight = opponent.generator_loss(
                                reconstruction, decoder_loss, last_layer, scale
                            )
                            loss = loss + weight * gan_loss  # ()
                    state.scaler.scale(loss / accumulation).backward()
                if opponent:
                    with delay_sync(opponent.forward, more):
                        with autocast(device, args.mixed_precision):
                            disc_loss, real_logit, fake_logit = opponent.discriminator_loss(
                                images, reconstruction
                            )
                        opponent.state.scaler.scale(disc_loss / accumulation).backward()
                    gan_terms = (gan_loss, weight, disc_loss, real_logit, fake_logit)  # () each
                    micro_terms |= zip(Adversary.names, gan_terms, strict=True)
                for name, value in micro_terms.items():
                    terms[name] = terms[name] + value.detach() / accumulation  # ()
                codes.append(micro_codes)  # (b, h, w)
            means = world.mean(torch.stack(list(terms.values())))  # (terms,)
            terms = dict(zip(names, means, strict=True))  # () each
            norm = state.gradient_norm()
            # Clip, skip if harmful, step, EMA. The guard sees only the supervised loss (a GAN loss
            # has no stable mean); NaNs show up in the norm.
            state.update(step, terms["loss"], norm, args.max_grad_norm)
            if opponent:
                disc_norm = opponent.state.gradient_norm()
                opponent.state.update(step, terms["discriminator"], disc_norm, args.max_grad_norm)
            model.quantize.record_usage(world.gather(torch.cat(codes)))
            if args.revive_dead_codes and (step + 1) % args.revive_dead_codes == 0:
                revive_dead_codes(args, world, state, images, step)
            # ------------------------------------------------------------------------------
            run.end_step(**terms, grad_norm=norm)
            if run.log_due:
                figures = run.read(lr)
                figures["codebook_used"] = model.quantize.usage()
                figures["perplexity"] = model.quantize.perplexity()
                shown = "perceptual {perceptual:.4f}, " if args.perceptual_weight else ""
                shown += GAN_LINE if opponent else ""
                run.log(LOG_LINE.replace("{terms}", shown), figures)
            with run.paused():
                run.save_if_due({"vq_model": args.vq_model, "config": config})
        run.finish("pt")


if __name__ == "__main__":
    run_main(main)
