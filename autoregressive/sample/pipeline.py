"""What both samplers share: their model and sampling options, and checkpoints -> a ready pair of models."""

from __future__ import annotations

import hashlib
import json
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from dataclasses import asdict, dataclass

import torch

from autoregressive.models.cpu_decoding import why_not
from autoregressive.models.generate import CFG_SCHEDULES, SamplingOptions
from autoregressive.models.gpt import GPT, GPT_models, load_gpt
from autoregressive.models.region_order import resolve_parallelism
from tokenizer.vq_model import VQ_models, VQModel, load_vq
from utils.checkpoint import state_sha256
from utils.distributed import AUTOCAST_DTYPE, has_bfloat16
from utils.files import require_file, sha256_file
from utils.options import positive_int

DEFAULT_IMAGE_SIZE = 384  # of the released models


def add_model_options(parser: ArgumentParser) -> None:
    """Options that say which models, under the published names. All but the two files may be left out."""
    group = parser.add_argument_group("models (what a checkpoint itself says need not be written)")
    group.add_argument("--gpt-ckpt", help="GPT checkpoint, released or ours")
    group.add_argument("--vq-ckpt", help="tokenizer checkpoint, released or ours")
    group.add_argument("--gpt-model", choices=list(GPT_models), help="size (default: the checkpoint's)")
    group.add_argument("--gpt-type", choices=["c2i"], default="c2i", help="class-conditional")
    group.add_argument("--gpt-ema", action="store_true", help="take the checkpoint's moving average of the weights")
    group.add_argument("--from-fsdp", action="store_true", help="--gpt-ckpt must be a bare state dict")
    group.add_argument("--ar-token-num", type=positive_int, help="tokens predicted at once, n (default: checkpoint's)")
    group.add_argument("--spe-token-num", type=int, help="special tokens; n - 1, and nothing else")
    group.add_argument("--num-classes", type=positive_int, help="classes (default: the checkpoint's)")
    group.add_argument("--image-size", type=positive_int, help="generated pixels (default: the checkpoint's, else 384)")
    group.add_argument("--downsample-size", type=positive_int, help="pixels per code (default: the tokenizer's)")
    group.add_argument("--vq-model", choices=list(VQ_models), help="size (default: the checkpoint's, else VQ-16)")
    group.add_argument("--codebook-size", type=positive_int, help="entries (default: the checkpoint's, else 16384)")
    group.add_argument("--codebook-embed-dim", type=positive_int, help="entry width (default: the checkpoint's or 8)")


def add_sampling_options(parser: ArgumentParser, cfg_scale: float, top_k: int, compiled: bool) -> None:
    """Options that say how to draw tokens and compute them, with one sampler's defaults."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--cfg-scale", type=float, default=cfg_scale, help="classifier-free guidance; 1 is none")
    group.add_argument(
        "--cfg-interval", type=int, default=-1, help="guide while at most this many tokens are decoded; -1: always"
    )
    group.add_argument(
        "--cfg-schedule",
        choices=CFG_SCHEDULES,
        default="constant",
        help="constant, as published; linear and power-cosine grow from no guidance to --cfg-scale",
    )
    group.add_argument("--cfg-power", type=float, default=2.75, help="of power-cosine; larger: later")
    group.add_argument("--temperature", type=float, default=1.0, help="of the softmax; 0 is greedy")
    group.add_argument("--top-k", type=int, default=top_k, help="draw from the k likeliest tokens; 0 is all")
    group.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this total")
    group.add_argument(
        "--precision",
        choices=["none", "fp16", "bf16"],
        help="of the GPT's weights (default: bf16; none, float32, on a CPU without instructions for it)",
    )
    group.add_argument(
        "--quantize",
        choices=["none", "int8", "fp8"],
        default="none",
        help="round the GPT's weights (needs torchao); recorded beside the samples",
    )
    group.add_argument(
        "--compile",
        action=BooleanOptionalAction,
        help="on a CPU decode by our own kernels, built once in seconds (default: where there is a C++ compiler); on "
        "CUDA torch.compile the GPT and run the schedule as one graph, which takes minutes to make (default: "
        f"{'yes' if compiled else 'no'})",
    )


@dataclass(frozen=True)
class Pipeline:
    """A GPT and the tokenizer of its codes, on one device, in ``eval()`` mode."""

    gpt: GPT
    vq: VQModel
    gpt_name: str
    vq_name: str
    image_size: int
    options: SamplingOptions
    device: torch.device
    hashes: dict[str, str]  # SHA-256 of both files
    classes: list[str] | None  # names, if the checkpoint has them
    note: str | None  # what the user may want to know before long work

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Raster codes (B, T) -> images (B, 3, H, W), about [-1, 1], float32."""
        with torch.inference_mode():
            return self.vq.decode_code(codes.view(-1, *self.gpt.order.grid))  # (B, 3, H, W)

    def fingerprint(self, args: Namespace) -> str:
        """Short hash of everything that the bytes of the samples depend on."""
        names = ("precision", "quantize", "gpt_ema", "image_size_eval", "per_proc_batch_size", "num_fid_samples")
        names += ("global_seed", "class_protocol")
        values = [getattr(args, n) for n in names]
        values += [args.compile, self.device.type, torch.__version__]  # other kernels round otherwise
        text = json.dumps([sorted(self.hashes.items()), values, asdict(self.options)])
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def facts(self) -> dict[str, object]:
        """What the checkpoints said, for the record beside the samples."""
        configs = {"gpt_config": asdict(self.gpt.config), "vq_config": asdict(self.vq.config)}
        return {"sha256": self.hashes, **configs}


