"""Cached codes -> class-conditional GPT, data-parallel.

Rerunning the same command resumes from the newest checkpoint, at the very next step.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from timm.scheduler import CosineLRScheduler

from autoregressive.models.gpt import GPT, GPT_models, GPTConfig, load_gpt
from autoregressive.models.region_order import resolve_parallelism
from autoregressive.train.recipe import Recipe, make_recipe
from dataset.codes import Codes, MixedCodes, open_codes
from dataset.epochs import EpochOrder
from utils.checkpoint import resolve
from utils.distributed import autocast, init_distributed
from utils.logger import create_logger, progress
from utils.options import add_retired, amount, count, fraction, make_parser, positive_int, run, write_options
from utils.training import Ema, RunFolder, TrainingState, check_finite, make_adamw, seed_step, split_batch


def parse_args() -> Namespace:
    """Options; names and defaults of the published script, the paper's recipe where it has one."""
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
    model.add_argument("--gpt-ckpt", help="start from these weights")
    model.add_argument("--ar-token-num", type=positive_int, default=4, help="tokens predicted at once, n")
    model.add_argument("--spe-token-num", type=int, help="special tokens; n - 1, and nothing else")
    model.add_argument("--gpt-type", choices=["c2i"], default="c2i", help="class-conditional")
    model.add_argument("--cls-token-num", type=int, choices=[1], default=1, help="class tokens")
    model.add_argument("--dropout-p", type=fraction, default=0.1, help="after attention and feed-forward")
    model.add_argument("--attn-dropout-p", type=fraction, help="on attention weights (default: the recipe's)")
    model.add_argument("--token-dropout-p", type=fraction, default=0.1, help="on input embeddings")
    model.add_argument("--class-dropout-prob", type=fraction, default=0.1, help="label replaced by the null class")
    model.add_argument("--drop-path-rate", type=fraction, default=0.0, help="stochastic depth at the last block")
    training = parser.add_argument_group("training (defaults marked recipe: see --recipe)")
    training.add_argument("--recipe", choices=["paper", "as-released"], default="paper", help="which defaults")
    training.add_argument("--epochs", type=positive_int, default=300, help="passes over the images, one crop each")
    training.add_argument("--global-batch-size", type=positive_int, help="images a step (recipe)")
    training.add_argument("--gradient-accumulation-steps", type=positive_int, default=1, help="micro-batches a step")
    training.add_argument("--lr", type=amount, help="peak learning rate (recipe)")
    training.add_argument("--lr-schedule", choices=["constant", "cosine"], help="cosine ends at 0 (recipe)")
    training.add_argument("--warmup-epochs", type=amount, help="linear warm-up (recipe)")
    training.add_argument("--weight-decay", type=amount, default=0.05, help="AdamW, matrices only")
    training.add_argument("--beta1", type=fraction, default=0.9, help="AdamW")
    training.add_argument("--beta2", type=fraction, default=0.95, help="AdamW")
    training.add_argument("--max-grad-norm", type=amount, default=1.0, help="clip gradients to this norm; 0: never")
    training.add_argument("--mixed-precision", choices=["none", "fp16", "bf16"], default="bf16", help="autocast")
    training.add_argument("--ema", action="store_true", help="keep a moving average of the weights as well")
    training.add_argument("--no-compile", action="store_true", help="no torch.compile (never used on the CPU)")
    training.add_argument("--global-seed", type=count, default=0, help="weights, data order, crops, dropout")
    output = parser.add_argument_group("output")
    output.add_argument("--cloud-save-path", required=True, help="durable folder for checkpoints")
    output.add_argument("--no-local-save", action="store_true", help="write to --cloud-save-path only")
    output.add_argument("--results-dir", default="results", help="local folder for logs and checkpoints")
    output.add_argument("--log-every", type=positive_int, default=100, help="steps")
    output.add_argument("--ckpt-every", type=positive_int, default=5000, help="steps")
    add_retired(
        parser,
        {
            "--dataset": (True, "what --code-path holds is read from its meta.json"),
            "--num-workers": (True, "codes are read from a memory map, without worker processes"),
            "--wandb-project": (True, "nothing is sent anywhere; the log is in log.txt"),
            "--no-wandb": (False, "nothing is sent anywhere; the log is in log.txt"),
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


def make_model(args: Namespace, tokenizer_sha256: str | None) -> GPT:
    """A new model, or the weights of ``--gpt-ckpt``, which must have learned codes of the same tokenizer."""
    grid = args.image_size // args.downsample_size
    config = GPTConfig(
        **GPT_models[args.gpt_model],
        vocab_size=args.vocab_size,
        num_classes=args.num_classes,
        grid_height=grid,
        grid_width=grid,
        ar_token_num=resolve_parallelism(args.ar_token_num, args.spe_token_num),
        class_dropout_prob=args.class_dropout_prob,
        token_dropout_p=args.token_dropout_p,
        attn_dropout_p=args.attn_dropout_p,
        resid_dropout_p=args.dropout_p,
        ffn_dropout_p=args.dropout_p,
        drop_path_rate=args.drop_path_rate,
    )
    model = GPT(config)
    if args.gpt_ckpt is None:
        model.init_weights()
    else:
        written = (args.gpt_model, args.ar_token_num, args.num_classes, args.vocab_size)
        pretrained, _, facts = load_gpt(args.gpt_ckpt, (grid, grid), (grid, grid), *written)
        learned, here = facts.get("tokenizer_sha256"), tokenizer_sha256
        if learned and here and learned != here:
            raise ValueError(
                f"--gpt-ckpt {args.gpt_ckpt} learned codes of another tokenizer than those of --code-path "
                f"{args.code_path}; extract the codes again with its tokenizer"
            )
        model.load_state_dict(pretrained.state_dict())
    return model


class CodeBatches:
    """Batches of (codes, labels): which image and which crop is a function of (seed, step), never of the past."""

    def __init__(self, codes: Codes, vocab_size: int, batch: int, seed: int):
        self.codes, self.vocab_size, self.seed = codes, vocab_size, seed
        self.order = EpochOrder(len(codes), batch, seed)

    def rank_slice(self, step: int, rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's part of global batch ``step``: codes (b, T) int64 raster order, labels (b,) int64."""
        _, images = self.order.indices(step)  # (B,)
        rng = np.random.default_rng([self.seed, step, 1])
        crops = rng.choice(self.codes.num_crops, size=len(images), p=self.codes.crop_weights)  # (B,)
        mine = slice(rank * len(images) // size, (rank + 1) * len(images) // size)
        codes, labels = self.codes.batch(images[mine], crops[mine])  # (b, T), (b,)
        if codes.max() >= self.vocab_size:
            worst = images[mine][codes.max(1).argmax()]
            raise ValueError(
                f"--code-path: image {worst} holds code {codes.max()}, but --vocab-size is {self.vocab_size}"
            )
        return torch.from_numpy(codes), torch.from_numpy(labels)


def main() -> None:
    """Build or resume, then the loop."""
    args = parse_args()
    world = init_distributed()
    device = world.device
    micro_batch = split_batch(args.global_batch_size, world.size, args.gradient_accumulation_steps)
    codes = open_codes(args.code_path)
    if args.mix_code_path is not None:
        codes = MixedCodes(codes, open_codes(args.mix_code_path, "--mix-code-path"), args.mix_weight)
    describe_codes(args, codes)
    batches = CodeBatches(codes, args.vocab_size, args.global_batch_size, args.global_seed)
    steps_per_epoch = batches.order.steps_per_epoch
    total_steps = args.epochs * steps_per_epoch
    torch.manual_seed(args.global_seed)
    model = make_model(args, codes.meta.get("tokenizer_sha256")).to(device).train()
    optimizer = make_adamw(model, args.lr, args.weight_decay, (args.beta1, args.beta2))
    scaler = torch.amp.GradScaler(device.type, enabled=args.mixed_precision == "fp16")
    state = TrainingState(model, optimizer, scaler, Ema(model) if args.ema else None)

    name = f"{args.gpt_model}-{args.ar_token_num}x-{args.image_size}"
    folder = RunFolder.of(args.results_dir, args.cloud_save_path, args.no_local_save, name)
    run_facts = {
        k: getattr(args, k) for k in ("epochs", "global_batch_size", "global_seed", "lr_schedule", "warmup_epochs")
    }
    run_facts |= {"config": asdict(model.config), "images": len(codes), "crops": codes.num_crops}
    run_facts |= {k: codes.meta.get(k) for k in ("tokenizer_sha256", "source_sha256", "crop_range")}
    first_step = folder.resume(world, state, run_facts)
    if world.is_main:
        folder.make()
        write_options(folder.folder / "options.json", args, config=asdict(model.config), steps=total_steps)
    logger = create_logger(world, folder.folder)
    parameters = sum(p.numel() for p in model.parameters())
    logger.info(
        f"{args.gpt_model}: {parameters:,} parameters, n = {args.ar_token_num}; {len(codes):,} images x "
        f"{codes.num_crops} crops; {total_steps:,} steps of {args.global_batch_size} on {world.size} x {device}"
    )
    logger.info(f"{folder.folder}: resumed at step {first_step}" if first_step else f"{folder.folder}: new run")

    forward = torch.compile(model) if device.type == "cuda" and not args.no_compile else model
    forward = world.data_parallel(forward)
    if args.warmup_epochs > args.epochs:
        logger.warning(f"--warmup-epochs {args.warmup_epochs} is longer than the run: --lr {args.lr} is never reached")
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=total_steps,
        warmup_t=round(args.warmup_epochs * steps_per_epoch),
        lr_min=0.0 if args.lr_schedule == "cosine" else args.lr,
        t_in_epochs=False,
    )

    facts = dict(gpt_model=args.gpt_model, config=asdict(model.config), run=run_facts)
    facts["tokenizer_sha256"] = codes.meta.get("tokenizer_sha256")
    bar = progress(world, "training", total_steps, first_step, "steps")
    loss_sum, since = torch.zeros((), device=device), 0
    for step in range(first_step, total_steps):
        # ---------------------------------------------------------------- one training step
        seed_step(args.global_seed, step, world.rank)
        schedule.step_update(step)
        x, y = batches.rank_slice(step, world.rank, world.size)  # (b, T), (b,)
        for i, (x_micro, y_micro) in enumerate(zip(x.split(micro_batch), y.split(micro_batch), strict=True)):
            last = i == args.gradient_accumulation_steps - 1
            x_micro, y_micro = x_micro.to(device, non_blocking=True), y_micro.to(device, non_blocking=True)
            with nullcontext() if last or world.size == 1 else forward.no_sync():
                with autocast(device, args.mixed_precision):
                    _, loss = forward(x_micro, y_micro)
                loss = loss / args.gradient_accumulation_steps
                scaler.scale(loss).backward()
            loss_sum += loss.detach()
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
            mean = world.mean(loss_sum / since)
            lr = optimizer.param_groups[0]["lr"]
            check_finite([mean, *(model.parameters() if saving else ())], done, lr)
            logger.info(f"step {done} (epoch {done / steps_per_epoch:.2f}): loss {mean.item():.4f}, lr {lr:.2e}")
            loss_sum, since = torch.zeros((), device=device), 0
        if saving:
            if world.is_main:
                logger.info(f"saved {folder.save(done, state.checkpoint(done, **facts))}")
            world.barrier()
    bar.close()


if __name__ == "__main__":
    run(main)
