"""Cached codes -> class-conditional GPT, on one process or many, replicated or sharded.

Rerunning the same command resumes from the newest checkpoint, at the very next step. SIGTERM,
SIGUSR1 and Ctrl-C save and exit within a step.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from logging import Logger
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from autoregressive.train.options import parse_args
from utils.options import answer_early, resolve, run_main

if __name__ == "__main__":
    answer_early(parse_args, __doc__)

import torch
from torch import Tensor, nn

from autoregressive.models.causal_attention import make_causal_mask
from autoregressive.models.config import VARIANTS, GPT_models, GPTConfig, variant_of
from autoregressive.models.gpt import GPT
from autoregressive.models.load import load_gpt, resolve_parallelism
from autoregressive.models.regions import canonical_layout
from autoregressive.models.schedules import canonical
from autoregressive.train.data import (
    CodeBatches,
    open_held_out,
    open_tokenizer,
    open_training_codes,
)
from autoregressive.train.kernels import choose_attention
from autoregressive.train.recipe import differences
from autoregressive.train.watch import draw_samples, validate
from dataset.interface import Codes
from utils.distributed import World, init_distributed
from utils.files import require_folder
from utils.npz import short_hash
from utils.parallel import delay_sync, fill, replicate, shard
from utils.performance import Ceiling
from utils.precision import AUTOCAST_DTYPE, autocast, log_level, resolve_precision
from utils.training.options import split_batch
from utils.training.run import TrainingRun, prefetch
from utils.training.state import learning_rate, make_training_state
from utils.training.stop_signal import StopSignal

CODES_FACTS = ("tokenizer_sha256", "source_sha256", "crop_range")  # of meta.json; a run keeps them
LOG_LINE = (
    " (epoch {epoch:.2f}): loss {loss:.4f}, grad norm {grad_norm:.3f}, lr {lr:.2e}, {images/s:.4g} "
    "images/s, {tokens/s:.4g} tokens/s, MFU {mfu:.1%}, peak {memory_gib:.2f} GiB, {skipped} skipped"
)


def make_model(
    args: Namespace, tokenizer_sha256: str | None, device: torch.device
) -> tuple[GPT, Iterable[tuple[str, Tensor]] | None, list[str]]:
    """Return a new model, or the weights of ``--gpt-ckpt``, and notes for the log.

    For a GPU the model is on the meta device, and its weights come one at a time, to ``fill`` it
    once it is sharded; on a CPU it has them, and they are None.

    The file must have learned codes of the same tokenizer. A class table for other classes, and
    special tokens that it lacks as LlamaGen's files do, are made anew; the notes say so.
    """
    grid = args.image_size // args.downsample_size
    n = resolve_parallelism(args.ar_token_num, args.spe_token_num, (grid, grid))
    pretrained = load_pretrained(args, grid, tokenizer_sha256)
    default = GPTConfig()
    if pretrained is not None and pretrained.config.ar_token_num == n:
        default = pretrained.config
    for field in VARIANTS:
        if getattr(args, field) is None:
            setattr(args, field, getattr(default, field))
    args.schedule = canonical(args.schedule, n, grid**2)
    args.order = canonical_layout(args.order, (grid, grid), n)
    config = GPTConfig(
        **GPT_models[args.gpt_model],
        vocab_size=args.vocab_size,
        num_classes=args.num_classes,
        grid_height=grid,
        grid_width=grid,
        ar_token_num=n,
        **{field: getattr(args, field) for field in VARIANTS},
        class_dropout_prob=args.class_dropout_prob,
        token_dropout_p=args.token_dropout_p,
        attn_dropout_p=args.attn_dropout_p,
        resid_dropout_p=args.dropout_p,
        ffn_dropout_p=args.dropout_p,
        drop_path_rate=args.drop_path_rate,
    )
    with torch.device("cpu" if device.type == "cpu" else "meta"):
        model = GPT(config)
    if device.type == "cpu":
        model.init_weights()
    state, notes = fitting_weights(args, config, pretrained)
    if device.type != "cpu":
        return model, initial_weights(model, state), notes
    model.load_state_dict(model.state_dict() | state)
    return model, None, notes


def initial_weights(model: GPT, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield name and value on the CPU of each parameter: of ``state``, else a new one."""
    for name, parameter in model.named_parameters():
        weight = state.get(name)
        if weight is None:
            weight = torch.empty(parameter.shape)
            model.init_weight(name, weight)
        yield name, weight


def load_pretrained(args: Namespace, grid: int, tokenizer_sha256: str | None) -> GPT | None:
    """Return the model of ``--gpt-ckpt``, None without; ``ValueError`` if it is of other codes."""
    if args.gpt_ckpt is None:
        return None
    pretrained, _, recorded = load_gpt(
        args.gpt_ckpt,
        grid=(grid, grid),
        gpt_model=args.gpt_model,
        vocab_size=args.vocab_size,
    )
    source, learned = f"--gpt-ckpt {args.gpt_ckpt}", recorded.get("tokenizer_sha256")
    if learned and tokenizer_sha256 and learned != tokenizer_sha256:
        raise ValueError(
            f"{source} learned codes of another tokenizer than those of --code-path "
            f"{args.code_path}; extract the codes again with its tokenizer"
        )
    return pretrained


