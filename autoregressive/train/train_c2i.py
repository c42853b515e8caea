"""Cached codes -> class-conditional GPT, on one process or many, replicated or sharded.

Rerunning the same command resumes from the newest checkpoint, at the very next step. SIGTERM,
SIGUSR1 and Ctrl-C save and exit within a step.
"""

from __future__ import annotations

import logging
import sys
from argparse import BooleanOptionalAction, Namespace
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from autoregressive.models.gpt import GPT, GPT_models, GPTConfig
from autoregressive.models.load import load_gpt, resolve_parallelism
from autoregressive.train.data import (
    CodeBatches,
    open_held_out,
    open_tokenizer,
    open_training_codes,
)
from autoregressive.train.recipe import Recipe, differences, make_recipe
from autoregressive.train.watch import draw_samples, validate
from dataset.codes import Codes
from utils.distributed import World, init_distributed
from utils.files import require_folder
from utils.options import (
    add_retired,
    fraction,
    make_parser,
    non_negative_float,
    positive_int,
    resolve,
    run_main,
)
from utils.parallel import DATA_PARALLEL, delay_sync, replicate, shard
from utils.performance import peak_flops
from utils.precision import AUTOCAST_DTYPE, autocast, log_level, resolve_precision
from utils.training.options import (
    add_optimizer_options,
    add_output_options,
    add_precision_option,
    split_batch,
)
from utils.training.run import TrainingRun, prefetch
from utils.training.state import learning_rate, make_training_state
from utils.training.stop_signal import StopSignal

CODES_FACTS = ("tokenizer_sha256", "source_sha256", "crop_range")  # of meta.json; a run keeps them
LOG_LINE = (
    " (epoch {epoch:.2f}): loss {loss:.4f}, grad norm {grad_norm:.3f}, lr {lr:.2e}, {images/s:.4g} "
    "images/s, {tokens/s:.4g} tokens/s, MFU {mfu:.1%}, peak {memory_gib:.2f} GiB, {skipped} skipped"
)


