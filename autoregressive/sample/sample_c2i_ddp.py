"""GPT checkpoint -> 50,000 class-conditional images in one .npz, by any number of processes.

Image i is a function of (seed, i) and the options. Images are made in fixed chunks of the batch size, each kept
whole as soon as it is there, so any number of processes, interrupted or not, ends in the same bytes.
"""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from autoregressive.models.generate import generate, image_randomness
from autoregressive.sample.pipeline import Pipeline, add_model_options, add_sampling_options, load_pipeline
from utils.distributed import World, init_distributed
from utils.files import prepare_folder, remove_temporary
from utils.images import save_png, to_uint8
from utils.logger import create_logger, progress
from utils.options import add_retired, count, make_parser, positive_int, run, write_options
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
    add_sampling_options(parser, cfg_scale=1.5, top_k=0, compiled=True)
    output = parser.add_argument_group("output")
    output.add_argument("--sample-dir", default="samples", help="folder to write to")
    output.add_argument("--num-fid-samples", type=positive_int, default=50000, help="images")
    output.add_argument("--image-size-eval", type=positive_int, default=256, help="side of the written images, pixels")
    output.add_argument("--per-proc-batch-size", type=positive_int, default=32, help="images made at once")
    output.add_argument("--global-seed", type=count, default=0, help="of classes and tokens")
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
    npz = prepare_folder(args.sample_dir, "--sample-dir") / f"{name}.npz"
    # chunks of another batch size, number or checkpoint of the same name must not mix with these
    fingerprint = pipeline.fingerprint(args)
    folder = npz.with_name(f"{name}.{fingerprint}.chunks")
    num_chunks = -(-args.num_fid_samples // args.per_proc_batch_size)
    paths = [folder / f"{c:06d}.npz" for c in range(num_chunks)]
    if npz.exists():
        check_finished(npz, fingerprint)
        logger.info(f"{npz} is there already, made with these options")
    else:
        missing = [c for c, path in enumerate(paths) if not path.exists()]
        world.barrier()  # every rank has listed before any rank writes
        logger.info(
            f"{pipeline.gpt_name}, n = {pipeline.gpt.order.n}, {len(pipeline.gpt.order.schedule)} forward calls a "
            f"batch; {len(missing)} of {num_chunks} batches of {args.per_proc_batch_size} to make on {world.size} x "
            f"{world.device}"
        )
        make_chunks(args, world, pipeline, paths, missing[world.rank :: world.size])
        world.barrier()
    if world.is_main:
        if not npz.exists():
            write_options(npz.with_suffix(".json"), args, fingerprint=fingerprint, **pipeline.facts())
            pack_chunks(npz, paths, progress(world, "packing", num_chunks, unit="batches"))
            logger.info(f"{args.num_fid_samples:,} images in {npz}")
        if args.png:
            write_pngs(npz, world)
        if folder.exists():
            shutil.rmtree(folder)  # with what killed processes may have left in it


def check_finished(npz: Path, fingerprint: str) -> None:
    """``ValueError`` unless the finished samples under this name were made with these very options and weights."""
    path = npz.with_suffix(".json")
    before = json.loads(path.read_text()).get("fingerprint") if path.is_file() else None
    if before != fingerprint:
        raise ValueError(
            f"--sample-dir: {npz} is there, made with other options or weights (see {path.name} beside it); "
            f"move it away or give another folder"
        )


def make_chunks(args: Namespace, world: World, pipeline: Pipeline, paths: list[Path], chunks: list[int]) -> None:
    """Generate and write ``chunks``; the last of all may be shorter than the batch size."""
    size, total = args.per_proc_batch_size, args.num_fid_samples
    with progress(world, "sampling", sum(min(size, total - c * size) for c in chunks), unit="images") as bar:
        for chunk, images, labels in generate_chunks(args, pipeline, chunks):
            remove_temporary(paths[chunk])
            write_chunk(paths[chunk], images, labels)
            bar.update(len(images))


def write_pngs(npz: Path, world: World) -> None:
    """Each image as a numbered .png in a folder beside the npz, read one by one."""
    with zipfile.ZipFile(npz) as archive, archive.open("arr_0.npy") as f:
        np.lib.format.read_magic(f)
        (total, *shape), _, _ = np.lib.format.read_array_header_1_0(f)
        for i in progress(world, "writing PNGs", total, unit="images", items=range(total)):
            pixels = np.frombuffer(f.read(int(np.prod(shape))), np.uint8).reshape(shape)
            save_png(npz.with_suffix("") / f"{i:06d}.png", pixels)


if __name__ == "__main__":
    run(main)
