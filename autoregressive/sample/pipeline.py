"""What both samplers share: their model and sampling options, and checkpoints -> a ready pair of models."""

from __future__ import annotations

import hashlib
import json
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from autoregressive.decoding.decoder import Way, choose_way, make_decoder, possible_ways
from autoregressive.decoding.generate import Generator
from autoregressive.decoding.sampling import CFG_SCHEDULES, SamplingOptions
from autoregressive.models.gpt import GPT, GPT_models
from autoregressive.models.load import load_gpt, resolve_parallelism
from tokenizer.vq_model import VQ_models, VQModel, load_vq, require_tokenizer
from utils.distributed import World
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
    """Options that say how to draw tokens and compute them, with one sampler's defaults.

    compiled: whether ``--compile`` is the default on CUDA.
    """
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
        choices=["auto", "none", "fp16", "bf16"],
        default="auto",
        help="type of the GPT's weights and cache, none: float32; auto: bf16 on CUDA 8.0 and newer and on CPUs that "
        "decode by our own kernels, which only store it where the processor does not multiply it, fp16 on older CUDA, "
        "else none",
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
        help="on a CPU: decode by our own kernels, which its C++ compiler builds in seconds (default: both ways are "
        "timed once per machine and model size, the faster one is taken); on CUDA: torch.compile the GPT and run the "
        f"schedule as one graph, which takes minutes to make (default there: {'yes' if compiled else 'no'})",
    )


@dataclass(frozen=True)
class Pipeline:
    """A GPT and the tokenizer of its codes, in ``eval()`` mode; ``make_generator`` places the GPT on its device."""

    gpt: GPT  # float32 on the CPU
    vq: VQModel  # on the device
    gpt_name: str
    vq_name: str
    image_size: int
    options: SamplingOptions
    world: World
    hashes: dict[str, str]  # SHA-256 of both files
    classes: list[str] | None  # names, if the checkpoint has them
    ways: list[Way]  # of decoding, that the options leave
    note: str | None  # on them, for the log

    @property
    def guided(self) -> bool:
        """Whether any step has guidance, which doubles the rows."""
        order = self.gpt.order
        return any(self.options.scale(start, order.num_tokens) != 1.0 for start, _ in order.schedule)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Raster codes (B, T) -> images (B, 3, H, W), about [-1, 1], float32."""
        with torch.inference_mode():
            return self.vq.decode_code(codes.view(-1, *self.gpt.order.grid))  # (B, 3, H, W)

    def choose_way(self, batch: int, begun: Callable[[Way], bool] | None = None) -> tuple[Way, str]:
        """Return the way to decode ``batch`` images at a time and a line that says why; the same on every rank.

        begun: whether an interrupted run of this command decodes in a way; then that is the one.
        """
        choice = None
        if self.world.is_main:
            choice = choose_way(self.gpt, self.ways, batch, self.guided, begun)
        way, reason = self.world.broadcast(choice)
        return way, f"{reason}; {self.note}" if self.note else reason

    def make_generator(self, way: Way, batch: int, quantized: str) -> Generator:
        """Return a generator of ``batch`` images at a time; the GPT itself may not be used afterwards."""
        gpt = self.gpt.cast_weights(way.dtype).to(self.world.device)
        if quantized != "none":
            quantize(gpt, quantized)
        rows = (2 if self.guided else 1) * batch * gpt.order.n
        decoder = make_decoder(gpt, way, rows)
        return Generator(decoder, gpt.order, self.options, batch)

    def fingerprint(self, args: Namespace, way: Way) -> str:
        """Short hash of everything that the bytes of the samples depend on."""
        names = ("quantize", "gpt_ema", "image_size_eval", "per_proc_batch_size", "num_fid_samples")
        names += ("global_seed", "class_protocol")
        values = [getattr(args, n) for n in names]
        # other kernels round otherwise
        values += [way.precision, way.decoder, self.world.device.type, torch.__version__]
        text = json.dumps([sorted(self.hashes.items()), values, asdict(self.options)])
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def facts(self) -> dict[str, object]:
        """What the checkpoints said, for the record beside the samples."""
        configs = {"gpt_config": asdict(self.gpt.config), "vq_config": asdict(self.vq.config)}
        return {"sha256": self.hashes, **configs}


def load_pipeline(args: Namespace, world: World, compiled: bool) -> Pipeline:
    """Load both checkpoints and check that they and the options fit each other; ``ValueError`` where not.

    Options that were left out are set in ``args`` to what the checkpoints say. ``compiled``: --compile's default on
    CUDA.
    """
    device = world.device
    guidance = (args.cfg_scale, args.cfg_interval, args.cfg_schedule, args.cfg_power)
    options = SamplingOptions(*guidance, args.temperature, args.top_k, args.top_p)
    hint = "see pretrained_models/README.md for the released files"
    require_file(args.gpt_ckpt, "--gpt-ckpt", hint)
    require_file(args.vq_ckpt, "--vq-ckpt", hint)
    if args.quantize != "none":
        quantization(args.quantize)  # torchao is there
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
    grid = None if args.image_size is None else (vq.config.grid(args.image_size),) * 2
    gpt, gpt_name, checkpoint = load_gpt(
        args.gpt_ckpt,
        grid=grid,
        default_grid=(DEFAULT_IMAGE_SIZE // downsample,) * 2,
        gpt_model=args.gpt_model,
        ar_token_num=n,
        num_classes=args.num_classes,
        vocab_size=vq.config.codebook_size,
        bare=args.from_fsdp,
        ema=args.gpt_ema,
    )
    require_tokenizer(vq, checkpoint.get("tokenizer_sha256"), args.vq_ckpt, f"--gpt-ckpt {args.gpt_ckpt}")
    wanted = compiled if args.compile is None and device.type == "cuda" else args.compile
    ways, note = possible_ways(device, args.precision, wanted, args.quantize != "none")
    image_size = gpt.order.grid[0] * downsample
    resolved = dict(gpt_model=gpt_name, vq_model=vq_name, image_size=image_size, downsample_size=downsample)
    resolved |= dict(ar_token_num=gpt.order.n, spe_token_num=gpt.order.n - 1, num_classes=gpt.config.num_classes)
    resolved |= dict(codebook_size=vq.config.codebook_size, codebook_embed_dim=vq.config.codebook_embed_dim)
    vars(args).update(resolved)
    vq = vq.to(device, memory_format=torch.channels_last)
    hashes = {"gpt_ckpt": sha256_file(args.gpt_ckpt), "vq_ckpt": sha256_file(args.vq_ckpt)}
    classes = checkpoint.get("classes")
    return Pipeline(gpt, vq, gpt_name, vq_name, image_size, options, world, hashes, classes, ways, note)


def quantize(gpt: GPT, what: str) -> None:
    """Round the weights of every linear layer to ``int8`` (one scale per row) or ``fp8``, by torchao."""
    from torchao.quantization import quantize_

    quantize_(gpt, quantization(what))


def quantization(what: str) -> object:
    """Return torchao's config for ``int8`` or ``fp8`` weights; ``ValueError`` without torchao."""
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
    except ImportError as error:
        raise ValueError(f"--quantize {what} needs the package torchao: pip install torchao") from error
    return {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[what]()