def load_pipeline(args: Namespace, device: torch.device, compiled: bool) -> Pipeline:
    """Load both checkpoints and check that they and the options fit each other; ``ValueError`` where not.

    Options that were left out are set in ``args`` to what the checkpoints say. ``compiled``: --compile's default on
    CUDA.
    """
    guidance = (args.cfg_scale, args.cfg_interval, args.cfg_schedule, args.cfg_power)
    options = SamplingOptions(*guidance, args.temperature, args.top_k, args.top_p)
    hint = "see pretrained_models/README.md for the released files"
    require_file(args.gpt_ckpt, "--gpt-ckpt", hint)
    require_file(args.vq_ckpt, "--vq-ckpt", hint)
    n = args.ar_token_num
    if n is None and args.spe_token_num is not None:
        n = args.spe_token_num + 1
    if n is not None:
        n = resolve_parallelism(n, args.spe_token_num)
    vq, vq_name = load_vq(
        args.vq_ckpt, args.vq_model, codebook_size=args.codebook_size, codebook_embed_dim=args.codebook_embed_dim
    )
    downsample = vq.config.downsample
    if args.downsample_size not in (None, downsample):
        raise ValueError(f"--downsample-size {args.downsample_size}: {vq_name} has {downsample}")
    if args.image_size is not None and args.image_size % downsample:
        raise ValueError(f"--image-size {args.image_size} is no multiple of {vq_name}'s downsampling, {downsample}")
    gpt, gpt_name, checkpoint = load_gpt(
        args.gpt_ckpt,
        grid=None if args.image_size is None else (args.image_size // downsample,) * 2,
        default_grid=(DEFAULT_IMAGE_SIZE // downsample,) * 2,
        gpt_model=args.gpt_model,
        ar_token_num=n,
        num_classes=args.num_classes,
        vocab_size=vq.config.codebook_size,
        bare=args.from_fsdp,
        ema=args.gpt_ema,
    )
    trained_on = checkpoint.get("tokenizer_sha256")
    if trained_on is not None and trained_on != state_sha256(vq.weights()):
        raise ValueError(
            f"--vq-ckpt {args.vq_ckpt} is not the tokenizer whose codes --gpt-ckpt {args.gpt_ckpt} learned"
        )
    if args.precision is None:
        args.precision = "bf16" if has_bfloat16(device) else "none"
    dtype = AUTOCAST_DTYPE[args.precision]
    gpt = gpt.to(device) if dtype is None else gpt.cast_weights(dtype).to(device)
    if args.quantize != "none":
        quantize(gpt, args.quantize)
    note = None
    if device.type == "cpu":
        reason = why_not(gpt.tok_embeddings.weight.dtype) if args.quantize == "none" else f"not for {args.quantize}"
        if args.compile and reason is not None:
            raise ValueError(f"--compile: no kernels for decoding on this CPU: {reason}")
        if args.compile is None:
            args.compile = reason is None
            note = reason and f"decoding by torch's operators, several times slower than by our kernels: {reason}"
    elif args.compile is None:
        args.compile = compiled and device.type == "cuda"
    image_size = gpt.order.grid[0] * downsample
    resolved = dict(gpt_model=gpt_name, vq_model=vq_name, image_size=image_size, downsample_size=downsample)
    resolved |= dict(ar_token_num=gpt.order.n, spe_token_num=gpt.order.n - 1, num_classes=gpt.config.num_classes)
    resolved |= dict(codebook_size=vq.config.codebook_size, codebook_embed_dim=vq.config.codebook_embed_dim)
    vars(args).update(resolved)
    vq = vq.to(device, memory_format=torch.channels_last)
    hashes = {"gpt_ckpt": sha256_file(args.gpt_ckpt), "vq_ckpt": sha256_file(args.vq_ckpt)}
    classes = checkpoint.get("classes")
    return Pipeline(gpt, vq, gpt_name, vq_name, image_size, options, device, hashes, classes, note)


def quantize(gpt: GPT, what: str) -> None:
    """Round the weights of every linear layer to ``int8`` (a scale a row) or ``fp8``, by torchao."""
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ValueError(f"--quantize {what} needs the package torchao: pip install torchao") from error
    quantize_(gpt, {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[what]())
