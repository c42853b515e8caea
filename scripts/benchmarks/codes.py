"""Extraction and loading of codes against the published procedure, as ratios within one run.

Published: one image at a time, its ten crops as one batch, float32 in torch's default layout, all
distances to the codebook by einsum, one int64 .npy of codes and one of labels per image; loaded
file by file through a DataLoader. Also says what bounds extraction: the encoder's FLOPs against
this machine's matrix-multiply ceiling.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from autoregressive.train.extract_codes_c2i import default_batch, encode_crops
from dataset.augmentation import center_crop, crop_names, take_crops
from dataset.codes import open_codes
from dataset.imagenet import list_images, open_image, to_model_range
from dataset.shards import CodesPlan, finish_codes, start_codes, write_shard
from scripts.benchmarks.common import (
    KEPT_MEMORY,
    PublishedDataset,
    add_output_options,
    fastest,
    run_way,
    seconds,
    write_published_codes,
    write_results,
)
from tokenizer.layout import place_tokenizer
from tokenizer.vq_model import VQModel, make_vq_config
from utils.options import make_parser, positive_int, run_main
from utils.performance import usable_cores
from utils.precision import allow_tf32, autocast

CPU = torch.device("cpu")


def published_codes(vq: VQModel, crops: Tensor) -> np.ndarray:
    """Codes (10, tokens) of crops (10, 3, S, S) by the published arithmetic."""
    z = vq.latent(crops).permute(0, 2, 3, 1)  # (10, h, w, C)
    z = torch.nn.functional.normalize(z, dim=-1).reshape(-1, z.shape[-1])  # (N, C)
    e = torch.nn.functional.normalize(vq.quantize.embedding.weight, dim=-1)  # (V, C)
    products = torch.einsum("bd,dn->bn", z, e.T)  # (N, V)
    d = z.square().sum(1, keepdim=True) + e.square().sum(1) - 2 * products  # (N, V)
    return d.argmin(1).view(len(crops), -1).numpy()


@torch.inference_mode()
def extract_one_way(way: str, data_path: str, count: int, size: int, work: Path) -> None:
    """Encode and write ``count`` images as ``way`` says; with figures, to ``work``/``way``.npz."""
    samples = list_images(data_path).samples[:count]
    torch.manual_seed(0)
    vq = VQModel(make_vq_config("VQ-16")).eval()
    vq.init_weights()
    if way.startswith("ours"):
        vq.to(memory_format=torch.channels_last)
    codebook = vq.quantize.codebook()
    (work / way).mkdir()

    def encode(path: str) -> np.ndarray:
        square = center_crop(open_image(path), int(size * 1.1))
        pixels = torch.from_numpy(square.copy())[None]  # (1, R, R, 3)
        crops = take_crops(pixels, size, True, True)[0]  # (10, S, S, 3)
        if way.startswith("published"):
            images = crops.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1  # (10, 3, S, S)
            return published_codes(vq, images)  # (10, T)
        with torch.autocast("cpu", torch.bfloat16, enabled=way.endswith("bf16")):
            codes = [vq.encode(to_model_range(part, CPU), codebook) for part in crops.split(2)]
        return torch.cat(codes).flatten(1).numpy()  # (10, T)

    encode(samples[0][0])
    found: list[np.ndarray] = []

    def run_all() -> None:
        for i, (path, label) in enumerate(samples):
            found.append(encode(path))
            if way.startswith("published"):
                np.save(work / way / f"{i}-codes.npy", found[-1][None])
                np.save(work / way / f"{i}-label.npy", np.array([label]))
        if way.startswith("ours"):
            np.savez(work / way / "shard.npz", codes=np.stack(found).astype(np.uint16))

    rate = len(samples) / seconds(run_all)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    np.savez(work / f"{way}.npz", codes=np.stack(found), rate=rate, peak=peak)


def measure_extraction(args: Namespace, work: Path) -> dict[str, float]:
    """Images per second and peak memory of each way in its own process; codes are compared.

    "published" runs under glibc's allocator settings as they are, the others under those of
    scripts/launch.sh.
    """
    results, codes = {}, {}
    for way in ("published", "published, memory kept", "ours", "ours, bf16"):
        options = dict(
            data_path=args.data_path,
            images=args.images,
            image_size=args.image_size,
            work=work,
            way=way,
        )
        run_way(__file__, {} if way == "published" else KEPT_MEMORY, **options)
        with np.load(work / f"{way}.npz", allow_pickle=False) as found:
            codes[way] = found["codes"]
            results |= {
                f"{way}: images/s": float(found["rate"]),
                f"{way}: peak GiB": float(found["peak"]),
            }
            results[f"{way}: ratio"] = results[f"{way}: images/s"] / results["published: images/s"]
            results[f"{way}: codes equal"] = float((codes[way] == codes["published"]).mean())
    return results


@torch.inference_mode()
def measure_ceiling(size: int) -> dict[str, float]:
    """GFLOP/s of a large float32 matrix product and of the encoder; where its time goes."""
    a = torch.randn(2048, 2048)
    a @ a
    ceiling = 2 * 2048**3 / fastest(lambda: a @ a, 5) / 1e9
    vq = VQModel(make_vq_config("VQ-16")).eval().to(memory_format=torch.channels_last)
    image = torch.randn(1, 3, size, size).contiguous(memory_format=torch.channels_last)
    with FlopCounterMode(display=False) as counter:
        vq.encode(image)
    reached = counter.get_total_flops() / fastest(lambda: vq.encode(image), 3) / 1e9
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        vq.encode(image)
    events = sorted(trace.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    result = {
        "GFLOP a crop": counter.get_total_flops() / 1e9,
        "encoder GFLOP/s": reached,
        "matmul GFLOP/s": ceiling,
    }
    return result | {f"share of {e.key}": e.self_cpu_time_total / total for e in events[:5]}


@torch.inference_mode()
def network_rates(
    vq_model: str, size: int, images: int, precision: str, device: torch.device
) -> dict[str, float]:
    """Return images per second of extraction (ten crops each) and of decoding, without files.

    precision: none, tf32 or bf16, of the products.
    """
    torch.manual_seed(0)
    vq = VQModel(make_vq_config(vq_model)).eval()
    vq.init_weights()
    place_tokenizer(vq, device)
    allow_tf32(precision == "tf32")
    codebook, side = vq.quantize.codebook(), int(size * 1.1)
    pixels = torch.randint(0, 256, (images, side, side, 3), dtype=torch.uint8)  # (B, R, R, 3)
    args = Namespace(ten_crop=True, no_flip=False, image_size=size, precision=precision)
    args.batch_size = default_batch(device)
    codes = encode_crops(vq, codebook, pixels, args)  # (B, 10, T)
    grids = codes[:, 0].unflatten(1, (vq.config.grid(size),) * 2)  # (B, h, w)

    def decode() -> Tensor:
        with autocast(device, "bf16" if precision == "bf16" else "none"):
            return vq.decode_code(grids)  # (B, 3, S, S)

    decode()
    extraction = fastest(lambda: encode_crops(vq, codebook, pixels, args).cpu(), 2)
    return {
        "extracted images/s": images / extraction,
        "decoded images/s": images / fastest(decode, 2),
    }


def drop_page_cache(folder: Path) -> None:
    """Ask the kernel to forget the files of a folder (they must be on disk already)."""
    os.sync()
    for path in folder.rglob("*.np?"):
        with open(path, "rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def disk_bytes(folder: Path) -> int:
    """Bytes that the files take on disk, whole blocks."""
    return int(
        subprocess.run(["du", "-s", "-B1", folder], capture_output=True, check=True).stdout.split()[
            0
        ]
    )


def measure_loading(work: Path, count: int, batch: int = 256) -> dict[str, float]:
    """Images per second of random batches of 256, warm and cold, and disk use, of both layouts."""
    codes = np.random.default_rng(0).integers(0, 16384, (count, 10, 576))
    published, ours = work / "published", work / "shards"
    write_published_codes(published, codes, np.arange(count) % 1000)
    plan = CodesPlan(
        classes=[str(c) for c in range(1000)],
        num_images=count,
        source_sha256="",
        image_size=384,
        grid=[24, 24],
        crops=crop_names(ten_crop=True, flips=True),
        crop_range=1.1,
        codebook_size=16384,
        tokenizer="VQ-16",
        tokenizer_sha256="",
        precision="none",
        shard_size=1024,
    )
    start_codes(ours, plan)
    for shard in range(plan.num_shards):
        index = np.array(plan.shard_images(shard))
        write_shard(ours, plan, shard, codes[index], index % 1000, index)
    finish_codes(ours, plan, [""] * count)
    result = {
        "published bytes/image": disk_bytes(published) / count,
        "ours bytes/image": disk_bytes(ours) / count,
    }

    workers = usable_cores()
    order = np.random.default_rng(1).permutation(count)

    def load_published() -> None:
        for x, _ in DataLoader(
            PublishedDataset(published, count), batch, shuffle=True, num_workers=workers
        ):
            x.sum()

    def load_ours() -> None:
        reader = open_codes(ours)
        rng = np.random.default_rng(2)
        for first in range(0, count, batch):
            images = order[first : first + batch]
            loaded, labels = reader.batch(images, rng.integers(10, size=len(images)))
            torch.from_numpy(loaded).sum()
            torch.from_numpy(labels)

    for name, load, folder in (("published", load_published, published), ("ours", load_ours, ours)):
        drop_page_cache(folder)
        result[f"{name} cold images/s"] = count / seconds(load)
        result[f"{name} warm images/s"] = count / fastest(load, 2)
    return result


def main() -> None:
    """Measure, print, write JSON."""
    parser = make_parser(
        __doc__, "python3 scripts/benchmarks/codes.py --data-path IMAGES --output codes.json"
    )
    parser.add_argument(
        "--data-path", required=True, help="folder with one sub-folder of images per class"
    )
    parser.add_argument(
        "--images", type=positive_int, default=4, help="images to extract (ten crops each)"
    )
    parser.add_argument(
        "--image-size", type=positive_int, default=384, help="side of the crops, pixels"
    )
    parser.add_argument("--loaded-images", type=positive_int, default=20000, help="images to load")
    add_output_options(parser, "codes.json", work="folder for 2 GB of scratch files")
    args = parser.parse_args()
    if args.way:
        extract_one_way(args.way, args.data_path, args.images, args.image_size, Path(args.work))
        return
    with tempfile.TemporaryDirectory(prefix="par-codes-", dir=args.work) as folder:
        extraction = measure_extraction(args, Path(folder)) | measure_ceiling(args.image_size)
        loading = measure_loading(Path(folder), args.loaded_images)
    for kind in ("cold", "warm"):
        loading[f"ratio, {kind}"] = (
            loading[f"ours {kind} images/s"] / loading[f"published {kind} images/s"]
        )
    loading["ratio, disk"] = loading["published bytes/image"] / loading["ours bytes/image"]
    for title, table in (("extraction", extraction), ("loading", loading)):
        print(f"\n{title}")
        for key, value in table.items():
            print(f"  {key:40} {value:,.3f}")
    write_results(args, {"extraction": extraction, "loading": loading})


if __name__ == "__main__":
    run_main(main)
