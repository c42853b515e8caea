"""Codes in the published layout (two .npy files an image) -> shards. A rerun makes only what is
missing.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from dataset.augmentation import crop_names
from dataset.codes import (
    CodesPlan,
    PublishedCodes,
    finish_codes,
    shard_damage,
    shard_path,
    start_codes,
    write_shard,
)
from tokenizer.load import load_vq
from utils.checkpoints.weights_file import state_sha256
from utils.distributed import init_distributed
from utils.files import remove_temporary, require_folder
from utils.logger import progress
from utils.options import make_parser, positive_int, run_main


def main() -> None:
    """Read every image's file once, in order."""
    parser = make_parser(
        __doc__,
        "python3 scripts/convert_codes.py --code-path OLD_CODES --output CODES --image-size 384 "
        "--vq-ckpt ./pretrained_models/vq_ds16_c2i.pt",
    )
    parser.add_argument("--code-path", required=True, help="folder with *_codes/ and *_labels/")
    parser.add_argument("--output", required=True, help="folder of shards to write")
    parser.add_argument("--vq-ckpt", required=True, help="tokenizer that made the codes")
    parser.add_argument(
        "--image-size", type=positive_int, default=384, help="side of the crops, pixels"
    )
    parser.add_argument(
        "--crop-range",
        type=float,
        default=1.1,
        help="side of the square the ten crops were taken from, as a multiple of --image-size",
    )
    parser.add_argument(
        "--shard-size", type=positive_int, default=1024, help="images of one shard file"
    )
    args = parser.parse_args()
    require_folder(args.code_path, "--code-path")
    old = PublishedCodes(args.code_path)
    vq, name = load_vq(args.vq_ckpt, None)
    side = vq.config.grid(args.image_size)
    crops = {len(c): c for c in (crop_names(ten, flips=True) for ten in (True, False))}.get(
        old.num_crops
    )
    if side**2 != old.num_tokens or crops is None:
        raise ValueError(
            f"--code-path {args.code_path} holds {old.num_crops} crops of {old.num_tokens} codes; "
            f"expected 10 or 2 crops of {side}x{side} for --image-size {args.image_size} and {name}"
        )
    plan = CodesPlan(
        classes=[str(c) for c in range(old.num_classes)],
        num_images=len(old),
        source_sha256=hashlib.sha256(old.labels.tobytes()).hexdigest(),
        image_size=args.image_size,
        grid=[side, side],
        crops=crops,
        crop_range=args.crop_range if old.num_crops == 10 else 1.0,
        codebook_size=vq.config.codebook_size,
        tokenizer=name,
        tokenizer_sha256=state_sha256(vq.weights()),
        precision="none",
        shard_size=args.shard_size,
    )
    start_codes(args.output, plan)
    world = init_distributed()
    whole = [s for s in range(plan.num_shards) if shard_path(args.output, s).exists()]
    whole = [s for s in whole if shard_damage(args.output, plan, s) is None]
    missing = [s for s in range(plan.num_shards) if s not in whole]
    for shard in progress(world, "converting", len(missing), unit="shards", items=missing):
        remove_temporary(shard_path(args.output, shard))
        index = np.array(plan.shard_images(shard))
        together = np.stack([old.image(i) for i in index])  # (images, crops, tokens)
        if together.min() < 0 or together.max() >= plan.codebook_size:
            raise ValueError(
                f"--code-path {args.code_path}: images {index[0]} to {index[-1]} hold code "
                f"{together.max()}, but {name} of --vq-ckpt has {plan.codebook_size}"
            )
        write_shard(args.output, plan, shard, together, old.labels[index], index)
    meta = finish_codes(args.output, plan, [f"{i}.npy" for i in range(len(old))])
    print(
        f"{args.output}: codes of {meta['num_coded_images']:,} images in {plan.num_shards} shards"
    )


if __name__ == "__main__":
    run_main(main)
