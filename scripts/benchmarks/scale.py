"""Time what grows with the data set, up to ImageNet's size: starting, resuming and finishing an
extraction, claims, opening codes, finishing samples.

Images and published codes are hard links to a few files, and the codes of shards are made up: the
full size takes some ten minutes and 15 GB of disk, which are freed at the end.
"""

from __future__ import annotations

import json
import os
import resource
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
from utils.samples import SampleFile

IMAGENET = 1_281_167
CLASSES = 1000
LINKS = 20_000  # to one file; file systems have a limit
SIDE = 96  # pixels, at 4 per code: the 24x24 codes of the published setting
CPU = World(0, 1, torch.device("cpu"))


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
    sources.mkdir()
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


WAYS: dict[str, Callable[[Path], dict[str, float]]] = {
    "first": lambda work: start(work, 0, 2),
    "other": lambda work: start(work, 1, 2),
    "shards": write_shards,
    "finish": finish,
    "rerun": lambda work: start(work, 0, 1),
    "open": lambda work: {"seconds": seconds(lambda: open_codes(work / "codes"))},
    "published": lambda work: {"seconds": seconds(lambda: open_codes(work / "published"))},
}


def run_one_way(way: str, work: Path) -> None:
    """Leave seconds, memory and bytes read of one way, which has this process to itself."""
    before, processor = bytes_read(), time.process_time()
    figures = WAYS[way](work)
    figures["GB read"] = (bytes_read() - before) / 1e9
    figures["processor"] = time.process_time() - processor
    figures["MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
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
    make_published(work, count)
    results = {}
    for way in WAYS:
        if way == "rerun":  # of the second shard, or of the first of a single one
            shards = sorted((work / "codes" / "shards").glob("*.npz"))
            shards[min(1, len(shards) - 1)].unlink()
        if way == "open":
            WAYS["shards"](work)
            WAYS["finish"](work)
        results[way] = figures_of(__file__, {}, str(work), way=way)
    return results


def print_table(title: str, columns: list[int], rows: dict[str, list[float]]) -> None:
    """Print a table in Markdown."""
    print(f"\n| {title} | {' | '.join(f'{c:,}' for c in columns)} |")
    print(f"|---|{'---|' * len(columns)}")
    for name, values in rows.items():
        print(f"| {name} | {' | '.join(f'{v:.3g}' for v in values)} |")


def table(measured: dict[str, dict], way: str, figure: str = "seconds") -> list[float]:
    """Return one figure of all sizes."""
    return [measured[count][way][figure] for count in measured]


def report(args: Namespace, results: dict[str, dict]) -> None:
    """Print all tables."""
    images = results["images"]
    rows = {
        "extraction to its first batch, process 0: s": table(images, "first"),
        "of a processor: s": table(images, "first", "processor"),
        "memory, MiB": table(images, "first", "MiB"),
        "extraction to its first batch, another process: s": table(images, "other"),
        "of a processor by another process: s": table(images, "other", "processor"),
        "memory of another process, MiB": table(images, "other", "MiB"),
        "finishing (meta.json): s": table(images, "finish"),
        "GB read by finishing": table(images, "finish", "GB read"),
        "GB of shards": table(images, "shards", "GB"),
        "rerun with one shard missing, to its first batch: s": table(images, "rerun"),
        "GB read by the rerun": table(images, "rerun", "GB read"),
        "opening codes: s": table(images, "open"),
        "opening the published layout: s": table(images, "published"),
    }
    print_table("images", args.images, rows)
    claims = [results["claims"][str(n)]["ms"] for n in args.files]
    print_table("files in the folder", args.files, {"a claim, ms": claims})
    samples = [results["samples"][str(n)]["seconds"] for n in args.samples]
    print_table("samples", args.samples, {f"finishing at {args.side} pixels, s": samples})


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
    add_output_options(parser, "scale.json", work="folder for 15 GB of scratch files")
    args = parser.parse_args()
    if args.way:
        run_one_way(args.way, Path(args.work))
        return
    results: dict[str, dict] = {"images": {}, "claims": {}, "samples": {}}
    for count in args.images:
        with tempfile.TemporaryDirectory(prefix="par-scale-", dir=args.work) as folder:
            results["images"][str(count)] = measure(Path(folder), count)
    with tempfile.TemporaryDirectory(prefix="par-scale-", dir=args.work) as folder:
        for files in args.files:
            results["claims"][str(files)] = take_claims(Path(folder), files)
        for samples in args.samples:
            results["samples"][str(samples)] = finish_samples(Path(folder), samples, args.side)
    report(args, results)
    write_results(args, results)


if __name__ == "__main__":
    run_main(main)
