"""Codes made by other programs -> shards: LlamaGen's folders, RandAR's .tar, RAR's .jsonl.

OLD_CODES is a folder with *_codes/ and *_labels/ (two .npy files per image), a tar of
ANY_codes/LABEL/INDEX.npy, or a .jsonl of {"class_id": ..., "tokens": [...]}. A rerun makes only
what is missing.
"""

from __future__ import annotations

import hashlib
import math
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.options import answer_early, make_parser, positive_int, run_main


def parse_args() -> Namespace:
    """Parse the command line."""
    parser = make_parser(
        __doc__,
        "python3 scripts/convert_codes.py --code-path imagenet-llamagen-adm-256_codes.tar "
        "--output CODES --vq-ckpt ./pretrained_models/vq_ds16_c2i.pt",
    )
    parser.add_argument("--code-path", required=True, metavar="OLD_CODES", help="codes to read")
    parser.add_argument("--output", required=True, help="folder of shards to write")
    parser.add_argument("--vq-ckpt", help="tokenizer that made the codes, if it is at hand")
    text = "codebook entries of a tokenizer that is not at hand, such as 1024 for MaskGIT's; its "
    text += "codes train a GPT, but only --vq-ckpt of that kind makes images of them"
    parser.add_argument("--codebook-size", type=positive_int, help=text)
    text = "side of the crops, pixels (default: codes per side times the tokenizer's downsampling, "
    text += "else times 16)"
    parser.add_argument("--image-size", type=positive_int, help=text)
    parser.add_argument(
        "--crop-range",
        type=float,
        default=1.1,
        help="side of the square the ten crops were taken from, as a multiple of --image-size",
    )
    parser.add_argument("--shard-size", type=positive_int, default=1024, help="images per shard")
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(parse_args)

import numpy as np

from dataset.augmentation import crop_names
from dataset.claims import Claims
from dataset.other_codes import JsonlCodes, PublishedCodes, TarCodes
from dataset.shards import (
    CodesPlan,
    finish_codes,
    missing_shards,
    shard_damage,
    start_codes,
    write_shard,
)
from tokenizer.load import load_vq
from utils.checkpoints.weights_file import state_sha256
from utils.distributed import init_distributed
from utils.files import prepare_folder, require_file, require_folder
from utils.lock import hold
from utils.logger import progress


def main() -> None:
    """Read every image's codes once, in order."""
    args = parse_args()
    old = open_other(Path(args.code_path))
    plan = make_plan(old, args)
    prepare_folder(args.output, "--output")
    start_codes(args.output, plan)
    world = init_distributed()
    hold(Path(args.output) / ".lock", world, f"--output {args.output}")
    with Claims(args.output) as claims:
        claims.sweep()
    missing = missing_shards(args.output, plan)
    for shard in set(range(plan.num_shards)) - set(missing):
        if shard_damage(args.output, plan, shard) is not None:
            missing.append(shard)
    missing.sort()
    for shard in progress(world, "converting", len(missing), unit="shards", items=missing):
        index = np.array(plan.shard_images(shard))
        together = np.stack([old.image(i) for i in index])  # (images, crops, tokens)
        if together.min() < 0 or together.max() >= plan.codebook_size:
            raise ValueError(
                f"--code-path {args.code_path}: images {index[0]} to {index[-1]} hold code "
                f"{together.max()}, but {plan.tokenizer} has {plan.codebook_size}"
            )
        write_shard(args.output, plan, shard, together, old.labels[index], index)
    meta = finish_codes(args.output, plan, [f"{i}.npy" for i in range(len(old))])
    print(
        f"{args.output}: codes of {meta['num_coded_images']:,} images in {plan.num_shards} shards"
    )


def open_other(path: Path) -> PublishedCodes | TarCodes | JsonlCodes:
    """Return a reader of codes in another project's layout."""
    if path.suffix in (".tar", ".jsonl"):
        require_file(path, "--code-path")
        return TarCodes(path) if path.suffix == ".tar" else JsonlCodes(path)
    require_folder(path, "--code-path", "or a .tar or .jsonl file")
    return PublishedCodes(path)


def make_plan(old: PublishedCodes | TarCodes | JsonlCodes, args: Namespace) -> CodesPlan:
    """Return the plan of the shards; ``ValueError`` where codes and options do not fit."""
    side = math.isqrt(old.num_tokens)
    known = {1: ["as published"], 2: crop_names(False, True), 10: crop_names(True, True)}
    if side**2 != old.num_tokens or old.num_crops not in known:
        raise ValueError(
            f"--code-path {args.code_path} holds {old.num_crops} crops of {old.num_tokens} codes; "
            "expected 1, 2 or 10 crops of a square number of codes"
        )
    if (args.vq_ckpt is None) == (args.codebook_size is None):
        raise ValueError("give either --vq-ckpt or --codebook-size")
    name, sha256, codebook_size, downsample = "another tokenizer", None, args.codebook_size, 16
    if args.vq_ckpt:
        vq, name = load_vq(args.vq_ckpt, None)
        sha256, codebook_size = state_sha256(vq.weights()), vq.config.codebook_size
        downsample = vq.config.downsample
    if args.image_size not in (None, side * downsample):
        raise ValueError(
            f"--image-size {args.image_size}: {args.code_path} holds {side}x{side} codes, which "
            f"{name} makes of {side * downsample} pixels"
        )
    return CodesPlan(
        classes=old.classes,
        num_images=len(old),
        source_sha256=hashlib.sha256(old.labels.tobytes()).hexdigest(),
        image_size=side * downsample,
        grid=[side, side],
        crops=known[old.num_crops],
        crop_range=args.crop_range if old.num_crops == 10 else 1.0,
        codebook_size=codebook_size,
        tokenizer=name,
        tokenizer_sha256=sha256,
        precision="none",
        shard_size=args.shard_size,
    )


if __name__ == "__main__":
    run_main(main)