def parse_args() -> Namespace:
    """Parse the options: published names and defaults, and the paper's recipe where it has one."""
    parser = make_parser(
        __doc__,
        "bash scripts/autoregressive/train_c2i.sh --cloud-save-path DIR --code-path CODES "
        "--spe-token-num 3 --ar-token-num 4 --image-size 384 --gpt-model GPT-XL",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--code-path", required=True, help="folder of codes made by extract_codes_c2i.sh"
    )
    data.add_argument(
        "--mix-code-path",
        help="second folder of codes of the same images, for instance with another crop range",
    )
    data.add_argument(
        "--mix-weight", type=fraction, default=0.5, help="share of crops drawn from --mix-code-path"
    )
    data.add_argument(
        "--image-size",
        type=positive_int,
        help="side of the images that the codes were made from, pixels "
        "(default: the codes', else 384)",
    )
    data.add_argument(
        "--downsample-size",
        type=positive_int,
        help="pixels per code (default: the codes', else 16)",
    )
    data.add_argument(
        "--num-classes",
        type=positive_int,
        help="number of classes (default: the codes', else 1000)",
    )
    data.add_argument(
        "--vocab-size", type=positive_int, help="codebook entries (default: the codes', else 16384)"
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--gpt-model", choices=list(GPT_models), default="GPT-B", help="size of the GPT"
    )
    model.add_argument(
        "--gpt-ckpt",
        help="file of weights to start from, released or exported; its classes may differ",
    )
    model.add_argument(
        "--gpt-resume", help="checkpoint folder to resume from if the run has no checkpoint yet"
    )
    model.add_argument(
        "--ar-token-num", type=positive_int, default=4, help="n, tokens predicted per step"
    )
    model.add_argument(
        "--spe-token-num",
        type=int,
        help="number of special tokens: --ar-token-num minus 1, as in published command lines",
    )
    model.add_argument(
        "--dropout-p", type=fraction, help="dropout after attention and feed-forward (recipe)"
    )
    model.add_argument(
        "--attn-dropout-p", type=fraction, help="dropout of attention weights (recipe)"
    )
    model.add_argument(
        "--token-dropout-p", type=fraction, help="dropout of input embeddings (recipe)"
    )
    model.add_argument(
        "--class-dropout-prob",
        type=fraction,
        help="share of labels replaced by the null class (recipe)",
    )
    model.add_argument(
        "--drop-path-rate",
        type=fraction,
        default=0.0,
        help="stochastic depth: probability of skipping the last block; earlier blocks have less",
    )
    training = parser.add_argument_group("training (defaults marked recipe: see --recipe)")
    training.add_argument(
        "--recipe",
        choices=["paper", "as-released"],
        default="paper",
        help="set of defaults: the paper's, or those of the published code",
    )
    training.add_argument(
        "--epochs", type=positive_int, help="passes over the images, one crop each (recipe: 300)"
    )
    training.add_argument(
        "--global-batch-size", type=positive_int, help="images per step, of all processes (recipe)"
    )
    training.add_argument("--lr", type=non_negative_float, help="peak learning rate (recipe)")
    training.add_argument(
        "--lr-schedule",
        choices=["constant", "cosine"],
        help="learning rate after the warm-up; cosine ends at 0 (recipe)",
    )
    training.add_argument(
        "--warmup-epochs", type=non_negative_float, help="epochs of linear warm-up (recipe)"
    )
    add_optimizer_options(parser)
    speed = parser.add_argument_group("processes, precision, memory")
    speed.add_argument(
        "--data-parallel",
        choices=DATA_PARALLEL,
        default="ddp",
        help="ddp: all weights on every process; fsdp: weights sharded over the processes; hsdp: "
        "sharded within a machine, replicated across machines; sdp: as fsdp, but gathered "
        "weights are kept for backward",
    )
    speed.add_argument(
        "--shard-size",
        type=positive_int,
        help="processes per shard group of hsdp (default: those of one machine)",
    )
    speed.add_argument(
        "--cpu-offload",
        action="store_true",
        help="keep sharded weights and the optimizer in host memory",
    )
    add_precision_option(speed, AUTOCAST_DTYPE)
    speed.add_argument(
        "--grad-precision",
        choices=["fp32", "fp16", "bf16"],
        default="fp32",
        help="data type in which gradients are summed over processes",
    )
    speed.add_argument(
        "--activation-checkpointing",
        choices=["none", "selective", "full"],
        default="none",
        help="save memory by computing activations again in backward: all of a block, or all but "
        "matrix products and attention (selective)",
    )
    speed.add_argument(
        "--attention",
        choices=["auto", "dense", "flex"],
        default="auto",
        help="attention in training. dense: with a dense mask; flex: FlexAttention, which "
        "skips masked keys but needs CUDA and no attention dropout; auto: flex where possible "
        "and compiled, else dense",
    )
    speed.add_argument(
        "--compile",
        action=BooleanOptionalAction,
        help="torch.compile each block (default: on CUDA only)",
    )
    watch = parser.add_argument_group("validation and pictures")
    watch.add_argument(
        "--val-code-path", help="folder of codes of held-out images, for a validation loss"
    )
    watch.add_argument(
        "--val-every", type=positive_int, default=5000, help="steps between validations"
    )
    watch.add_argument(
        "--val-images",
        type=positive_int,
        default=4096,
        help="number of held-out images, spread over the set",
    )
    watch.add_argument(
        "--vq-ckpt",
        help="the codes' tokenizer: writes a picture of 16 samples every --sample-every steps",
    )
    watch.add_argument(
        "--sample-every", type=positive_int, default=5000, help="steps between pictures"
    )
    output = add_output_options(parser, "results")
    output.add_argument(
        "--export",
        choices=["pt", "safetensors", "none"],
        default="pt",
        help="format of the file of weights written beside the checkpoints at the end",
    )
    add_retired(
        parser,
        {
            "--dataset": (True, "what --code-path holds is read from its meta.json"),
            "--gpt-type": (True, "every model here is class-conditional (c2i)"),
            "--cls-token-num": (True, "every model here has one class token"),
            "--no-wandb": (False, "curves go to Weights & Biases only with --wandb-project"),
            "--num-workers": (
                True,
                "codes are read from a memory map on a thread, without worker processes",
            ),
        },
    )
    args = parser.parse_args()
    recipe = make_recipe(args.recipe, args.gpt_model)
    for field in fields(Recipe):
        if getattr(args, field.name) is None:
            setattr(args, field.name, getattr(recipe, field.name))
    return args


