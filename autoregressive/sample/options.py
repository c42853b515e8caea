"""Options that both samplers share: which models, how tokens are drawn and computed."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Sequence
from pathlib import Path

from autoregressive.decoding.choices import CFG_SCHEDULES, NOISES, TEMPERATURE_SCHEDULES
from autoregressive.models.config import GPT_models
from tokenizer.config import add_tokenizer_options
from utils.options import positive_int
from utils.presets import PRESETS, SMALL_PRESETS, Preset, SmallPreset

JACOBI_STEPS = 4


def add_model_options(parser: ArgumentParser) -> None:
    """Add the options selecting the models: either ``--model`` or the two files are needed."""
    group = parser.add_argument_group(
        "models (--model, or the two files; the rest is optional where a checkpoint has it)"
    )
    group.add_argument(
        "--model",
        choices=[*PRESETS, *SMALL_PRESETS],
        help="a released model, with the files in pretrained_models/ and the options of its "
        "published samples, or one of the small models of this repository; options written beside "
        "it win",
    )
    group.add_argument(
        "--download",
        action="store_true",
        help="fetch missing released files from huggingface.co",
    )
    text = "GPT checkpoint, released or trained here: a file, a folder with config.json and "
    text += "model.safetensors, or hf:OWNER/NAME, which is downloaded (required without --model)"
    group.add_argument("--gpt-ckpt", help=text)
    group.add_argument(
        "--gpt-model", choices=list(GPT_models), help="size of the GPT (default: the checkpoint's)"
    )
    group.add_argument(
        "--gpt-ema", action="store_true", help="sample from the moving average of the GPT's weights"
    )
    group.add_argument(
        "--from-fsdp",
        action="store_true",
        help="stop unless --gpt-ckpt is a bare state dict, as published FSDP files are",
    )
    group.add_argument(
        "--ar-token-num", type=positive_int, help="n, tokens per step (default: the checkpoint's)"
    )
    group.add_argument(
        "--spe-token-num",
        type=int,
        help="number of special tokens: --ar-token-num minus 1, as in published command lines",
    )
    group.add_argument(
        "--schedule", help="tokens predicted in each step (default: the checkpoint's)"
    )
    group.add_argument(
        "--num-classes", type=positive_int, help="number of classes (default: the checkpoint's)"
    )
    group.add_argument(
        "--image-size",
        type=positive_int,
        help="side of generated images, pixels (default: the checkpoint's, else 384)",
    )
    group.add_argument(
        "--downsample-size", type=positive_int, help="pixels per code (default: the tokenizer's)"
    )
    add_tokenizer_options(group, required=False)


def picture_path(output: str) -> Path:
    """Return ``--output`` as a path; ``ValueError`` unless it ends in .png."""
    if Path(output).suffix != ".png":
        raise ValueError(f"--output {output}: the picture's name must end in .png")
    return Path(output)


def parse_sampler(parser: ArgumentParser, words: Sequence[str] | None = None) -> Namespace:
    """Parse a sampler's command line (None: this program's), with the options of ``--model`` as
    defaults; options written beside it are reported.
    """
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--model", nargs="?")  # without a value, which the parser reports
    model = finder.parse_known_args(words)[0].model
    presets: dict[str, Preset | SmallPreset] = {**PRESETS, **SMALL_PRESETS}
    preset = presets[model].options() if model in presets else {}

    known = {action.dest for action in parser._actions}  # argparse has no public list
    parser.set_defaults(**{name: preset[name] for name in preset.keys() & known})
    args = parser.parse_args(words)

    written = [
        f"{name} {value}"
        for name, value in vars(args).items()
        if name in preset and value != preset[name]
    ]
    if written and model in PRESETS and os.environ.get("RANK", "0") == "0":
        print(f"--model {model}, but not as published: {', '.join(written)}", file=sys.stderr)
    return args


def add_sampling_options(
    parser: ArgumentParser, cfg_scale: float, top_k: int, compiled: bool
) -> None:
    """Add the options of drawing tokens and computing them, with one sampler's defaults.

    compiled: whether ``--compile`` is the default on CUDA.
    """
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--cfg-scale",
        type=float,
        default=cfg_scale,
        help="strength of classifier-free guidance (CFG); 1 disables it",
    )
    group.add_argument(
        "--cfg-interval",
        type=int,
        default=-1,
        help="guide only while at most this many tokens are decoded; -1: in every step",
    )
    group.add_argument(
        "--cfg-schedule",
        choices=CFG_SCHEDULES,
        default="constant",
        help="CFG scale over the steps: constant, as published; linear and power-cosine "
        "rise from 1 to --cfg-scale",
    )
    group.add_argument(
        "--cfg-power",
        type=float,
        default=2.75,
        help="exponent of --cfg-schedule power-cosine; larger: rises later",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="softmax temperature; 0 takes the likeliest token",
    )
    group.add_argument(
        "--temperature-schedule",
        choices=TEMPERATURE_SCHEDULES,
        default="constant",
        help="temperature over the steps: constant, as published; linear and cosine go from "
        "--temperature at the first token to --temperature-end after the last",
    )
    group.add_argument(
        "--temperature-end",
        type=float,
        default=1.0,
        help="last temperature of --temperature-schedule linear and cosine",
    )
    group.add_argument(
        "--top-k",
        type=int,
        default=top_k,
        help="draw from the k likeliest tokens only; 0: from all tokens",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="draw from the fewest likeliest tokens with this total probability (nucleus "
        "sampling); 1: from all tokens",
    )
    group.add_argument(
        "--jacobi",
        type=positive_int,
        nargs="?",
        const=JACOBI_STEPS,
        metavar="STEPS",
        help="compute so many steps at once from drafts, again and again until they settle (Jacobi "
        f"decoding; {JACOBI_STEPS} if no number is written): fewer forward calls, which take "
        "longer each, for the same tokens, but for rounding (default: step by step)",
    )
    group.add_argument(
        "--noise",
        choices=NOISES,
        help="random numbers of a token. uniform: one, as published; gumbel: one per codebook "
        "entry, with which Jacobi decoding settles sooner (default: gumbel with --jacobi, else "
        "uniform; the images are others)",
    )
    group.add_argument(
        "--precision",
        choices=["auto", "none", "fp16", "bf16"],
        default="auto",
        help="data type of the GPT's weights and cache (none: float32). auto: bf16 on GPUs of "
        "compute capability 8.0 or newer and on CPUs that decode by our own kernels, which compute "
        "in float32 where the processor has no bf16 products; fp16 on older CUDA devices; "
        "else none",
    )
    group.add_argument(
        "--quantize",
        choices=["none", "int8", "fp8"],
        default="none",
        help="round the GPT's weights, by the package torchao; slower on a CPU, unmeasured on GPUs",
    )
    group.add_argument(
        "--compile",
        action=BooleanOptionalAction,
        help="on a CPU: decode by our own kernels, which a C++ compiler builds in seconds "
        "(default: torch's operators and the kernels are timed once per machine and model size, "
        "and the faster is taken); on CUDA: torch.compile the GPT and run all steps as one CUDA "
        f"graph, which takes minutes to build (default: {'yes' if compiled else 'no'})",
    )
