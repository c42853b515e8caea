"""Images -> reconstructions in one .npz, their PSNR, and a picture of both side by side."""

from __future__ import annotations

import os
import sys
import uuid
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch.utils.data import DataLoader

from dataset.imagenet import CenterCrop, ImageFiles, list_images, to_model_range
from tokenizer.vq_model import VQ_models, load_vq
from utils.distributed import init_distributed
from utils.files import prepare_folder
from utils.images import image_grid, save_png, to_uint8
from utils.logger import progress
from utils.options import add_retired, count, make_parser, positive_int, run, write_options
from utils.samples import SampleFile


def parse_args() -> Namespace:
    """Options; names and defaults of the published script."""
    parser = make_parser(
        __doc__,
        "bash scripts/tokenizer/reconstruction_vq.sh --data-path IMAGENET/val "
        "--vq-ckpt ./pretrained_models/vq_ds16_c2i.pt",
    )
    parser.add_argument("--data-path", required=True, help="folder with one sub-folder of images per class")
    parser.add_argument("--vq-ckpt", help="tokenizer checkpoint")
    parser.add_argument("--vq-model", choices=list(VQ_models), help="size (default: the checkpoint's, else VQ-16)")
    parser.add_argument("--codebook-size", type=positive_int, help="entries (default: the checkpoint's, else 16384)")
    parser.add_argument("--codebook-embed-dim", type=positive_int, help="entry width (default: the checkpoint's or 8)")
    parser.add_argument("--image-size", type=positive_int, default=256, help="side of the centre crop, pixels")
    parser.add_argument("--image-size-eval", type=positive_int, default=256, help="side of what is written, pixels")
    parser.add_argument("--sample-dir", default="reconstructions", help="folder to write to")
    parser.add_argument("--per-proc-batch-size", type=positive_int, default=32, help="images at once")
    parser.add_argument("--num-workers", type=count, default=4, help="decoding processes, at most one per core")
    add_retired(
        parser,
        {
            "--dataset": (True, "any folder of class folders is read the same way"),
            "--global-seed": (True, "reconstruction draws nothing at random"),
        },
    )
    return parser.parse_args()


def psnr(images: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
    """10 log10(255^2 / mean squared error) of each pair of uint8 (N, H, W, 3): (N,) dB."""
    error = np.square(images.astype(np.float64) - reconstructions).mean(axis=(1, 2, 3))
    return 10 * np.log10(255.0**2 / np.maximum(error, 1e-10))


@torch.inference_mode()
def main() -> None:
    """Encode and decode every image once, in order, on one process."""
    args = parse_args()
    world = init_distributed()
    vq, name = load_vq(
        args.vq_ckpt, args.vq_model, codebook_size=args.codebook_size, codebook_embed_dim=args.codebook_embed_dim
    )
    if args.image_size % vq.config.downsample:
        raise ValueError(f"--image-size {args.image_size} is no multiple of {name}'s {vq.config.downsample}")
    prepare_folder(args.sample_dir, "--sample-dir")
    vq.to(world.device, memory_format=torch.channels_last)
    samples = list_images(args.data_path).samples
    files = ImageFiles(samples, CenterCrop(args.image_size))
    keys = [(i, 0) for i in range(len(samples))]
    workers = min(args.num_workers, os.cpu_count() or 1)
    loader = DataLoader(files, args.per_proc_batch_size, sampler=keys, num_workers=workers)
    output = Path(args.sample_dir) / f"{name}-{Path(args.vq_ckpt).stem}-size-{args.image_size}"
    shape = (len(samples), args.image_size_eval, args.image_size_eval, 3)
    file = SampleFile(Path(f"{output}.npz"), uuid.uuid4().hex[:8], shape, args.per_proc_batch_size)
    file.create()
    all_labels, pairs, decibels = [], [], []
    batches = progress(world, "reconstructing", len(loader), unit="batches", items=loader)
    for batch, (pixels, labels, _) in enumerate(batches):
        images = to_model_range(pixels, world.device)  # (B, 3, S, S)
        made = to_uint8(vq.decode_code(vq.encode(images)), args.image_size_eval).cpu().numpy()  # (B, E, E, 3)
        real = to_uint8(images, args.image_size_eval).cpu().numpy()  # (B, E, E, 3)
        decibels.append(psnr(real, made))
        all_labels.append(labels.numpy())
        file.write(batch, made)
        if batch % max(1, len(loader) // 20) == 0:
            pairs += [real[0], made[0]]
    file.finish(np.concatenate(all_labels), progress(world, "checksum", len(samples), unit="images"))
    save_png(f"{output}.png", image_grid(np.stack(pairs), columns=10))
    mean = float(np.concatenate(decibels).mean())
    write_options(f"{output}.json", args, psnr=mean, images=len(samples))
    print(f"PSNR {mean:.2f} dB over {len(samples):,} images; {output}.npz, {output}.png (image, reconstruction, ...)")


if __name__ == "__main__":
    run(main)