def fitting_weights(
    args: Namespace, config: GPTConfig, pretrained: GPT | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights of ``--gpt-ckpt`` that fit ``config``, and notes; see ``make_model``."""
    if pretrained is None:
        return {}, []
    source = f"--gpt-ckpt {args.gpt_ckpt}"
    before, notes, state = pretrained.config, [], pretrained.state_dict()
    if before.ar_token_num not in (1, config.ar_token_num):
        resolve("--ar-token-num", args.ar_token_num, before.ar_token_num, source)
    elif before.ar_token_num != 1:
        for field in VARIANTS:
            option = f"--{field.replace('_', '-')}"
            resolve(option, getattr(args, field), getattr(before, field), source)
    if before.ar_token_num != config.ar_token_num:
        notes.append(f"{source} predicts one token at a time: special tokens start anew")
    if before.num_classes != config.num_classes:
        del state["cls_embedding.embedding_table.weight"]
        notes.append(
            f"{source} has {before.num_classes} classes, the codes have {config.num_classes}: the "
            "class table starts anew"
        )
    return state, notes


def check_options(args: Namespace, world: World) -> None:
    """Raise ``ValueError`` for options that exclude each other."""
    if args.attention == "flex" and args.attn_dropout_p > 0:
        raise ValueError(
            f"--attention flex has no dropout, but --attn-dropout-p is {args.attn_dropout_p}"
        )
    if args.attention in ("flex", "flash") and world.device.type != "cuda":
        raise ValueError(f"--attention {args.attention} trains on CUDA, not on {world.device.type}")
    if args.attention == "flash" and AUTOCAST_DTYPE[args.mixed_precision] is None:
        raise ValueError(
            f"--attention flash is of 16 bits, but --mixed-precision is {args.mixed_precision}"
        )
    if args.data_parallel == "ddp" and args.cpu_offload:
        raise ValueError("--cpu-offload needs --data-parallel fsdp, hsdp or sdp")
    if args.cpu_offload and world.device.type != "cuda":
        raise ValueError(
            f"--cpu-offload moves weights off a GPU, but this runs on {world.device.type}"
        )
    if args.data_parallel != "hsdp" and args.shard_size is not None:
        raise ValueError("--shard-size needs --data-parallel hsdp")


def parallelize(
    args: Namespace, model: GPT, world: World, weights: Iterable[tuple[str, Tensor]] | None
) -> nn.Module:
    """Place ``model`` on the devices as the options say, and return what to call for a loss.

    model, weights: see ``make_model``. ``--attention`` as ``choose_attention`` returns it.
    """
    on_cuda = world.device.type == "cuda"
    compiled = on_cuda if args.compile is None else args.compile
    torch.set_float32_matmul_precision("high" if args.mixed_precision == "tf32" else "highest")
    model.train()
    model.recompute_activations(args.activation_checkpointing)
    if args.attention == "flex":
        model.use_flex_attention(world.device)
    elif args.attention == "flash":
        model.block_mask = make_causal_mask(model.order.mask()).to(world.device)
    if compiled:
        for block in model.layers:
            block.compile()
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    grad_dtype = dtypes[args.grad_precision]
    if args.data_parallel == "ddp":
        if weights is not None:
            fill(model, weights, world.device)
        return replicate(world, model.to(world.device), grad_dtype)
    shard(
        world,
        model,
        model.layers,
        mode=args.data_parallel,
        precision=args.mixed_precision,
        grad_dtype=grad_dtype,
        shard_size=args.shard_size,
        cpu_offload=args.cpu_offload,
        forward_methods=("decode_step",),
    )
    if weights is not None:
        fill(model, weights, world.device, args.cpu_offload)
    return model


def fixed_options(args: Namespace, model: GPT, codes: Codes) -> dict[str, Any]:
    """Return what may not change between a run and its resumption."""
    fixed = ("epochs", "global_batch_size", "global_seed", "lr_schedule", "warmup_epochs")
    options = {k: getattr(args, k) for k in fixed} | {k: codes.meta.get(k) for k in CODES_FACTS}
    options["mix_weight"] = None if args.mix_code_path is None else args.mix_weight
    # published variants are not named: runs begun before there were others do not have them
    variant = variant_of(model.config)
    options["config"] = {
        k: v for k, v in asdict(model.config).items() if k not in VARIANTS or k in variant
    }
    return options | {"images": len(codes), "crops": codes.num_crops}


def log_header(
    logger: Logger,
    args: Namespace,
    world: World,
    model: GPT,
    codes: Codes,
    steps: int,
    ceiling: Ceiling,
) -> None:
    """Log once what is trained, and where that differs from the paper."""
    parameters = sum(p.numel() for p in model.parameters())
    logger.info(
        f"{args.gpt_model}: {parameters:,} parameters, n = {args.ar_token_num}, "
        f"{len(model.order.steps)} steps per image; {len(codes):,} "
        f"images x {codes.num_crops} crops; {steps:,} steps of {args.global_batch_size} on "
        f"{world.size} x {world.device}, {args.data_parallel}, {args.mixed_precision}"
    )
    logger.info(
        f"FLOP utilisation (MFU) is of {ceiling.flops / 1e12:.3g} TFLOP/s per process "
        f"({ceiling.source})"
    )
    if changed := differences(args):
        logger.info(f"recipe: {changed}")
    if args.warmup_epochs > args.epochs:
        logger.warning(
            f"--warmup-epochs {args.warmup_epochs} is longer than the run: --lr "
            f"{args.lr} is never reached"
        )


def main() -> None:
    """Open the data, make or load what is trained, resume, then the loop."""
    args = parse_args(__doc__)
    sharded = args.data_parallel != "ddp"
    world = init_distributed(alone=sharded)
    device = world.device
    precision, precision_note = world.broadcast(resolve_precision(args.mixed_precision, device))
    args.mixed_precision = precision
    micro_batch = split_batch(args.global_batch_size, world.size, args.gradient_accumulation_steps)
    stop = StopSignal(world)

    # data
    codes = open_training_codes(args, world)
    held_out, vq = open_held_out(args, codes, world), open_tokenizer(args, codes, world)
    batches = CodeBatches(codes, args.vocab_size, args.global_batch_size, args.global_seed)
    steps_per_epoch = batches.order.steps_per_epoch
    total_steps = args.epochs * steps_per_epoch
    warmup_steps = round(args.warmup_epochs * steps_per_epoch)

    # model, optimizer, and where an earlier run of the same command stopped
    check_options(args, world)
    torch.manual_seed(args.global_seed)
    model, weights, notes = make_model(args, codes.meta.get("tokenizer_sha256"), device)
    args.attention, kernel_note = world.broadcast(choose_attention(args, model, device))
    forward = parallelize(args, model, world, weights)
    state = make_training_state(model, args, world, args.ema, args.max_loss_spike)
    name = f"{args.gpt_model}-{args.ar_token_num}x-{args.image_size}"
    if variant := "-".join(variant_of(model.config).values()):  # a name of at most 255 bytes
        name += f"-{variant if len(variant) <= 60 else short_hash(variant)}"
    start = None if args.gpt_resume is None else require_folder(args.gpt_resume, "--gpt-resume")
    fixed = fixed_options(args, model, codes)
    run = TrainingRun(args, world, name, state, fixed, total_steps, start)
    facts = {"gpt_model": args.gpt_model, "config": asdict(model.config)}
    facts |= {k: codes.meta.get(k) for k in ("tokenizer_sha256", "classes")}

    logger = run.open(stop, ("loss", "grad_norm"), config=facts["config"])
    logger.log(log_level(precision, device), f"--mixed-precision {precision_note}")
    ceiling = Ceiling(device, precision)
    log_header(logger, args, world, model, codes, total_steps, ceiling)
    for note in (*notes, *([kernel_note] if kernel_note else [])):
        logger.info(note)
    steps = range(run.first_step, run.last_step)
    with run:
        for step, (x, y) in run.steps(prefetch(lambda s: batches.rank_slice(s, world), steps)):
            # ------------------------------------------------------------ one training step
            lr = learning_rate(step, args.lr, args.lr_schedule, total_steps, warmup_steps)
            state.set_learning_rate(lr)
            loss = torch.zeros((), device=device)
            micro_batches = zip(x.split(micro_batch), y.split(micro_batch), strict=True)
            for i, (x_micro, y_micro) in enumerate(micro_batches):
                x_micro = x_micro.to(device, non_blocking=True)  # (b, T)
                y_micro = y_micro.to(device, non_blocking=True)  # (b,)
                with delay_sync(forward, i + 1 < args.gradient_accumulation_steps):
                    with autocast(device, precision):
                        micro_loss, _ = forward(x_micro, y_micro)  # ()
                    micro_loss = micro_loss / args.gradient_accumulation_steps
                    state.scaler.scale(micro_loss).backward()
                loss += micro_loss.detach()
            loss = world.mean(loss)
            norm = state.gradient_norm()
            state.update(step, loss, norm, args.max_grad_norm)  # clip, skip if harmful, step, EMA
            # ------------------------------------------------------------------------------
            run.end_step(loss=loss, grad_norm=norm)
            if run.log_due:
                figures = run.read(lr)
                figures["tokens/s"] = figures["images/s"] * codes.num_tokens
                done = figures["images/s"] * model.flops_per_image()
                figures["mfu"] = ceiling.share(done / world.size)
                figures["epoch"] = run.done / steps_per_epoch
                run.log(LOG_LINE, figures)
            with run.paused():
                run.save_if_due(facts)
                if held_out is not None and run.due(args.val_every) and not run.stopping:
                    losses = validate(
                        forward, model, held_out, args.val_images, micro_batch, world, precision
                    )
                    run.log_more(losses)
                if vq and run.folder and run.due(args.sample_every) and not run.stopping:
                    picture = run.folder / "samples" / f"{run.done:07d}.png"
                    draw_samples(model, vq, picture, world, precision, sharded)
        run.finish(args.export)


if __name__ == "__main__":
    run_main(main)
