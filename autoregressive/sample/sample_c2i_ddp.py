"""GPT checkpoint -> 50,000 class-conditional images in one .npz, by any number of processes.

Image i is a function of (seed, i) and the options. Images are made in fixed chunks of the batch size, each kept
whole as soon as it is there, so any number of processes, interrupted or not, ends in the same bytes.
"""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from autoregressive.models.generate import generate, image_randomness
from autoregressive.sample.pipeline import Pipeline, add_model_options, add_sampling_options, load_pipeline
from utils.distributed import World, init_distributed
from utils.images import save_png, to_uint8
from utils.logger import create_logger, progress
from utils.options import add_retired, make_parser, positive_int, run, write_options
from utils.samples import pack_chunks, write_chunk


def parse_args() -> Namespace:
    """Options; names and defaults of the published script."""
    parser = make_parser(
        __doc__,
        "bash scripts/autoregressive/sample_c2i.sh --vq-ckpt ./pretrained_models/vq_ds16_c2i.pt "
        "--gpt-ckpt ./pretrained_models/PAR-3B-16x.pt --spe-token-num 15 --ar-token-num 16 --gpt-model GPT-3B "
        "--image-size 384 --image-size-eval 256 --cfg-scale 1.5",
    )
    add_model_options(parser)
    add_sampling_options(parser, cfg_scale=1.5, top_k=0)
    output = parser.add_argument_group("output")
    output.add_argument("--sample-dir", default="samples", help="folder to write to")
    output.add_argument("--num-fid-samples", type=positive_int, default=50000, help="images")
    output.add_argument("--image-size-eval", type=positive_int, default=256, help="side of the written images, pixels")
    output.add_argument("--per-proc-batch-size", type=positive_int, default=32, help="images made at once")
    output.add_argument("--global-seed", type=int, default=0, help="of classes and tokens")
    output.add_argument("--png", action="store_true", help="write each image as a .png as well")
    add_retired(parser, {"--cls-token-num": (True, "there is one class token")})
    return parser.parse_args()


def sample_name(args: Namespace, pipeline: Pipeline) -> str:
    """The published name of a set of samples: what evaluation tables are keyed by."""
    checkpoint = Path(args.gpt_ckpt).name.removesuffix(".pth").removesuffix(".pt")
    return (
        f"{pipeline.gpt_name}-{checkpoint}-size-{pipeline.image_size}-size-{args.image_size_eval}-"
        f"{pipeline.vq_name}-topk-{args.top_k}-topp-{args.top_p}-temperature-{args.temperature}-"
        f"cfg-{args.cfg_scale}-seed-{args.global_seed}"
    )


def generate_chunks(
    args: Namespace, pipeline: Pipeline, chunks: list[int]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """For each chunk number: its images uint8 (b, S, S, 3) and labels int64 (b,)."""
    order, device = pipeline.gpt.order, pipeline.device
    for chunk in chunks:
        first = chunk * args.per_proc_batch_size
        indices = range(first, min(first + args.per_proc_batch_size, args.num_fid_samples))
        num_classes = pipeline.gpt.config.num_classes
        labels, uniforms = image_randomness(args.global_seed, indices, num_classes, order.num_tokens)
        cond = torch.from_numpy(labels).to(device)  # (b,)
        codes = generate(pipeline.gpt, cond, torch.from_numpy(uniforms).to(device), pipeline.options)  # (b, T)
        images = pipeline.decode(codes)  # (b, 3, H, W)
        yield chunk, to_uint8(images, args.image_size_eval).cpu().numpy(), labels


def main() -> None:
    """Make every chunk that is missing, then pack them."""
    args = parse_args()
    world = init_distributed()
    logger = create_logger(world)
    pipeline = load_pipeline(args, world.device)
    name = sample_name(args, pipeline)
    npz = Path(args.sample_dir) / f"{name}.npz"
    if npz.exists():
        logger.info(f"{npz} is there already; delete it to sample again")
        return
    num_chunks = -(-args.num_fid_samples // args.per_proc_batch_size)
    # chunks of another batch size, number or checkpoint must not mix with these
    folder = npz.with_name(f"{name}.{pipeline.fingerprint(args)}.chunks")
    folder.mkdir(parents=True, exist_ok=True)
    missing = [c for c in range(num_chunks) if not (folder / f"{c:06d}.npz").exists()]
    world.barrier()  # every rank has listed before any rank writes
    mine = missing[world.rank :: world.size]
    logger.info(
        f"{pipeline.gpt_name}, n = {pipeline.gpt.order.n}, {len(pipeline.gpt.order.schedule)} forward calls a batch; "
        f"{len(missing)} of {num_chunks} batches of {args.per_proc_batch_size} to make on {world.size} x {world.device}"
    )
    make_chunks(args, world, pipeline, folder, mine)
    world.barrier()
    if world.is_main:
        paths = [folder / f"{c:06d}.npz" for c in range(num_chunks)]
        pack_chunks(npz, paths, progress(world, "packing", num_chunks, unit="batches"))
        write_options(npz.with_suffix(".json"), args, **pipeline.facts())
        shutil.rmtree(folder)  # with what killed processes may have left in it
        logger.info(f"{args.num_fid_samples:,} images in {npz}")


def make_chunks(args: Namespace, world: World, pipeline: Pipeline, folder: Path, chunks: list[int]) -> None:
    """Generate and write ``chunks``; the last may be shorter than the batch size."""
    bar = progress(world, "sampling", len(chunks) * args.per_proc_batch_size, unit="images")
    for chunk, images, labels in generate_chunks(args, pipeline, chunks):
        if args.png:
            pngs = Path(args.sample_dir) / sample_name(args, pipeline)
            for i, image in enumerate(images, start=chunk * args.per_proc_batch_size):
                save_png(pngs / f"{i:06d}.png", image)
        write_chunk(folder / f"{chunk:06d}.npz", images, labels)
        bar.update(args.per_proc_batch_size)
    bar.close()


if __name__ == "__main__":
    run(main)
