"""Images -> cached code grids: every crop of every image through the tokenizer, once.

Each process makes whole shards; what is there already is not made again, so a killed job is simply restarted.
"""

from __future__ import annotations

import hashlib
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch.utils.data import DataLoader

from dataset.augmentation import center_crop, crop_names, take_crops
from dataset.codes import CodesPlan, finish_codes, shard_path, start_codes, write_shard
from dataset.imagenet import ImageFiles, list_images, to_model_range
from tokenizer.vq_model import VQ_models, VQModel, load_vq
from utils.checkpoint import state_sha256
from utils.distributed import World, autocast, init_distributed
from utils.logger import create_logger, progress
from utils.options import add_retired, make_parser, positive_int, run, write_options


def parse_args() -> Namespace:
    """Options; names and defaults of the published script."""
    parser = make_parser(
        __doc__,
        "bash scripts/autoregressive/extract_codes_c2i.sh --vq-ckpt ./pretrained_models/vq_ds16_c2i.pt "
        "--data-path IMAGENET/train --code-path CODES --ten-crop --crop-range 1.1 --image-size 384",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data-path", required=True, help="folder with one sub-folder of images per class")
    data.add_argument("--code-path", required=True, help="folder to write codes to; a rerun finishes what is missing")
    data.add_argument("--image-size", type=positive_int, default=256, help="side of the crops, pixels")
    data.add_argument("--ten-crop", action="store_true", help="four corners and centre of a larger square")
    data.add_argument("--crop-range", type=float, default=1.1, help="side of that square / --image-size")
    data.add_argument("--no-flip", action="store_true", help="leave out mirrored crops (for text, digits)")
    data.add_argument("--debug", action="store_true", help="take the first 100 images only")
    vq = parser.add_argument_group("tokenizer")
    vq.add_argument("--vq-ckpt", required=True, help="tokenizer checkpoint")
    vq.add_argument("--vq-model", choices=list(VQ_models), help="size (default: the checkpoint's, else VQ-16)")
    vq.add_argument("--codebook-size", type=positive_int, help="entries (default: the checkpoint's or size's)")
    vq.add_argument("--codebook-embed-dim", type=positive_int, help="entry width (default: the checkpoint's or 8)")
    work = parser.add_argument_group("work")
    work.add_argument("--precision", choices=["none", "bf16"], default="none", help="bf16: faster, other codes")
    work.add_argument("--batch-size", type=positive_int, default=16, help="crops encoded at once by a process")
    work.add_argument("--shard-size", type=positive_int, default=1024, help="images of one shard file")
    work.add_argument("--num-workers", type=int, default=24, help="decoding processes, at most one per core")
    add_retired(
        parser,
        {
            "--dataset": (True, "any folder of class folders is read the same way"),
            "--global-seed": (True, "extraction draws nothing at random"),
        },
    )
    return parser.parse_args()


def make_plan(args: Namespace, samples: list[tuple[str, int]], classes: list[str], vq: VQModel, name: str) -> CodesPlan:
    """What the code folder will hold, from options, listing and tokenizer; checks that they fit."""
    downsample = vq.config.downsample
    if args.image_size % downsample:
        raise ValueError(f"--image-size {args.image_size} is no multiple of {name}'s downsampling, {downsample}")
    if args.crop_range < 1.0:
        raise ValueError(f"--crop-range {args.crop_range} must be at least 1")
    paths = "\n".join(os.path.relpath(path, args.data_path) for path, _ in samples)
    return CodesPlan(
        classes=classes,
        num_images=len(samples),
        source_sha256=hashlib.sha256(paths.encode()).hexdigest(),
        image_size=args.image_size,
        grid=[args.image_size // downsample] * 2,
        crops=crop_names(args.ten_crop, flips=not args.no_flip),
        crop_range=args.crop_range if args.ten_crop else 1.0,
        codebook_size=vq.config.codebook_size,
        tokenizer=name,
        tokenizer_sha256=state_sha256(vq.weights()),
        precision=args.precision,
        shard_size=args.shard_size,
    )


@torch.inference_mode()
def encode_crops(vq: VQModel, pixels: torch.Tensor, args: Namespace, device: torch.device) -> np.ndarray:
    """Codes (B, crops, tokens) of resized images (B, R, R, 3) uint8, ``--batch-size`` crops at a time."""
    crops = take_crops(pixels.to(device), args.image_size, args.ten_crop, flips=not args.no_flip)  # (B, K, S, S, 3)
    with autocast(device, args.precision):
        codes = [vq.encode(to_model_range(c, device)) for c in crops.flatten(0, 1).split(args.batch_size)]
    return torch.cat(codes).view(*crops.shape[:2], -1).cpu().numpy()  # (B, K, T)


def image_batches(
    args: Namespace, samples: list[tuple[str, int]], plan: CodesPlan, shards: list[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Resized images (B, R, R, 3) uint8, labels and indices of ``shards`` in order; no batch spans two shards."""
    resized = int(plan.image_size * plan.crop_range)
    per_batch = max(1, args.batch_size // len(plan.crops))
    batches = []
    for shard in shards:
        images = plan.shard_images(shard)
        batches += [[(i, 0) for i in images[b : b + per_batch]] for b in range(0, len(images), per_batch)]
    files = ImageFiles(samples, lambda image, key: center_crop(image, resized))
    workers = min(args.num_workers, os.cpu_count() or 1)
    return iter(DataLoader(files, batch_sampler=batches, num_workers=workers, pin_memory=torch.cuda.is_available()))


def main() -> None:
    """Make every shard that is missing."""
    args = parse_args()
    world = init_distributed()
    logger = create_logger(world)
    listing = list_images(args.data_path)
    samples = listing.samples[:100] if args.debug else listing.samples
    vq, name = load_vq(
        args.vq_ckpt,
        args.vq_model,
        codebook_size=args.codebook_size,
        codebook_embed_dim=args.codebook_embed_dim,
    )
    plan = make_plan(args, samples, listing.classes, vq, name)
    if world.is_main:
        start_codes(args.code_path, plan)
        write_options(Path(args.code_path) / "options.json", args)
    world.barrier()

    missing = [s for s in range(plan.num_shards) if not shard_path(args.code_path, s).exists()]
    world.barrier()  # every rank has listed before any rank writes
    logger.info(
        f"{plan.num_images:,} images of {len(plan.classes)} classes x {len(plan.crops)} crops of "
        f"{plan.image_size}x{plan.image_size} -> {plan.grid[0]}x{plan.grid[1]} codes of {name}; "
        f"{len(missing)} of {plan.num_shards} shards to make on {world.size} x {world.device}"
    )
    vq = vq.to(world.device, memory_format=torch.channels_last)
    make_shards(args, world, vq, plan, samples, missing[world.rank :: world.size])
    world.barrier()
    if world.is_main:
        meta = finish_codes(args.code_path, plan)
        logger.info(f"{args.code_path}: codes of {meta['num_coded_images']:,} images in {plan.num_shards} shards")


def make_shards(
    args: Namespace,
    world: World,
    vq: VQModel,
    plan: CodesPlan,
    samples: list[tuple[str, int]],
    shards: list[int],
) -> None:
    """Encode and write ``shards``, one after another."""
    batches = image_batches(args, samples, plan, shards)
    bar = progress(world, "extracting", sum(len(plan.shard_images(s)) for s in shards), unit="images")
    for shard in shards:
        codes, labels, index = [], [], []
        while sum(map(len, index)) < len(plan.shard_images(shard)):
            pixels, batch_labels, batch_index = next(batches)
            codes.append(encode_crops(vq, pixels, args, world.device))
            labels.append(batch_labels.numpy())
            index.append(batch_index.numpy())
            bar.update(len(batch_index))
        write_shard(args.code_path, plan, shard, *(np.concatenate(x) for x in (codes, labels, index)))
    bar.close()


if __name__ == "__main__":
    run(main)
