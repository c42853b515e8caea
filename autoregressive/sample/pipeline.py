"""What both samplers share: checkpoints -> a ready pair of models."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoregressive.decoding.decoder import (
    Way,
    choose_way,
    make_decoder,
    place_for_decoding,
    possible_ways,
)
from autoregressive.decoding.generate import Generator
from autoregressive.decoding.sampling import SamplingOptions, image_randomness
from autoregressive.models.gpt import GPT
from autoregressive.models.load import load_gpt, resolve_parallelism
from tokenizer.layout import place_tokenizer
from tokenizer.load import PUBLISHED_SIZE, load_tokenizer, require_tokenizer
from tokenizer.vq_model import VQModel
from utils.distributed import World
from utils.files import sha256_file
from utils.hub import fetch_released, weights_path
from utils.npz import short_hash

DEFAULT_IMAGE_SIZE = 384  # of the released models


@dataclass(frozen=True)
class Pipeline:
    """A GPT and the tokenizer of its codes, in ``eval()`` mode; the generator places the GPT."""

    gpt: GPT  # float32 on the CPU
    vq: VQModel  # on the device
    gpt_name: str
    vq_name: str
    options: SamplingOptions
    window: int  # steps computed at once
    world: World
    hashes: dict[str, str]  # SHA-256 of both files
    classes: list[str] | None  # names, if the checkpoint has them
    ways: list[Way]  # of decoding, that the options leave
    note: str | None  # on them, for the log

    @property
    def image_size(self) -> int:
        """Side of the generated images, pixels."""
        return self.gpt.order.grid[0] * self.vq.config.downsample

    @property
    def guided(self) -> bool:
        """Whether any step has guidance, which doubles the rows."""
        order = self.gpt.order
        scales = (self.options.scale(step.first, order.num_tokens) for step in order.steps)
        return any(scale != 1.0 for scale in scales)

    def decode(self, codes: Tensor) -> Tensor:
        """Raster codes (B, T) -> images (B, 3, H, W), about [-1, 1], float32."""
        with torch.inference_mode():
            return self.vq.decode_code(codes.view(-1, *self.gpt.order.grid))  # (B, 3, H, W)

    def choose_way(self, batch: int, begun: Callable[[Way], bool] | None = None) -> tuple[Way, str]:
        """Return how to decode ``batch`` images at a time, and why; the same on every rank.

        begun: whether an interrupted run of this command decodes in a way; then that is the one.
        """
        choice = self.ways[0], ""  # until rank 0 has chosen
        if self.world.is_main:
            choice = choose_way(self.gpt, self.ways, batch, self.guided, begun, self.window)
        way, reason = self.world.broadcast(choice)
        return way, f"{reason}; {self.note}" if self.note else reason

    def make_generator(
        self, way: Way, batch: int, quantized: str, editing: bool = False
    ) -> Generator:
        """Return a generator of ``batch`` images; the GPT may not be used afterwards."""
        # of the tokenizer's convolutions, which are in float32
        torch.backends.cudnn.allow_tf32 = way.precision != "none"
        gpt = place_for_decoding(self.gpt, way.dtype, self.world.device)
        if quantized != "none":
            quantize(gpt, quantized)
        rows = (2 if self.guided else 1) * batch * gpt.order.n * self.window
        decoder = make_decoder(gpt, way, rows)
        return Generator(decoder, gpt.order, self.options, batch, editing, self.window)

    def randomness(self, seed: int, indices: range) -> Tensor:
        """Return the random numbers (b, T) of the tokens of images ``indices``, on the device."""
        config, num_tokens = self.gpt.config, self.gpt.order.num_tokens
        numbers = image_randomness(
            seed, indices, config.num_classes, num_tokens, self.options.noise
        )[1]
        return to_device(numbers, self.world.device)  # (b, T)

    def start_generator(self, args: Namespace, batch: int, editing: bool = False) -> Generator:
        """Choose how to decode, report and record that, and return ``make_generator`` of it."""
        way, reason = self.choose_way(batch)
        print(reason, file=sys.stderr)
        args.precision, args.compile = way.precision, way.compiled
        return self.make_generator(way, batch, args.quantize, editing)

    def fingerprint(self, args: Namespace, way: Way) -> str:
        """Return a short hash of everything that the bytes of the samples depend on."""
        names: tuple[str, ...] = ("quantize", "gpt_ema", "image_size_eval", "per_proc_batch_size")
        names += ("num_fid_samples", "global_seed", "class_protocol")
        values = [getattr(args, n) for n in names] + [self.window]
        # other kernels round otherwise, and so does another kind of GPU
        device = self.world.device
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        values += [way.precision, way.decoder, kind, torch.__version__]
        return short_hash([sorted(self.hashes.items()), values, asdict(self.options)])

    def resolved_options(self) -> dict[str, object]:
        """Return the GPT's options as the checkpoints record them."""
        n = self.gpt.order.n
        return dict(
            gpt_model=self.gpt_name,
            image_size=self.image_size,
            downsample_size=self.vq.config.downsample,
            ar_token_num=n,
            spe_token_num=self.gpt.order.num_special,
            schedule=self.gpt.config.schedule,
            num_classes=self.gpt.config.num_classes,
        )

    def facts(self) -> dict[str, object]:
        """Return hashes and configs of the checkpoints, for the record beside the samples."""
        configs = {"gpt_config": asdict(self.gpt.config), "vq_config": asdict(self.vq.config)}
        return {"sha256": self.hashes, **configs}


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Return an array as a tensor on ``device``; a GPU that is at work is not waited for."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def load_pipeline(args: Namespace, world: World, compiled: bool) -> Pipeline:
    """Load both checkpoints; ``ValueError`` unless they and the options fit each other.

    Options that were left out are set in ``args`` to what the checkpoints record. ``compiled``:
    --compile's default on CUDA.
    """
    args.noise = args.noise or ("gumbel" if args.jacobi else "uniform")
    options = SamplingOptions(**{f.name: getattr(args, f.name) for f in fields(SamplingOptions)})
    files = find_files(args, world)
    if args.quantize != "none":
        quantization(args.quantize)  # torchao is there

    vq, vq_name = load_tokenizer(args)
    gpt, gpt_name, checkpoint = load_gpt_for(args, vq)

    wanted = compiled if args.compile is None and world.device.type == "cuda" else args.compile
    ways, note = possible_ways(world.device, args.precision, wanted, args.quantize != "none")

    pipeline = Pipeline(
        gpt=gpt,
        vq=place_tokenizer(vq, world.device),
        gpt_name=gpt_name,
        vq_name=vq_name,
        options=options,
        window=args.jacobi or 1,
        world=world,
        # gigabytes, and the same on every rank
        hashes=world.broadcast(
            {name: sha256_file(path) for name, path in files.items()} if world.is_main else {}
        ),
        classes=checkpoint.get("classes"),
        ways=ways,
        note=note,
    )
    vars(args).update(pipeline.resolved_options())
    if getattr(args, "image_size_eval", 0) is None:
        trained_here = "config" in checkpoint
        args.image_size_eval = pipeline.image_size if trained_here else PUBLISHED_SIZE
    return pipeline