def make_model(args: Namespace, tokenizer_sha256: str | None) -> tuple[GPT, list[str]]:
    """Return a new model, or the weights of ``--gpt-ckpt``, and notes for the log.

    The file must have learned codes of the same tokenizer. A class table for other classes, and
    special tokens that it lacks as LlamaGen's files do, are made anew; the notes say so.
    """
    grid = args.image_size // args.downsample_size
    config = GPTConfig(
        **GPT_models[args.gpt_model],
        vocab_size=args.vocab_size,
        num_classes=args.num_classes,
        grid_height=grid,
        grid_width=grid,
        ar_token_num=resolve_parallelism(args.ar_token_num, args.spe_token_num, (grid, grid)),
        class_dropout_prob=args.class_dropout_prob,
        token_dropout_p=args.token_dropout_p,
        attn_dropout_p=args.attn_dropout_p,
        resid_dropout_p=args.dropout_p,
        ffn_dropout_p=args.dropout_p,
        drop_path_rate=args.drop_path_rate,
    )
    model = GPT(config)
    model.init_weights()
    if args.gpt_ckpt is None:
        return model, []
    pretrained, _, recorded = load_gpt(
        args.gpt_ckpt, (grid, grid), (grid, grid), args.gpt_model, None, None, args.vocab_size
    )
    learned = recorded.get("tokenizer_sha256")
    if learned and tokenizer_sha256 and learned != tokenizer_sha256:
        raise ValueError(
            f"--gpt-ckpt {args.gpt_ckpt} learned codes of another tokenizer than those of "
            f"--code-path {args.code_path}; extract the codes again with its tokenizer"
        )
    before, notes, state = pretrained.config, [], pretrained.state_dict()
    if before.ar_token_num not in (1, config.ar_token_num):
        resolve(
            "--ar-token-num", args.ar_token_num, before.ar_token_num, f"--gpt-ckpt {args.gpt_ckpt}"
        )
    if before.ar_token_num != config.ar_token_num:
        notes.append(
            f"--gpt-ckpt {args.gpt_ckpt} predicts one token at a time: special tokens start anew"
        )
    if before.num_classes != config.num_classes:
        del state["cls_embedding.embedding_table.weight"]
        notes.append(
            f"--gpt-ckpt {args.gpt_ckpt} has {before.num_classes} classes, the codes have "
            f"{config.num_classes}: the class table starts anew"
        )
    model.load_state_dict(model.state_dict() | state)
    return model, notes


def check_options(args: Namespace, world: World) -> None:
    """Raise ``ValueError`` for options that exclude each other."""
    if args.attention == "flex" and args.attn_dropout_p > 0:
        raise ValueError(
            f"--attention flex has no dropout, but --attn-dropout-p is {args.attn_dropout_p}"
        )
    if args.attention == "flex" and world.device.type != "cuda":
        raise ValueError(f"--attention flex trains on CUDA, not on {world.device.type}")
    if args.data_parallel == "ddp" and args.cpu_offload:
        raise ValueError("--cpu-offload needs --data-parallel fsdp, hsdp or sdp")
    if args.cpu_offload and world.device.type != "cuda":
        raise ValueError(
            f"--cpu-offload moves weights off a GPU, but this runs on {world.device.type}"
        )
    if args.data_parallel != "hsdp" and args.shard_size is not None:
        raise ValueError("--shard-size needs --data-parallel hsdp")


def parallelize(args: Namespace, model: GPT, world: World) -> nn.Module:
    """Place ``model`` on the devices as the options say, and return what to call for a loss."""
    compiled = world.device.type == "cuda" if args.compile is None else args.compile
    torch.set_float32_matmul_precision("high" if args.mixed_precision == "tf32" else "highest")
    model.train()
    model.recompute_activations(args.activation_checkpointing)
    automatic = (
        args.attention == "auto"
        and compiled
        and world.device.type == "cuda"
        and args.attn_dropout_p == 0
    )
    if args.attention == "flex" or automatic:
        model.use_flex_attention(world.device)
    if compiled:
        for block in model.layers:
            block.compile()
    grad_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
        args.grad_precision
    ]
    if args.data_parallel == "ddp":
        return replicate(world, model.to(world.device), grad_dtype)
    return shard(
        world,
        model,
        model.layers,
        args.data_parallel,
        args.mixed_precision,
        grad_dtype,
        args.shard_size,
        args.cpu_offload,
        forward_methods=("decode_step",),
    )


def fixed_options(args: Namespace, model: GPT, codes: Codes) -> dict[str, Any]:
    """Return what may not change between a run and its resumption."""
    fixed = ("epochs", "global_batch_size", "global_seed", "lr_schedule", "warmup_epochs")
    options = {k: getattr(args, k) for k in fixed} | {k: codes.meta.get(k) for k in CODES_FACTS}
    options["mix_weight"] = None if args.mix_code_path is None else args.mix_weight
    return options | {
        "config": asdict(model.config),
        "images": len(codes),
        "crops": codes.num_crops,
    }


