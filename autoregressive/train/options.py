"""Options of the GPT trainer, with the defaults of the chosen recipe."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from dataclasses import fields

from autoregressive.models.config import VARIANT_CHOICES, GPT_models
from autoregressive.train.recipe import Recipe, make_recipe
from utils.options import (
    add_retired,
    fraction,
    make_parser,
    non_negative_float,
    positive_int,
)
from utils.training.options import (
    LR_SCHEDULES,
    add_optimizer_options,
    add_output_options,
    add_precision_option,
)

DATA_PARALLEL = ("ddp", "fsdp", "hsdp", "sdp")


def add_variant_options(parser: ArgumentParser) -> None:
    """Add the options that change the method itself, to compare with it."""
    group = parser.add_argument_group(
        "variants of the method (paper, table 4; defaults: those of --gpt-ckpt, else as published)"
    )
    group.add_argument(
        "--schedule",
        help="tokens predicted in each step. region: n alone, then n at once, as published; "
        "nested: the first n in groups that grow, then n at once; or sizes x steps, such as "
        "1x4,4x3,16x35, where a step must end at every multiple of n; 4x144 has no sequential "
        "start, 1x576 predicts one token at a time in the order of n regions",
    )
    group.add_argument(
        "--order",
        help="region: tokens of a step come from n regions, as nearly square as can be, as "
        "published; 1x4: from one row of four regions; raster: they are neighbours",
    )
    group.add_argument(
        "--group-attention",
        choices=VARIANT_CHOICES["group_attention"],
        help="what a step's tokens see of one another: all, as published, or those before them",
    )
    group.add_argument(
        "--special-tokens",
        choices=VARIANT_CHOICES["special_tokens"],
        help="what stands in for tokens where a step has more than the one before: a learned "
        "vector each, as published; one for all; zeros; the class; or the last token again",
    )
    group.add_argument(
        "--special-positions",
        choices=VARIANT_CHOICES["special_positions"],
        help="rotary position of special tokens. none: their queries and keys are zero, as "
        "published; predicted: that of the token they predict",
    )


def parse_args(description: str) -> Namespace:
    """Parse the options: published names and defaults, and the paper's recipe where it has one."""
    parser = make_parser(
        description,
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
    add_variant_options(parser)
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
        choices=LR_SCHEDULES,
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
    add_precision_option(speed, ["none", "fp32", "tf32", "bf16", "fp16"])
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
        choices=["auto", "dense", "flash", "flex"],
        default="auto",
        help="attention in training. dense: with a dense mask; flash: flash attention, which skips "
        "masked keys and has dropout but needs CUDA and 16 bits; flex: FlexAttention, which skips "
        "masked keys but needs CUDA and no attention dropout; auto: flex or flash where possible "
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