def find_files(args: Namespace, world: World) -> dict[str, Path]:
    """Return the two files of weights, downloaded where ``--download`` or ``hf:`` ask for it."""
    files = {}
    hint = "or give --model; released files: pretrained_models/README.md"
    for name in ("gpt_ckpt", "vq_ckpt"):
        option, path = f"--{name.replace('_', '-')}", getattr(args, name)
        if world.is_main and path is not None:
            fetch_released(path, option, args.download)
        world.barrier()  # the other ranks find what rank 0 has downloaded
        files[name] = weights_path(path, option, hint)
    return files


def load_gpt_for(args: Namespace, vq: VQModel) -> tuple[GPT, str, dict]:
    """Load ``--gpt-ckpt``, which must have learned codes of ``vq``; returns as ``load_gpt``."""
    n = args.ar_token_num
    if n is None and args.spe_token_num is not None:
        n = args.spe_token_num + 1
    if n is not None:
        n = resolve_parallelism(n, args.spe_token_num)
    downsample = vq.config.downsample
    if args.downsample_size not in (None, downsample):
        raise ValueError(
            f"--downsample-size {args.downsample_size}: the tokenizer of --vq-ckpt has {downsample}"
        )
    gpt, name, checkpoint = load_gpt(
        args.gpt_ckpt,
        grid=None if args.image_size is None else (vq.config.grid(args.image_size),) * 2,
        default_grid=(DEFAULT_IMAGE_SIZE // downsample,) * 2,
        gpt_model=args.gpt_model,
        ar_token_num=n,
        schedule=args.schedule,
        num_classes=args.num_classes,
        vocab_size=vq.config.codebook_size,
        bare=args.from_fsdp,
        ema=args.gpt_ema,
    )
    sha256 = checkpoint.get("tokenizer_sha256")
    require_tokenizer(vq, sha256, args.vq_ckpt, f"--gpt-ckpt {args.gpt_ckpt}")
    return gpt, name, checkpoint


def quantize(gpt: GPT, what: str) -> None:
    """Round the weights of linear layers to ``int8`` (one scale per row) or ``fp8`` by torchao."""
    from torchao.quantization import quantize_

    quantize_(gpt, quantization(what))


def quantization(what: str) -> object:
    """Return torchao's config for ``int8`` or ``fp8`` weights; ``ValueError`` without torchao."""
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
    except ImportError as error:
        raise ValueError(
            f"--quantize {what} needs the package torchao: pip install torchao"
        ) from error
    return {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[what]()
