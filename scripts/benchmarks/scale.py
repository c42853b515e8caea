"""Measure what grows with the data set, up to ImageNet's size: starting, resuming and finishing an
extraction, claims, opening codes, finishing samples. Seconds on the clock and of the processor,
memory and bytes read, each in a process of its own.

Images and published codes are hard links to a few files, and the codes of shards are made up: the
full size takes some ten minutes and 15 GB of disk, which are freed at the end. A start is timed
after another one, of a single image: without what the first one in a process imports.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from PIL import Image

from autoregressive.train import extract_codes_c2i
from dataset.claims import Claims
from dataset.codes import open_codes
from dataset.shards import CodesPlan, finish_codes, missing_shards, shard_path, write_shard
from scripts.benchmarks.common import (
    add_output_options,
    figures_of,
    seconds,
    write_figures,
    write_results,
)
from tokenizer.vq_model import VQModel, make_vq_config
from utils.distributed import World
from utils.logger import progress
from utils.options import make_parser, positive_int, run_main
from utils.performance import peak_memory
from utils.samples import SampleFile

IMAGENET = 1_281_167
CLASSES = 1000
LINKS = 20_000  # to one file; file systems have a limit
SIDE = 96  # pixels, at 4 per code: the 24x24 codes of the published setting
CPU = World(0, 1, torch.device("cpu"))
PARTS = {"images": "images", "claims": "files", "samples": "samples"}  # and the option of sizes


def link_many(files: list[Path], paths: list[str]) -> None:
    """Make ``paths`` hard links to copies of ``files``, one after the other in turns."""
    for i, path in enumerate(paths):
        file = files[i % len(files)]
        copy = file.with_name(f"{file.stem}-{i // (LINKS * len(files))}{file.suffix}")
        if not copy.exists():
            shutil.copy(file, copy)
        os.link(copy, path)


def make_images(work: Path, count: int) -> None:
    """Write a tree of ``count`` images, hard links to one, and a random tokenizer."""
    sources, images = work / "sources", work / "images"
    sources.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE + 20, SIDE + 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(sources / "image.png")
    names = [f"n{c:08d}" for c in range(min(count, CLASSES))]
    for name in names:
        (images / name).mkdir(parents=True)
    places = ((i, names[i % len(names)]) for i in range(count))
    link_many([sources / "image.png"], [f"{images}/{n}/{n}_{i}.JPEG" for i, n in places])
    vq = VQModel(make_vq_config("VQ-4")).eval()
    vq.init_weights()
    torch.save(
        {"model": vq.state_dict(), "vq_model": "VQ-4", "config": asdict(vq.config)}, work / "vq.pt"
    )


def make_published(work: Path, count: int) -> None:
    """Write the published layout of ``count`` images, hard links to a few files."""
    (work / "sources").mkdir(exist_ok=True)
    for kind in ("codes", "labels"):
        folder = work / "published" / f"imagenet384_{kind}"
        folder.mkdir(parents=True)
        files = []
        for i in range(4):
            file = work / "sources" / f"{kind}{i}.npy"
            np.save(file, np.full((1, 10, 576), i) if kind == "codes" else np.array([i]))
            files.append(file)
        link_many(files, [f"{folder}/{i}.npy" for i in range(count)])


def recorded_plan(codes: Path) -> CodesPlan:
    """Return the plan in a folder of codes."""
    return CodesPlan(**json.loads((codes / "plan.json").read_text()))


def write_shards(work: Path) -> dict[str, float]:
    """Write the shards of the plan that are missing, with codes made up."""
    plan, rng = recorded_plan(work / "codes"), np.random.default_rng(0)
    made_up = rng.integers(0, plan.codebook_size, (plan.shard_size, 10, plan.num_tokens), np.uint16)
    for shard in missing_shards(work / "codes", plan):
        index = np.array(plan.shard_images(shard))
        write_shard(work / "codes", plan, shard, made_up[: len(index)], index % CLASSES, index)
    return {"GB": plan.num_shards * made_up.nbytes / 1e9}


class FirstBatchError(Exception):
    """Raised in place of encoding the first batch."""


def start(work: Path, rank: int, size: int) -> dict[str, float]:
    """Run the extraction up to its first batch, as process ``rank`` of ``size``."""

    def encode(*_: object, **__: object) -> None:
        raise FirstBatchError

    words = ["--vq-ckpt", "vq.pt", "--data-path", "images", "--code-path", "codes"]
    words = [str(work / w) if not w.startswith("--") else w for w in words]
    words += ["--image-size", str(SIDE), "--ten-crop"]
    place = {"RANK": str(rank), "WORLD_SIZE": str(size), "CUDA_VISIBLE_DEVICES": ""}
    with (
        patch.dict(os.environ, place),
        patch.object(sys, "argv", ["extract", *words]),
        patch.object(extract_codes_c2i, "encode_crops", encode),
    ):
        started = time.perf_counter()
        with suppress(FirstBatchError):
            extract_codes_c2i.main()
        return {"seconds": time.perf_counter() - started}


def finish(work: Path) -> dict[str, float]:
    """Write meta.json of whole shards."""
    plan = recorded_plan(work / "codes")
    return {"seconds": seconds(lambda: finish_codes(work / "codes", plan, [""] * plan.num_images))}


def finish_samples(work: Path, count: int, side: int) -> dict[str, float]:
    """Finish ``count`` samples of zeros, which take no room on most disks."""
    file = SampleFile(work / "samples.npz", "f", (count, side, side, 3), chunk=32)
    file.create()
    file.record.write_bytes(b"\1" * file.num_chunks)
    taken = seconds(lambda: file.finish(np.zeros(count, np.int64), progress(CPU, "", 0)))
    file.npz.unlink()
    return {"seconds": taken}


def take_claims(work: Path, files: int, taken: int = 50) -> dict[str, float]:
    """Return the milliseconds of a claim where ``files`` shards are finished."""
    for shard in range(files):
        path = shard_path(work / "claimed", shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    with Claims(work / "claimed") as claims:
        times = [seconds(partial(claims.take, files + shard)) for shard in range(taken)]
    shutil.rmtree(work / "claimed")
    return {"ms": 1000 * float(np.median(times))}


STARTS = {"first": (0, 2), "other": (1, 2), "rerun": (0, 1)}  # rank, size
WAYS: dict[str, Callable[[Path, Namespace], dict[str, float]]] = {
    **{way: lambda work, _, place=place: start(work, *place) for way, place in STARTS.items()},
    "shards": lambda work, _: write_shards(work),
    "finish": lambda work, _: finish(work),
    "open": lambda work, _: {"seconds": seconds(lambda: open_codes(work / "codes"))},
    "published": lambda work, _: {"seconds": seconds(lambda: open_codes(work / "published"))},
    "samples": lambda work, args: finish_samples(work, args.samples[0], args.side),
}


def run_one_way(args: Namespace) -> None:
    """Leave seconds, memory and bytes read of one way, which has this process to itself."""
    work = Path(args.work)
    if args.way in STARTS:
        start(work / "single", *STARTS[args.way])
    before, processor = bytes_read(), time.process_time()
    figures = WAYS[args.way](work, args)
    figures["GB read"] = (bytes_read() - before) / 1e9
    figures["processor"] = time.process_time() - processor
    figures["MiB"] = peak_memory(torch.device("cpu")) / 2**20
    write_figures(str(work), figures)


def bytes_read() -> int:
    """Return the bytes that this process has read from files, as far as Linux tells."""
    try:
        return int(Path("/proc/self/io").read_text().split()[1])
    except OSError:
        return 0


def measure(work: Path, count: int) -> dict[str, dict[str, float]]:
    """Return the figures of each way with ``count`` images."""
    make_images(work, count)
    make_images(work / "single", 1)
    make_published(work, count)
    run = partial(figures_of, __file__, {}, str(work))
    results = {way: run(way=way) for way in ("first", "other", "shards", "finish")}
    shards = sorted((work / "codes" / "shards").glob("*.npz"))
    shards[min(1, len(shards) - 1)].unlink()  # the second, or a single one
    results["rerun"] = run(way="rerun")
    write_shards(work)
    finish(work)
    return results | {way: run(way=way) for way in ("open", "published")}


def print_table(title: str, columns: list[int], rows: dict[str, list[float]]) -> None:
    """Print a table in Markdown."""
    print(f"\n| {title} | {' | '.join(f'{c:,}' for c in columns)} |")
    print(f"|---|{'---|' * len(columns)}")
    for name, values in rows.items():
        print(f"| {name} | {' | '.join(f'{v:.3g}' for v in values)} |")


IMAGE_ROWS = {
    "extraction to its first batch, process 0: s": ("first", "seconds"),
    "of a processor: s": ("first", "processor"),
    "memory: MiB": ("first", "MiB"),
    "extraction to its first batch, another process: s": ("other", "seconds"),
    "of a processor by another process: s": ("other", "processor"),
    "memory of another process: MiB": ("other", "MiB"),
    "GB of shards": ("shards", "GB"),
    "finishing (meta.json): s": ("finish", "seconds"),
    "of a processor by finishing: s": ("finish", "processor"),
    "GB read by finishing": ("finish", "GB read"),
    "memory of finishing: MiB": ("finish", "MiB"),
    "rerun with one shard missing, to its first batch: s": ("rerun", "seconds"),
    "of a processor by the rerun: s": ("rerun", "processor"),
    "GB read by the rerun": ("rerun", "GB read"),
    "memory of the rerun: MiB": ("rerun", "MiB"),
    "opening codes: s": ("open", "seconds"),
    "memory with open codes: MiB": ("open", "MiB"),
    "opening the published layout: s": ("published", "seconds"),
    "of a processor by opening it: s": ("published", "processor"),
    "memory with it open: MiB": ("published", "MiB"),
}
SAMPLE_ROWS = {"s": "seconds", "s of a processor": "processor", "memory, MiB": "MiB"}


def report(args: Namespace, results: dict[str, dict]) -> None:
    """Print the tables of the parts that were measured."""
    if "images" in results:
        images = results["images"].values()
        rows = {title: [v[way][key] for v in images] for title, (way, key) in IMAGE_ROWS.items()}
        print_table("images", args.images, rows)
    if "claims" in results:
        claims = [v["ms"] for v in results["claims"].values()]
        print_table("files in the folder", args.files, {"a claim, ms": claims})
    if "samples" in results:
        samples = results["samples"].values()
        rows = {
            f"finishing at {args.side} pixels: {title}": [v[key] for v in samples]
            for title, key in SAMPLE_ROWS.items()
        }
        print_table("samples", args.samples, rows)


def measure_part(part: str, args: Namespace) -> dict[str, dict]:
    """Return the figures of one of ``PARTS`` at each of its sizes."""
    results = {}
    for size in getattr(args, PARTS[part]):
        with tempfile.TemporaryDirectory(prefix="par-scale-", dir=args.work) as folder:
            if part == "images":
                results[str(size)] = measure(Path(folder), size)
            elif part == "claims":
                results[str(size)] = take_claims(Path(folder), size)
            else:
                way = dict(way="samples", samples=size, side=args.side)
                results[str(size)] = figures_of(__file__, {}, folder, **way)
    return results


def main() -> None:
    """Measure, print, write JSON."""
    parser = make_parser(__doc__, "python3 scripts/benchmarks/scale.py --output scale.json")
    sizes = [IMAGENET // 100, IMAGENET // 10, IMAGENET]
    parser.add_argument(
        "--images", type=positive_int, nargs="+", default=sizes, help="sizes of the data set"
    )
    parser.add_argument(
        "--files",
        type=positive_int,
        nargs="+",
        default=[125, 1252, 12520, 80000],
        help="finished shards in the folder where a claim is made",
    )
    parser.add_argument(
        "--samples",
        type=positive_int,
        nargs="+",
        default=[500, 5000, 50000],
        help="samples to finish",
    )
    parser.add_argument("--side", type=positive_int, default=256, help="pixels of the samples")
    parser.add_argument(
        "--parts", choices=list(PARTS), nargs="+", default=list(PARTS), help="tables to make"
    )
    add_output_options(parser, "scale.json", work="folder for 15 GB of scratch files")
    args = parser.parse_args()
    if args.way:
        run_one_way(args)
        return
    results = {part: measure_part(part, args) for part in args.parts}
    report(args, results)
    write_results(args, results)


if __name__ == "__main__":
    run_main(main)
