"""GPT checkpoint -> 50,000 class-conditional images in one .npz, by any number of processes.

The random numbers of image i are a function of (seed, i). Images are made in fixed batches, each
written to its place in the .npz: any number of processes, on one machine or many over a shared
disk, interrupted or not, ends in the same bytes. Another batch size, decoder (see --compile),
precision or kind of device may differ by rounding.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections import deque
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from autoregressive.sample.command_lines import parse_set as parse_args
from utils.options import answer_early, run_main

if __name__ == "__main__":
    answer_early(parse_args, __doc__)

import numpy as np
import torch
from torch import Tensor

from autoregressive.decoding.decoder import Way
from autoregressive.decoding.sampling import image_randomness
from autoregressive.sample.pipeline import Pipeline, load_pipeline, to_device
from utils.distributed import World, init_distributed
from utils.environment import write_options
from utils.files import prepare_folder
from utils.images import save_png, to_uint8
from utils.lock import hold
from utils.logger import create_logger, progress
from utils.npz import open_member, open_npz
from utils.samples import SampleFile


def sample_name(args: Namespace, pipeline: Pipeline) -> str:
    """Return the published name of a set of samples, the key of evaluation tables."""
    checkpoint = Path(args.gpt_ckpt).name
    for ending in (".pth", ".pt", ".safetensors"):
        checkpoint = checkpoint.removesuffix(ending)
    return (
        f"{pipeline.gpt_name}-{checkpoint}-size-{pipeline.image_size}-size-{args.image_size_eval}-"
        f"{pipeline.vq_name}-topk-{args.top_k}-topp-{args.top_p}-temperature-{args.temperature}-"
        f"cfg-{args.cfg_scale}-seed-{args.global_seed}"
    )


def class_ids(args: Namespace, indices: range, num_classes: int) -> np.ndarray:
    """Return class ids (b,) int64 of images ``indices``, by ``--class-protocol``."""
    if args.class_protocol == "balanced":
        return np.array(indices, dtype=np.int64) % num_classes
    return image_randomness(args.global_seed, indices, num_classes, 1)[0]


def main() -> None:
    """Make every chunk that is missing, then give the file its name."""
    args = parse_args(__doc__)
    world = init_distributed()
    logger = create_logger(world)
    pipeline = load_pipeline(args, world, compiled=True)
    name = sample_name(args, pipeline)
    npz = prepare_folder(args.sample_dir, "--sample-dir") / f"{name}.npz"
    hold(npz.with_suffix(".lock"), world, f"--sample-dir: {npz}")
    size, order = args.image_size_eval, pipeline.gpt.order
    if size > pipeline.image_size:
        logger.warning(f"images of {pipeline.image_size} pixels are enlarged to {size}")

    def file_of(way: Way) -> SampleFile:
        # chunks of another batch size, number or checkpoint of the same name must not mix in
        shape = (args.num_fid_samples, size, size, 3)
        return SampleFile(npz, pipeline.fingerprint(args, way), shape, args.per_proc_batch_size)

    def begun(way: Way) -> bool:
        file = file_of(way)
        return finished_fingerprint(npz) == file.fingerprint or file.has_begun()

    way, reason = pipeline.choose_way(args.per_proc_batch_size, begun)
    args.precision, args.compile = way.precision, way.compiled
    file = file_of(way)
    if npz.exists():
        check_finished(npz, file.fingerprint)
        file.clean()
        logger.info(f"{npz} is there already, made with these options")
    else:
        if world.is_main:
            file.create()
        # listed by one rank: on a network disk others may see less of it yet
        missing = world.broadcast(file.missing() if world.is_main else [])
        logger.info(
            f"{pipeline.gpt_name}, n = {order.n}, {len(order.steps)} steps per batch; "
            f"{len(missing)} of {file.num_chunks} batches of {args.per_proc_batch_size} to make on "
            f"{world.size} x {world.device}"
        )
        logger.info(reason)
        started = time.perf_counter()
        mine = missing[world.rank :: world.size]
        calls = make_chunks(args, world, pipeline, way, file, mine)
        world.barrier()
        seconds = time.perf_counter() - started
        if world.is_main:
            made = sum(len(file.images_of(c)) for c in missing)
            speed = {"images": made, "seconds": seconds, "images_per_second": made / seconds}
            speed["forward_calls_per_batch"] = calls
            facts = {"fingerprint": file.fingerprint, "speed": speed, **pipeline.facts()}
            write_options(npz.with_suffix(".json"), args, **facts)
            classes = pipeline.gpt.config.num_classes
            labels = [class_ids(args, file.images_of(c), classes) for c in range(file.num_chunks)]
            bar = progress(world, "checksum", args.num_fid_samples, unit="images")
            file.finish(np.concatenate(labels), bar)
            logger.info(
                f"{args.num_fid_samples:,} images in {npz}; {made:,} made now, "
                f"{made / seconds:.3g} images/s, {calls:.4g} forward calls per batch"
            )
    if world.is_main and args.png:
        write_pngs(npz, world)


def finished_fingerprint(npz: Path) -> str | None:
    """Return the fingerprint of finished samples from the JSON beside them, else None."""
    path = npz.with_suffix(".json")
    if not (npz.is_file() and path.is_file()):
        return None
    try:
        return json.loads(path.read_text()).get("fingerprint")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def check_finished(npz: Path, fingerprint: str) -> None:
    """Raise ``ValueError`` unless finished samples were made with these options and weights."""
    if finished_fingerprint(npz) != fingerprint:
        raise ValueError(
            f"--sample-dir: {npz} is there, made with other options or weights (see "
            f"{npz.stem}.json beside it); move it away or give another folder"
        )


def make_chunks(
    args: Namespace, world: World, pipeline: Pipeline, way: Way, file: SampleFile, chunks: list[int]
) -> float:
    """Generate and write ``chunks``; on CUDA one is written while the next is generated.

    Returns the mean number of forward calls of a chunk.
    """
    if not chunks:
        return 0.0
    generator = pipeline.make_generator(way, args.per_proc_batch_size, args.quantize)
    num_classes, device = pipeline.gpt.config.num_classes, world.device
    stream = torch.cuda.Stream() if device.type == "cuda" else None

    def write(chunk: int, codes: Tensor, generated: torch.cuda.Event | None) -> int:
        with torch.cuda.stream(stream) if stream else nullcontext():
            if stream:
                stream.wait_event(generated)
            pixels = pipeline.decode(codes)  # (b, 3, H, W)
            images = to_uint8(pixels, args.image_size_eval).cpu().numpy()  # (b, S, S, 3)
        file.write(chunk, images)
        return len(images)

    total, calls = sum(len(file.images_of(c)) for c in chunks), 0
    with world.worker() as thread, progress(world, "sampling", total, unit="images") as bar:
        under_way: deque[Future] = deque()
        for chunk in chunks:
            indices = file.images_of(chunk)
            cond = to_device(class_ids(args, indices, num_classes), device)  # (b,)
            codes = generator(cond, pipeline.randomness(args.global_seed, indices))  # (b, T)
            calls += generator.calls
            generated = torch.cuda.current_stream().record_event() if stream else None
            under_way.append(thread.submit(write, chunk, codes, generated))
            # cores of a CPU are busy already: two things at once would only be in each other's way
            while len(under_way) > (1 if stream else 0):
                bar.update(under_way.popleft().result())
        for written in under_way:
            bar.update(written.result())
    return calls / len(chunks)


def write_pngs(npz: Path, world: World) -> None:
    """Write images as numbered .png files beside the npz, one image in memory at a time."""
    with open_npz(npz) as archive:
        images = open_member(archive, "arr_0")
        total, *shape = images.shape
        for i in progress(world, "writing PNGs", total, unit="images", items=range(total)):
            save_png(npz.with_suffix("") / f"{i:06d}.png", images.read(tuple(shape)))


if __name__ == "__main__":
    run_main(main)
