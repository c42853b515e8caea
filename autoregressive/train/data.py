"""What a GPT is trained on: cached codes, checked against options and each other, in batches."""

from __future__ import annotations

import time
from argparse import Namespace

import numpy as np
import torch
from torch import Tensor

from dataset.codes import MixedCodes, open_codes
from dataset.epochs import EpochOrder
from dataset.interface import Codes
from dataset.other_codes import PublishedCodes
from dataset.shards import shard_path
from tokenizer.layout import place_tokenizer
from tokenizer.load import load_vq, require_tokenizer
from tokenizer.vq_model import VQModel
from utils.distributed import World
from utils.files import sha256_file
from utils.options import resolve

CHECKED_SHARDS = 2


def open_training_codes(args: Namespace, world: World) -> Codes:
    """Open ``--code-path`` and ``--mix-code-path``; options left out are filled from them."""
    codes = open_on_all(args.code_path, "--code-path", world)
    check_shards(args.code_path, "--code-path", codes, world)
    if args.mix_code_path is not None:
        second = open_on_all(args.mix_code_path, "--mix-code-path", world)
        check_shards(args.mix_code_path, "--mix-code-path", second, world)
        codes = MixedCodes(codes, second, args.mix_weight)
    describe_codes(args, codes)
    return codes


def open_on_all(folder: str, option: str, world: World) -> Codes:
    """Open codes on every rank; rank 0 alone reads labels of the published layout, a file each."""
    codes = labels = problem = None
    if world.is_main:
        try:
            codes = open_codes(folder, option)
            labels = codes.labels if isinstance(codes, PublishedCodes) else None
        except ValueError as error:
            problem = str(error)
    problem, labels = world.broadcast((problem, labels))
    if problem:
        raise ValueError(problem)
    return open_codes(folder, option, labels) if codes is None else codes


def check_shards(folder: str, option: str, codes: Codes, world: World) -> None:
    """Compare two shards per process, other ones at each start, with their hashes in meta.json.

    Takes about a second per GB of them; ``scripts/inspect_codes.py`` checks all.
    """
    shards = codes.meta.get("shards", [])
    order = np.random.default_rng(world.broadcast(time.time_ns())).permutation(len(shards))
    damage = None
    for i in order[CHECKED_SHARDS * world.rank :][:CHECKED_SHARDS]:
        path = shard_path(folder, i)
        if sha256_file(path) != shards[i]["sha256"]:
            damage = f"{option}: {path} is damaged: its sha256 is not the one in meta.json; "
            damage += "scripts/inspect_codes.py checks all, extract_codes_c2i.sh makes them again"
    if damage := world.first(damage):
        raise ValueError(damage)


def describe_codes(args: Namespace, codes: Codes) -> None:
    """Set grid, classes and codebook size in ``args`` from the codes; given ones must agree."""
    meta, source = codes.meta, f"--code-path {args.code_path}"
    if meta:
        args.image_size = resolve("--image-size", args.image_size, meta["image_size"], source)
        args.vocab_size = resolve("--vocab-size", args.vocab_size, meta["codebook_size"], source)
        args.num_classes = resolve("--num-classes", args.num_classes, len(meta["classes"]), source)
        pixels = meta["image_size"] // meta["grid"][0]
        args.downsample_size = resolve("--downsample-size", args.downsample_size, pixels, source)
    args.image_size = args.image_size or 384
    args.downsample_size = args.downsample_size or 16
    args.vocab_size = args.vocab_size or 16384
    args.num_classes = args.num_classes or 1000
    grid = args.image_size // args.downsample_size
    if grid**2 != codes.num_tokens:
        raise ValueError(
            f"{source} holds {codes.num_tokens} codes per crop, but --image-size {args.image_size} "
            f"/ --downsample-size {args.downsample_size} makes {grid}x{grid}"
        )
    check_labels(args, codes, source)


def check_labels(args: Namespace, codes: Codes, source: str) -> None:
    """Raise ``ValueError`` if the codes of ``source`` have a label outside ``--num-classes``."""
    if (smallest := codes.labels.min()) < 0:
        raise ValueError(f"{source} has label {smallest}")
    if (largest := codes.labels.max()) >= args.num_classes:
        raise ValueError(f"{source} has label {largest}, but --num-classes is {args.num_classes}")


def open_held_out(args: Namespace, codes: Codes, world: World) -> Codes | None:
    """Open ``--val-code-path``, which must be of the same kind as the codes to train on."""
    if args.val_code_path is None:
        return None
    held_out = open_on_all(args.val_code_path, "--val-code-path", world)
    check_shards(args.val_code_path, "--val-code-path", held_out, world)
    for key in ("tokenizer_sha256", "grid", "classes", "image_size"):
        if codes.meta and held_out.meta and codes.meta[key] != held_out.meta[key]:
            raise ValueError(
                f"--val-code-path {args.val_code_path}: its {key} differs from that of --code-path"
            )
    if held_out.num_tokens != codes.num_tokens:
        raise ValueError(
            f"--val-code-path holds {held_out.num_tokens} codes per crop, "
            f"--code-path {codes.num_tokens}"
        )
    check_labels(args, held_out, "--val-code-path")
    if min(args.val_images, len(held_out)) < world.size:
        raise ValueError(
            f"--val-images {args.val_images}: take at least one for each of the "
            f"{world.size} processes"
        )
    return held_out


def open_tokenizer(args: Namespace, codes: Codes, world: World) -> VQModel | None:
    """Load the tokenizer of ``--vq-ckpt``, which must be the one that made the codes."""
    if args.vq_ckpt is None:
        return None
    vq, _ = load_vq(args.vq_ckpt, None)
    sha256 = codes.meta.get("tokenizer_sha256")
    require_tokenizer(vq, sha256, args.vq_ckpt, f"--code-path {args.code_path}")
    return place_tokenizer(vq, world.device, elsewhere=torch.contiguous_format)


class CodeBatches:
    """Batches of (codes, labels); images and crops are functions of (seed, step) alone."""

    def __init__(self, codes: Codes, vocab_size: int, batch: int, seed: int):
        self.codes, self.vocab_size, self.seed = codes, vocab_size, seed
        self.order = EpochOrder(len(codes), batch, seed)

    def rank_slice(self, step: int, world: World) -> tuple[Tensor, Tensor]:
        """Return this rank's part of batch ``step``: codes (b, T), labels (b,), both int64.

        For a CUDA device both are in pinned memory.
        """
        _, images = self.order.indices(step)  # (B,)
        rng = np.random.default_rng([self.seed, step, 1])
        num_crops, weights = self.codes.num_crops, self.codes.crop_weights
        crops = rng.choice(num_crops, size=len(images), p=weights)  # (B,)
        each = len(images) // world.size
        mine = slice(world.rank * each, (world.rank + 1) * each)
        codes, labels = self.codes.batch(images[mine], crops[mine])  # (b, T), (b,)
        if codes.max() >= self.vocab_size:
            worst = images[mine][codes.max(1).argmax()]
            raise ValueError(
                f"--code-path: image {worst} holds code {codes.max()}, but "
                f"--vocab-size is {self.vocab_size}"
            )
        batch = torch.from_numpy(codes), torch.from_numpy(labels)
        return tuple(x.pin_memory() for x in batch) if world.device.type == "cuda" else batch
