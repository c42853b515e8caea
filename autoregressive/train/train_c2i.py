"""Cached codes -> class-conditional GPT, on one process or many, replicated or sharded.

Rerunning the same command resumes from the newest checkpoint, at the very next step. SIGTERM and SIGUSR1 save and exit
within a step.
"""

from __future__ import annotations

import json
import logging
import sys
from argparse import BooleanOptionalAction, Namespace
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import nn

from autoregressive.models.gpt import GPT, GPT_models, GPTConfig
from autoregressive.models.load import load_gpt, resolve_parallelism
from autoregressive.train.recipe import Recipe, differences, make_recipe
from autoregressive.train.watch import draw_samples, validate
from dataset.codes import Codes, MixedCodes, open_codes
from dataset.epochs import EpochOrder
from tokenizer.vq_model import VQModel, load_vq
from utils.checkpoint import resolve, state_sha256
from utils.distributed import World, init_distributed
from utils.files import require_folder
from utils.logger import ScalarLog, create_logger, progress
from utils.options import add_retired, amount, fraction, make_parser, positive_int, run, write_options
from utils.parallel import DATA_PARALLEL, delay_sync, replicate, shard
from utils.performance import Window, peak_flops, peak_memory
from utils.precision import AUTOCAST_DTYPE, autocast, log_level, resolve_precision
from utils.run_folder import RunFolder
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
    prefetch,
    seed_step,
    split_batch,
)