def log_header(
    logger: logging.Logger,
    args: Namespace,
    world: World,
    model: GPT,
    codes: Codes,
    total_steps: int,
    ceiling: str,
) -> None:
    """Log once what is trained, and where that differs from the paper."""
    parameters = sum(p.numel() for p in model.parameters())
    logger.info(
        f"{args.gpt_model}: {parameters:,} parameters, n = {args.ar_token_num}; {len(codes):,} "
        f"images x {codes.num_crops} crops; {total_steps:,} steps of {args.global_batch_size} on "
        f"{world.size} x {world.device}, {args.data_parallel}, {args.mixed_precision}"
    )
    logger.info(ceiling)
    if changed := differences(args):
        logger.info(f"recipe: {changed}")
    if args.warmup_epochs > args.epochs:
        logger.warning(
            f"--warmup-epochs {args.warmup_epochs} is longer than the run: --lr "
            f"{args.lr} is never reached"
        )


def main() -> None:
    """Open the data, make or load what is trained, resume, then the loop."""
    args = parse_args()
    sharded = args.data_parallel != "ddp"
    world = init_distributed(alone=sharded)
    device = world.device
    precision, precision_note = world.broadcast(resolve_precision(args.mixed_precision, device))
    args.mixed_precision = precision
    micro_batch = split_batch(args.global_batch_size, world.size, args.gradient_accumulation_steps)
    stop = StopSignal(world)

    # data
    codes = open_training_codes(args)
    held_out, vq = open_held_out(args, codes, world), open_tokenizer(args, codes, world)
    batches = CodeBatches(codes, args.vocab_size, args.global_batch_size, args.global_seed)
    steps_per_epoch = batches.order.steps_per_epoch
    total_steps, warmup_steps = (
        args.epochs * steps_per_epoch,
        round(args.warmup_epochs * steps_per_epoch),
    )

    # model, optimizer, and where an earlier run of the same command stopped
    check_options(args, world)
    torch.manual_seed(args.global_seed)
    model, notes = make_model(args, codes.meta.get("tokenizer_sha256"))
    forward = parallelize(args, model, world)
    state = make_training_state(model, args, world, args.ema, args.max_loss_spike)
    name = f"{args.gpt_model}-{args.ar_token_num}x-{args.image_size}"
    start = None if args.gpt_resume is None else require_folder(args.gpt_resume, "--gpt-resume")
    run = TrainingRun(
        args, world, name, state, fixed_options(args, model, codes), total_steps, start
    )
    facts = {"gpt_model": args.gpt_model, "config": asdict(model.config)}
    facts |= {k: codes.meta.get(k) for k in ("tokenizer_sha256", "classes")}

    logger = run.open(stop, ("loss", "grad_norm"), config=facts["config"])
    logger.log(log_level(precision, device), f"--mixed-precision {precision_note}")
    peak, peak_source = peak_flops(device, precision)
    ceiling = f"FLOP utilisation (MFU) is of {peak / 1e12:.3g} TFLOP/s per process ({peak_source})"
    log_header(logger, args, world, model, codes, total_steps, ceiling)
    for note in notes:
        logger.info(note)
    steps = range(run.first_step, run.last_step)
    with run:
        for step, (x, y) in run.steps(prefetch(lambda s: batches.rank_slice(s, world), steps)):
            # ------------------------------------------------------------ one training step
            lr = learning_rate(step, args.lr, args.lr_schedule, total_steps, warmup_steps)
            state.set_learning_rate(lr)
            loss = torch.zeros((), device=device)
            for i, (x_micro, y_micro) in enumerate(
                zip(x.split(micro_batch), y.split(micro_batch), strict=True)
            ):
                x_micro, y_micro = (
                    x_micro.to(device, non_blocking=True),
                    y_micro.to(device, non_blocking=True),
                )
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
                figures["mfu"] = figures["images/s"] * model.flops_per_image() / (peak * world.size)
                figures["epoch"] = run.done / steps_per_epoch
                run.log(LOG_LINE, figures)
            with run.paused():
                run.save_if_due(facts)
                if held_out is not None and run.due(args.val_every) and not run.stopping:
                    run.log_more(
                        validate(
                            forward, model, held_out, args.val_images, micro_batch, world, precision
                        )
                    )
                if (
                    vq is not None
                    and run.folder
                    and run.due(args.sample_every)
                    and not run.stopping
                ):
                    picture = run.folder / "samples" / f"{run.done:07d}.png"
                    draw_samples(model, vq, picture, world, precision, sharded)
        run.finish(args.export)


if __name__ == "__main__":
    run_main(main)
