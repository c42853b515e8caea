"""Inspect a folder of codes: verify every shard, count classes and codebook usage, draw decoded
codes.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.options import answer_early, make_parser, positive_int, run_main


def parse_args() -> Namespace:
    """Parse the command line."""
    parser = make_parser(
        __doc__,
        "python3 scripts/inspect_codes.py --code-path CODES --vq-ckpt "
        "./pretrained_models/vq_ds16_c2i.pt",
    )
    parser.add_argument(
        "--code-path", required=True, help="folder of codes made by extract_codes_c2i.sh"
    )
    parser.add_argument(
        "--vq-ckpt",
        help="tokenizer that made the codes, to draw decoded codes (default: no picture)",
    )
    parser.add_argument(
        "--rows", type=positive_int, default=8, help="images in the picture, one per row"
    )
    text = "PNG to write; the counts go to a .json beside it (default: CODE_PATH/inspect.png)"
    parser.add_argument("--output", help=text)
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(parse_args)

import numpy as np
import torch
from torch import Tensor

from dataset.codes import ShardedCodes, open_codes
from dataset.shards import finished_damage, shard_path
from tokenizer.load import load_vq, require_tokenizer
from utils.distributed import init_distributed
from utils.files import write_json
from utils.images import enlarge_small, image_grid, save_png, to_uint8
from utils.logger import progress
from utils.quality import codebook_usage, perplexity

CHUNK = 4096
WRITTEN = ("meta.json", "plan.json", "skipped.json", "options.json")  # by extraction


def verify(folder: Path, codes: ShardedCodes) -> None:
    """Check bytes and content of every shard; ``ValueError`` naming the damaged ones."""
    damaged, shards = [], range(len(codes.meta["shards"]))
    for i in progress(init_distributed(), "verifying", len(shards), unit="shards", items=shards):
        if damage := finished_damage(folder, codes.meta, i):
            damaged.append(f"{shard_path(folder, i)} ({damage})")
    if damaged:
        raise ValueError(
            f"{len(damaged)} damaged shards: {'; '.join(damaged)}; "
            "extract_codes_c2i.sh makes them again"
        )


def count_codes(codes: ShardedCodes) -> Tensor:
    """Count how often each codebook entry occurs over all images and crops: (V,) int64."""
    counts = np.zeros(codes.meta["codebook_size"], np.int64)
    for first in range(0, len(codes), CHUNK):
        images = np.arange(first, min(first + CHUNK, len(codes)))
        for crop in range(codes.num_crops):
            counts += np.bincount(
                codes.gather(images, np.full(len(images), crop)).ravel(), minlength=len(counts)
            )
    return torch.from_numpy(counts)


def draw(codes: ShardedCodes, vq_ckpt: str, rows: int, output: Path) -> None:
    """Decode all crops of ``rows`` images from all over the set; one row per image."""
    vq, _ = load_vq(vq_ckpt, None)
    require_tokenizer(vq, codes.meta["tokenizer_sha256"], vq_ckpt, "--code-path")
    images = np.linspace(0, len(codes) - 1, min(rows, len(codes))).astype(np.int64)
    pictures = []  # (K, S, S, 3) each
    for image in progress(init_distributed(), "decoding", len(images), unit="images", items=images):
        tokens = codes.gather(np.full(codes.num_crops, image), np.arange(codes.num_crops))  # (K, T)
        with torch.inference_mode():
            grids = torch.from_numpy(tokens).view(-1, *codes.meta["grid"])  # (K, h, w)
            decoded = vq.decode_code(grids)  # (K, 3, S, S)
        pictures.append(to_uint8(decoded).numpy())
    images = enlarge_small(np.concatenate(pictures))
    save_png(output, image_grid(images, columns=codes.num_crops))


def main() -> None:
    """Verify the shards, print and write the counts, draw."""
    args = parse_args()

    folder = Path(args.code_path)
    codes = open_codes(folder)
    if not isinstance(codes, ShardedCodes):
        raise ValueError(
            f"--code-path {folder} is in the published layout; "
            "scripts/convert_codes.py makes shards"
        )
    output = Path(args.output) if args.output else folder / "inspect.png"
    report_path = output.with_suffix(".json")
    if report_path.resolve().parent == folder.resolve() and report_path.name in WRITTEN:
        raise ValueError(f"--output {output}: {report_path} belongs to the codes")
    verify(folder, codes)

    counts = count_codes(codes)
    per_class = np.bincount(codes.labels, minlength=codes.num_classes)
    meta = codes.meta
    print(
        f"{folder}: {len(codes):,} images x {codes.num_crops} crops of "
        f"{meta['image_size']}x{meta['image_size']} as "
        f"{meta['grid'][0]}x{meta['grid'][1]} codes of {meta['tokenizer']}\n"
        f"crops      {', '.join(meta['crops'])} (range {meta['crop_range']})\n"
        f"shards     {len(meta['shards'])}, all whole; {meta['num_skipped_images']} unreadable "
        "images left out\n"
        f"tokenizer  sha256 {meta['tokenizer_sha256']}\n"
        f"classes    {codes.num_classes}, {per_class.min()} to {per_class.max()} images each\n"
        f"codebook   {(counts > 0).sum():,} of {len(counts):,} entries occur "
        f"({codebook_usage(counts):.1%}), "
        f"perplexity {perplexity(counts):,.0f}"
    )
    report = {"images_per_class": dict(zip(meta["classes"], per_class.tolist(), strict=True))}
    report |= {"codebook_counts": counts.tolist(), "codebook_perplexity": perplexity(counts)}
    write_json(report_path, report)
    if args.vq_ckpt:
        draw(codes, args.vq_ckpt, args.rows, output)
        print(f"{output}: one row per image, its crops in order")


if __name__ == "__main__":
    run_main(main)