def parse_args() -> Namespace:
    """Options; names and defaults of the published scripts, the paper's recipe where it has one."""
    parser = make_parser(
        __doc__,
        "bash scripts/autoregressive/train_c2i.sh --cloud-save-path DIR --code-path CODES "
        "--spe-token-num 3 --ar-token-num 4 --image-size 384 --gpt-model GPT-XL",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--code-path", required=True, help="folder of codes, from extract_codes_c2i.sh")
    data.add_argument("--mix-code-path", help="second set of codes of the same images, such as at another crop range")
    data.add_argument("--mix-weight", type=fraction, default=0.5, help="share of crops drawn from --mix-code-path")
    data.add_argument(
        "--image-size", type=positive_int, help="pixels the codes were made from (default: the codes', else 384)"
    )
    data.add_argument("--downsample-size", type=positive_int, help="pixels per code (default: the codes', else 16)")
    data.add_argument("--num-classes", type=positive_int, help="classes (default: the codes', else 1000)")
    data.add_argument("--vocab-size", type=positive_int, help="codebook size (default: the codes', else 16384)")
    model = parser.add_argument_group("model")
    model.add_argument("--gpt-model", choices=list(GPT_models), default="GPT-B", help="size")
    model.add_argument("--gpt-ckpt", help="weights to start from, released or exported; classes may differ")
    model.add_argument("--gpt-resume", help="go on from this checkpoint folder, if the run has none of its own yet")
    model.add_argument("--ar-token-num", type=positive_int, default=4, help="tokens predicted at once, n")
    model.add_argument("--spe-token-num", type=int, help="special tokens; n - 1, and nothing else")
    model.add_argument("--gpt-type", choices=["c2i"], default="c2i", help="class-conditional")
    model.add_argument("--cls-token-num", type=int, choices=[1], default=1, help="class tokens")
    model.add_argument("--dropout-p", type=fraction, help="after attention and feed-forward (recipe)")
    model.add_argument("--attn-dropout-p", type=fraction, help="on attention weights (recipe)")
    model.add_argument("--token-dropout-p", type=fraction, help="on input embeddings (recipe)")
    model.add_argument("--class-dropout-prob", type=fraction, help="label replaced by the null class (recipe)")
    model.add_argument("--drop-path-rate", type=fraction, default=0.0, help="stochastic depth at the last block")
    training = parser.add_argument_group("training (defaults marked recipe: see --recipe)")
    training.add_argument("--recipe", choices=["paper", "as-released"], default="paper", help="which defaults")
    training.add_argument("--epochs", type=positive_int, help="passes over the images, one crop each (recipe: 300)")
    training.add_argument("--global-batch-size", type=positive_int, help="images a step (recipe)")
    training.add_argument("--lr", type=amount, help="peak learning rate (recipe)")
    training.add_argument("--lr-schedule", choices=["constant", "cosine"], help="cosine ends at 0 (recipe)")
    training.add_argument("--warmup-epochs", type=amount, help="linear warm-up (recipe)")
    add_optimizer_options(parser)
    speed = parser.add_argument_group("processes, precision, memory")
    speed.add_argument(
        "--data-parallel",
        choices=DATA_PARALLEL,
        default="ddp",
        help="ddp: weights on every process; fsdp: sharded; hsdp: sharded within a machine; sdp: fsdp that keeps "
        "gathered weights for backward",
    )
    speed.add_argument("--shard-size", type=positive_int, help="processes that share weights under hsdp (a machine's)")
    speed.add_argument("--cpu-offload", action="store_true", help="sharded weights and optimizer in host memory")
    add_precision_option(speed, AUTOCAST_DTYPE)
    speed.add_argument(
        "--grad-precision", choices=["fp32", "fp16", "bf16"], default="fp32", help="gradients are summed over processes"
    )
    speed.add_argument(
        "--activation-checkpointing",
        choices=["none", "selective", "full"],
        default="none",
        help="compute activations again in backward to save memory",
    )
    speed.add_argument(
        "--attention",
        choices=["auto", "dense", "flex"],
        default="auto",
        help="auto: FlexAttention on compiled CUDA without attention dropout, which it lacks; else the dense mask",
    )
    speed.add_argument(
        "--compile", action=BooleanOptionalAction, help="torch.compile each block (default: on CUDA, not on the CPU)"
    )
    watch = parser.add_argument_group("watching")
    watch.add_argument("--val-code-path", help="codes of held-out images, for a validation loss")
    watch.add_argument("--val-every", type=positive_int, default=5000, help="steps")
    watch.add_argument("--val-images", type=positive_int, default=4096, help="held-out images, spread over the set")
    watch.add_argument("--vq-ckpt", help="the codes' tokenizer, to draw 16 samples now and then")
    watch.add_argument("--sample-every", type=positive_int, default=5000, help="steps between pictures")
    add_output_options(parser, "results")
    parser.add_argument(
        "--export",
        choices=["pt", "safetensors", "none"],
        default="pt",
        help="file of weights to write at the end, beside the checkpoints",
    )
    add_retired(
        parser,
        {
            "--dataset": (True, "what --code-path holds is read from its meta.json"),
            "--num-workers": (True, "codes are read from a memory map on a thread, without worker processes"),
        },
    )
    args = parser.parse_args()
    recipe = make_recipe(args.recipe, args.gpt_model)
    for field in fields(Recipe):
        if getattr(args, field.name) is None:
            setattr(args, field.name, getattr(recipe, field.name))
    return args


def describe_codes(args: Namespace, codes: Codes) -> None:
    """Set grid, classes and codebook size from the codes; what the user wrote must agree."""
    meta, source = codes.meta, f"--code-path {args.code_path}"
    if meta:
        args.image_size = resolve("--image-size", args.image_size, meta["image_size"], source)
        args.vocab_size = resolve("--vocab-size", args.vocab_size, meta["codebook_size"], source)
        args.num_classes = resolve("--num-classes", args.num_classes, len(meta["classes"]), source)
        downsample = meta["image_size"] // meta["grid"][0]
        args.downsample_size = resolve("--downsample-size", args.downsample_size, downsample, source)
    args.image_size = args.image_size or 384
    args.downsample_size = args.downsample_size or 16
    args.vocab_size = args.vocab_size or 16384
    args.num_classes = args.num_classes or 1000
    grid = args.image_size // args.downsample_size
    if grid**2 != codes.num_tokens:
        raise ValueError(
            f"{source} holds {codes.num_tokens} codes a crop, but --image-size {args.image_size} / "
            f"--downsample-size {args.downsample_size} makes {grid}x{grid}"
        )
    if codes.labels.max() >= args.num_classes:
        raise ValueError(f"{source} has label {codes.labels.max()}, but --num-classes is {args.num_classes}")


def make_model(args: Namespace, tokenizer_sha256: str | None) -> tuple[GPT, list[str]]:
    """A new model, or the weights of ``--gpt-ckpt``, which must have learned codes of the same tokenizer.

    What the file has for other classes, or lacks as LlamaGen's lack special tokens, is made anew; the notes say so.
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
    pretrained, _, facts = load_gpt(
        args.gpt_ckpt, (grid, grid), (grid, grid), args.gpt_model, None, None, args.vocab_size
    )
    learned = facts.get("tokenizer_sha256")
    if learned and tokenizer_sha256 and learned != tokenizer_sha256:
        raise ValueError(
            f"--gpt-ckpt {args.gpt_ckpt} learned codes of another tokenizer than those of --code-path "
            f"{args.code_path}; extract the codes again with its tokenizer"
        )
    before, notes, state = pretrained.config, [], pretrained.state_dict()
    if before.ar_token_num not in (1, config.ar_token_num):
        resolve("--ar-token-num", args.ar_token_num, before.ar_token_num, f"--gpt-ckpt {args.gpt_ckpt}")
    if before.ar_token_num != config.ar_token_num:
        notes.append(f"--gpt-ckpt {args.gpt_ckpt} predicts one token at a time: special tokens start anew")
    if before.num_classes != config.num_classes:
        del state["cls_embedding.embedding_table.weight"]
        notes.append(
            f"--gpt-ckpt {args.gpt_ckpt} has {before.num_classes} classes, the codes have {config.num_classes}: the "
            f"class table starts anew"
        )
    model.load_state_dict(model.state_dict() | state)
    return model, notes


def spread(args: Namespace, model: GPT, world: World) -> nn.Module:
    """Place ``model`` on the devices as the options say; returns what is to be called for a loss."""
    compiled = world.device.type == "cuda" if args.compile is None else args.compile
    if args.attention == "flex" and args.attn_dropout_p > 0:
        raise ValueError(f"--attention flex has no dropout, but --attn-dropout-p is {args.attn_dropout_p}")
    if args.attention == "flex" and world.device.type != "cuda":
        raise ValueError(f"--attention flex trains on CUDA, not on {world.device.type}")
    if args.data_parallel == "ddp" and args.cpu_offload:
        raise ValueError("--cpu-offload needs --data-parallel fsdp, hsdp or sdp")
    if args.cpu_offload and world.device.type != "cuda":
        raise ValueError(f"--cpu-offload moves weights off a GPU, but this runs on {world.device.type}")
    if args.data_parallel != "hsdp" and args.shard_size is not None:
        raise ValueError("--shard-size needs --data-parallel hsdp")
    torch.set_float32_matmul_precision("high" if args.mixed_precision == "tf32" else "highest")
    model.train()
    model.recompute_activations(args.activation_checkpointing)
    automatic = args.attention == "auto" and compiled and world.device.type == "cuda" and args.attn_dropout_p == 0
    if args.attention == "flex" or automatic:
        model.use_flex_attention(world.device)
    if compiled:
        for block in model.layers:
            block.compile()
    grad_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.grad_precision]
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


def open_held_out(args: Namespace, codes: Codes, world: World) -> Codes | None:
    """The codes of ``--val-code-path``, of the same kind as those to train on."""
    if args.val_code_path is None:
        return None
    held_out = open_codes(args.val_code_path, "--val-code-path")
    for what in ("tokenizer_sha256", "grid", "classes", "image_size"):
        if codes.meta and held_out.meta and codes.meta[what] != held_out.meta[what]:
            raise ValueError(f"--val-code-path {args.val_code_path}: its {what} differs from that of --code-path")
    if held_out.num_tokens != codes.num_tokens:
        raise ValueError(f"--val-code-path holds {held_out.num_tokens} codes a crop, --code-path {codes.num_tokens}")
    if held_out.labels.max() >= args.num_classes:
        raise ValueError(f"--val-code-path has label {held_out.labels.max()}, but --num-classes is {args.num_classes}")
    if min(args.val_images, len(held_out)) < world.size:
        raise ValueError(f"--val-images {args.val_images}: take at least one for each of the {world.size} processes")
    return held_out


def open_tokenizer(args: Namespace, codes: Codes, world: World) -> VQModel | None:
    """The tokenizer of ``--vq-ckpt``, which must be the one that made the codes."""
    if args.vq_ckpt is None:
        return None
    vq, _ = load_vq(args.vq_ckpt, None)
    made_by = codes.meta.get("tokenizer_sha256")
    if made_by is not None and made_by != state_sha256(vq.weights()):
        raise ValueError(f"--vq-ckpt {args.vq_ckpt} is not the tokenizer that made --code-path {args.code_path}")
    return vq.to(world.device)


class CodeBatches:
    """Batches of (codes, labels): which image and which crop is a function of (seed, step), never of the past."""

    def __init__(self, codes: Codes, vocab_size: int, batch: int, seed: int):
        self.codes, self.vocab_size, self.seed = codes, vocab_size, seed
        self.order = EpochOrder(len(codes), batch, seed)

    def rank_slice(self, step: int, world: World) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's part of global batch ``step``: codes (b, T) int64 raster order, labels (b,) int64, pinned."""
        _, images = self.order.indices(step)  # (B,)
        rng = np.random.default_rng([self.seed, step, 1])
        crops = rng.choice(self.codes.num_crops, size=len(images), p=self.codes.crop_weights)  # (B,)
        each = len(images) // world.size
        mine = slice(world.rank * each, (world.rank + 1) * each)
        codes, labels = self.codes.batch(images[mine], crops[mine])  # (b, T), (b,)
        if codes.max() >= self.vocab_size:
            worst = images[mine][codes.max(1).argmax()]
            raise ValueError(
                f"--code-path: image {worst} holds code {codes.max()}, but --vocab-size is {self.vocab_size}"
            )
        batch = torch.from_numpy(codes), torch.from_numpy(labels)
        return tuple(x.pin_memory() for x in batch) if world.device.type == "cuda" else batch


# facts of the codes that a run keeps, as they are in meta.json
CODES_FACTS = ("tokenizer_sha256", "source_sha256", "crop_range")
LOG_LINE = (
    "(epoch {epoch:.2f}): loss {loss:.4f}, grad norm {grad_norm:.3f}, lr {lr:.2e}, {images/s:.4g} images/s, "
    "{tokens/s:.4g} tokens/s, MFU {mfu:.1%}, peak {memory_gib:.2f} GiB, {skipped} skipped"
)


@dataclass
class Run:
    """Everything a training run is made of, ready for its loop."""

    args: Namespace
    world: World
    codes: Codes
    held_out: Codes | None
    vq: VQModel | None
    model: GPT
    forward: nn.Module
    state: TrainingState
    batches: CodeBatches
    steps_per_epoch: int
    facts: dict  # what a checkpoint says of the run
    folder: RunFolder
    first_step: int
    last_step: int
    notes: list[str]


def build(args: Namespace, world: World) -> Run:
    """Check the options, make or load everything, resume; writes nothing."""
    codes = open_codes(args.code_path)
    if args.mix_code_path is not None:
        codes = MixedCodes(codes, open_codes(args.mix_code_path, "--mix-code-path"), args.mix_weight)
    describe_codes(args, codes)
    held_out, vq = open_held_out(args, codes, world), open_tokenizer(args, codes, world)
    batches = CodeBatches(codes, args.vocab_size, args.global_batch_size, args.global_seed)
    steps_per_epoch = batches.order.steps_per_epoch
    total_steps = args.epochs * steps_per_epoch

    torch.manual_seed(args.global_seed)
    model, notes = make_model(args, codes.meta.get("tokenizer_sha256"))
    forward = spread(args, model, world)
    optimizer = make_adamw(model, args.lr, args.weight_decay, (args.beta1, args.beta2))
    scaler = torch.amp.GradScaler(world.device.type, enabled=args.mixed_precision == "fp16")
    ema = Ema(model, args.ema_decay) if args.ema else None
    guard = Guard(world.device, args.max_loss_spike, args.max_skipped_steps)
    state = TrainingState(model, optimizer, scaler, ema, guard)

    fixed = ("epochs", "global_batch_size", "global_seed", "lr_schedule", "warmup_epochs")
    same = {k: getattr(args, k) for k in fixed} | {k: codes.meta.get(k) for k in CODES_FACTS}
    same |= {"mix_weight": args.mix_weight if args.mix_code_path is not None else None}
    same |= {"config": asdict(model.config), "images": len(codes), "crops": codes.num_crops}
    facts = dict(gpt_model=args.gpt_model, config=asdict(model.config), run=json.loads(json.dumps(same)))
    facts |= {k: codes.meta.get(k) for k in ("tokenizer_sha256", "classes")}
    name = f"{args.gpt_model}-{args.ar_token_num}x-{args.image_size}"
    places = (args.results_dir, args.cloud_save_path, args.no_local_save, args.keep_last, args.keep_every)
    folder = RunFolder.of(world, name, *places)
    start = None if args.gpt_resume is None else require_folder(args.gpt_resume, "--gpt-resume")
    first_step = folder.resume(state, facts["run"], start)
    last_step = min(first_step + 2, total_steps) if args.dry_run else total_steps
    return Run(
        args, world, codes, held_out, vq, model, forward, state, batches, steps_per_epoch,
        facts, folder, first_step, last_step, notes + folder.notes,
    )  # fmt: skip


def introduce(r: Run, logger: logging.Logger, peak: tuple[float, str]) -> None:
    """Say once what runs, where it differs from the paper, and where it stands."""
    args, parameters = r.args, sum(p.numel() for p in r.model.parameters())
    total_steps = args.epochs * r.steps_per_epoch
    logger.info(
        f"{args.gpt_model}: {parameters:,} parameters, n = {args.ar_token_num}; {len(r.codes):,} images x "
        f"{r.codes.num_crops} crops; {total_steps:,} steps of {args.global_batch_size} on {r.world.size} x "
        f"{r.world.device}, {args.data_parallel}, {args.mixed_precision}"
    )
    logger.info(f"FLOP utilisation (MFU) is of {peak[0] / 1e12:.3g} TFLOP/s a process ({peak[1]})")
    if changed := differences(args):
        logger.info(f"recipe: {changed}")
    if args.warmup_epochs > args.epochs:
        logger.warning(f"--warmup-epochs {args.warmup_epochs} is longer than the run: --lr {args.lr} is never reached")
    for note in r.notes:
        logger.info(note)
    where = r.folder.folder
    logger.info(f"{where}: resumed at step {r.first_step}" if r.first_step else f"{where}: new run")


def main() -> None:
    """Build or resume, then the loop."""
    args = parse_args()
    sharded = args.data_parallel != "ddp"
    world = init_distributed(alone=sharded)
    device = world.device
    precision, reason = world.broadcast(resolve_precision(args.mixed_precision, device))
    args.mixed_precision = precision
    micro_batch = split_batch(args.global_batch_size, world.size, args.gradient_accumulation_steps)
    stop = StopSignal(world)
    r = build(args, world)
    model, state, forward = r.model, r.state, r.forward
    folder = None if args.dry_run else r.folder.folder
    if folder is not None:
        r.folder.make()
    logger = create_logger(world, folder)
    curves = ScalarLog(world, folder, None if args.no_wandb else args.wandb_project, vars(args))
    if world.is_main and folder is not None:
        write_options(folder / "options.json", args, config=asdict(model.config), steps=args.epochs * r.steps_per_epoch)
    logger.log(log_level(precision, device), f"--mixed-precision {reason}")
    peak = peak_flops(device, precision)
    r.notes += curves.notes
    introduce(r, logger, peak)

    bar = progress(world, "training", r.last_step, r.first_step, "steps")
    window = Window(("loss", "grad_norm"), device)
    total_steps, warmup_steps = args.epochs * r.steps_per_epoch, round(args.warmup_epochs * r.steps_per_epoch)
    stopping, seconds = False, 0.0
    for step, (x, y) in prefetch(lambda s: r.batches.rank_slice(s, world), range(r.first_step, r.last_step)):
        # ---------------------------------------------------------------- one training step
        stop.ask()
        seed_step(args.global_seed, step, world.rank)
        lr = learning_rate(step, args.lr, args.lr_schedule, total_steps, warmup_steps)
        state.set_learning_rate(lr)
        loss = torch.zeros((), device=device)
        for i, (x_micro, y_micro) in enumerate(zip(x.split(micro_batch), y.split(micro_batch), strict=True)):
            x_micro, y_micro = x_micro.to(device, non_blocking=True), y_micro.to(device, non_blocking=True)
            with delay_sync(forward, i + 1 < args.gradient_accumulation_steps):
                with autocast(device, precision):
                    micro_loss, _ = forward(x_micro, y_micro)  # ()
                micro_loss = micro_loss / args.gradient_accumulation_steps
                state.scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        loss = world.mean(loss)
        norm = state.gradient_norm()
        state.update(step, loss, norm, args.max_grad_norm)  # clip, skip if harmful, step, EMA
        # ---------------------------------------------------------------------------------
        done, stopping = step + 1, stop.agreed()
        last = done == r.last_step or stopping
        window.add(loss, norm)
        bar.update()
        if done % args.log_every == 0 or last or args.dry_run:
            figures = window.read(args.global_batch_size)
            seconds = figures.pop("seconds/step")
            figures |= {"lr": lr, "skipped": state.guard.skipped}
            figures["tokens/s"] = figures["images/s"] * r.codes.num_tokens
            figures["mfu"] = figures["images/s"] * model.flops_per_image() / (peak[0] * world.size)
            figures["memory_gib"] = peak_memory(device) / 2**30
            figures["epoch"] = done / r.steps_per_epoch
            left = timedelta(seconds=round(seconds * (total_steps - done)))
            logger.info(f"step {done} {LOG_LINE.format(**figures)}, {left} left")
            curves.write(done, figures)
            state.guard.check(done, lr, last)
        with window.paused():
            if folder is not None and (done % args.ckpt_every == 0 or last) and state.guard.sound:
                r.folder.save(done, state, r.facts)
            if r.held_out is not None and (done % args.val_every == 0 or last) and not stopping:
                figures = validate(forward, model, r.held_out, args.val_images, micro_batch, world, precision)
                logger.info(f"step {done}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
                curves.write(done, figures)
            if folder is not None and r.vq is not None and (done % args.sample_every == 0 or last) and not stopping:
                picture = folder / "samples" / f"{done:07d}.png"
                draw_samples(model, r.vq, picture, world, precision, sharded)
        if stopping:
            break
    bar.close()
    curves.close()
    if args.dry_run:
        r.folder.forecast(state, total_steps - r.first_step, seconds, logger)
    else:
        r.folder.finish(r.last_step, stopping, args.export, logger)


if __name__ == "__main__":
    run(main)
