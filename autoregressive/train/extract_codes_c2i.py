"""Images -> cached code grids: every crop of every image through the tokenizer, once.

Each process takes shards that no other has, on one machine or on many that share a disk. Processes
may join late, die and be restarted; a rerun makes only what is missing or damaged. Process 0 lists
the images; the others read its listing.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from logging import Logger
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from autoregressive.train.extraction_options import BATCH, CHECKED_SHARDS, CUDA_BATCH, parse_args
from utils.options import answer_early, run_main

if __name__ == "__main__":
    answer_early(parse_args, __doc__)

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from autoregressive.train.code_plan import list_and_plan, wait_for_plan
from dataset.augmentation import take_crops
from dataset.claims import Claims
from dataset.imagenet import CenterCrop, ImageFiles, ImagePaths, Unreadable, to_model_range
from dataset.shard_records import Records
from dataset.shards import (
    CodesPlan,
    check_shard,
    finish_codes,
    missing_shards,
    shard_path,
    write_shard,
)
from tokenizer.layout import place_tokenizer
from tokenizer.load import load_tokenizer, resolve_image_size
from tokenizer.vq_model import VQModel
from utils.distributed import World, init_distributed
from utils.environment import write_options
from utils.files import remove_ended
from utils.logger import create_logger, progress
from utils.performance import worker_count
from utils.precision import allow_tf32, autocast, log_level, resolve_precision

LONGEST_PAUSE = 10  # seconds between looks for a shard to take over


def default_batch(device: torch.device) -> int:
    """Return the crops per batch that keep ``device`` busy."""
    return CUDA_BATCH if device.type == "cuda" else BATCH


@torch.inference_mode()
def encode_crops(vq: VQModel, codebook: Tensor, pixels: Tensor, args: Namespace) -> Tensor:
    """Return codes (B, crops, tokens) of images (B, R, R, 3) uint8, in ``--batch-size`` crops.

    They are on the device, which may still be at work on them.
    """
    device = codebook.device
    kinds = dict(ten_crop=args.ten_crop, flips=not args.no_flip)
    pixels = pixels.to(device, non_blocking=True)  # (B, R, R, 3)
    crops = take_crops(pixels, args.image_size, **kinds)  # (B, K, S, S, 3)
    with autocast(device, "bf16" if args.precision == "bf16" else "none"):
        parts = crops.flatten(0, 1).split(args.batch_size)  # (<=batch, S, S, 3) each
        codes = [vq.encode(to_model_range(part, device), codebook) for part in parts]
    return torch.cat(codes).view(*crops.shape[:2], -1)  # (B, K, T)


class ShardBatches:
    """Keys of the images to decode, shard after shard; a shard is claimed only when its turn comes.

    For a DataLoader's batch_sampler. No batch spans two shards. ``bar`` counts what
    other processes make.
    """

    def __init__(self, plan: CodesPlan, claims: Claims, shards: list[int], batch: int, bar: tqdm):
        self.plan, self.claims, self.shards, self.batch, self.bar = plan, claims, shards, batch, bar

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for shard in self.shards:
            images = self.plan.shard_images(shard)
            if self.claims.take(shard):
                for first in range(0, len(images), self.batch):
                    yield [(i, 0) for i in images[first : first + self.batch]]
            else:
                self.bar.update(len(images))


class ImageBatch(NamedTuple):
    """One batch of decoded image files."""

    pixels: Tensor | None  # uint8 (B, R, R, 3) of the readable ones
    labels: np.ndarray  # (B,) int64
    images: np.ndarray  # (B,) int64
    skipped: list[Unreadable]

    @property
    def first(self) -> int:
        """Index of one of its images."""
        return int(self.images[0]) if len(self.images) else self.skipped[0].image


def collate(items: list[tuple[Tensor, int, int] | Unreadable]) -> ImageBatch:
    """Stack the readable images of a batch; unreadable ones keep their reason."""
    skipped = [item for item in items if isinstance(item, Unreadable)]
    read = [item for item in items if not isinstance(item, Unreadable)]
    pixels = torch.stack([item[0] for item in read]) if read else None
    labels, images = (np.array([item[k] for item in read], np.int64) for k in (1, 2))
    return ImageBatch(pixels, labels, images, skipped)


def check_shards(args: Namespace, world: World, plan: CodesPlan, logger: Logger) -> bool:
    """Delete this rank's shards that are damaged or, with --retry-skipped, incomplete; return
    whether there were any.

    Reads those whose size or time is not the recorded one and a few others, with --verify all.
    """
    missing, records = set(missing_shards(args.code_path, plan)), Records(args.code_path)
    own = [s for s in range(plan.num_shards) if s not in missing][world.rank :: world.size]
    known = {s: records.find(s, shard_path(args.code_path, s)) for s in own}
    sample = np.random.default_rng().permutation(own)[:CHECKED_SHARDS]
    to_read = {s for s in own if args.verify or s in sample or known[s] is None}
    wrong = False
    for shard in progress(world, "checking", len(own), unit="shards", items=own):
        path, record, damage = shard_path(args.code_path, shard), known[shard], None
        if shard in to_read:
            record, damage = check_shard(args.code_path, plan, shard, record)
        lacking = len(plan.shard_images(shard)) - record.images if record else 0
        if args.retry_skipped and lacking:
            damage = f"it lacks {lacking} unreadable images"
        if damage:
            logger.warning(f"{path} is damaged and made again: {damage}")
            path.unlink(missing_ok=True)
            (Path(args.code_path) / "meta.json").unlink(missing_ok=True)
            wrong = True
    return wrong


def make_all_shards(
    args: Namespace,
    world: World,
    vq: VQModel,
    plan: CodesPlan,
    paths: ImagePaths,
    claims: Claims,
    logger: Logger,
) -> None:
    """Work until all shards exist: take free ones, wait for others, reclaim abandoned ones."""
    pause = 0
    while missing := missing_shards(args.code_path, plan):
        start = world.rank * len(missing) // world.size  # ranks begin far from each other
        shards = missing[start:] + missing[:start]
        if any(map(claims.take, shards)):
            if not claims.exclude:  # by chance processes seldom make the same shard
                shards = np.random.default_rng().permutation(missing).tolist()
            make_shards(args, world, vq, plan, paths, shards, claims)
            continue
        if pause == 0:
            logger.info(f"waiting for {len(missing)} shards that other processes make")
        pause = min(pause + 1, LONGEST_PAUSE)
        time.sleep(pause)


def make_shards(
    args: Namespace,
    world: World,
    vq: VQModel,
    plan: CodesPlan,
    paths: ImagePaths,
    shards: list[int],
    claims: Claims,
) -> None:
    """Claim, encode and write those of ``shards`` that no other process has."""
    resized = int(plan.image_size * plan.crop_range)
    total = sum(len(plan.shard_images(s)) for s in shards)
    batch = max(1, args.batch_size // len(plan.crops))
    with progress(world, "extracting", total, unit="images") as bar:
        loader = DataLoader(
            ImageFiles(paths, CenterCrop(resized), tolerant=True),
            batch_sampler=ShardBatches(plan, claims, shards, batch, bar),
            collate_fn=collate,
            num_workers=worker_count(args.num_workers),
            pin_memory=world.device.type == "cuda",
        )
        encode = partial(encode_crops, vq, vq.quantize.codebook(), args=args)
        for shard, batches in groupby(loader, key=lambda batch: batch.first // plan.shard_size):
            none = torch.empty(0, len(plan.crops), plan.num_tokens, dtype=torch.int64)
            codes = [none.to(world.device)]  # fetched once: a batch begins while one is computed
            labels, index, skipped = [], [], []
            for part in batches:
                if fatal := [u for u in part.skipped if u.fatal or args.strict]:
                    raise ValueError(fatal[0].reason)
                if part.pixels is not None:
                    codes.append(encode(part.pixels))
                labels.append(part.labels)
                index.append(part.images)
                skipped += [(u.image, u.reason) for u in part.skipped]
                bar.update(len(part.images) + len(part.skipped))
            joined_codes = torch.cat(codes).cpu().numpy()  # (images of the shard, K, T)
            joined = (joined_codes, np.concatenate(labels), np.concatenate(index))
            write_shard(args.code_path, plan, shard, *joined, skipped)
            claims.release(shard)


def main() -> None:
    """Make every shard that is missing; rank 0 writes ``meta.json`` when all are there."""
    args = parse_args(__doc__)
    world = init_distributed(connect=False)
    logger = create_logger(world)
    if args.batch_size is None:
        args.batch_size = default_batch(world.device)
    if args.precision == "auto":
        args.precision = "none"
        reason = "none (float32), on every machine: bf16 would change some codes"
    else:
        args.precision, reason = resolve_precision(args.precision, world.device)
    allow_tf32(args.precision == "tf32")
    vq, name = load_tokenizer(args)
    args.image_size = resolve_image_size(args.image_size, vq)
    logger.log(log_level(args.precision, world.device), f"--precision {reason}")
    if world.is_main:
        paths, plan = list_and_plan(args, vq, name, logger)
        write_options(Path(args.code_path) / "options.json", args)
    else:
        paths, plan = wait_for_plan(args, vq, name, logger)
    remove_ended(shard_path(args.code_path, 0).parent)
    wrong = check_shards(args, world, plan, logger)
    logger.info(
        f"{plan.num_images:,} images of {len(plan.classes)} classes x {len(plan.crops)} crops of "
        f"{plan.image_size}x{plan.image_size} -> {plan.grid[0]}x{plan.grid[1]} codes of {name}; "
        f"{len(missing_shards(args.code_path, plan))} of {plan.num_shards} shards to make on "
        f"{world.size} x {world.device}"
    )
    vq = place_tokenizer(vq, world.device)
    with Claims(args.code_path) as claims:
        make_all_shards(args, world, vq, plan, paths, claims, logger)
        if not (world.is_main or wrong):
            return
        while (meta := finish_codes(args.code_path, plan, paths)) is None:
            # another rank has yet to delete a damaged one
            unread = Namespace(code_path=args.code_path, verify=False, retry_skipped=False)
            check_shards(unread, World(0, 1, world.device), plan, logger)
            make_all_shards(args, world, vq, plan, paths, claims, logger)
        claims.sweep()
    logger.info(
        f"{args.code_path}: codes of {meta['num_coded_images']:,} images in "
        f"{plan.num_shards} shards"
    )
    if meta["num_skipped_images"]:
        skipped = f"{meta['num_skipped_images']:,} unreadable images left out"
        text = f"{skipped}; see {args.code_path}/skipped.json"
        if args.strict:
            raise ValueError(f"--strict: {text}; repair them and run again with --retry-skipped")
        logger.warning(text)


if __name__ == "__main__":
    run_main(main)
