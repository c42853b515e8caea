"""Reconstruct images with a tokenizer; report PSNR, SSIM, LPIPS and codebook usage.

Writes reconstructions and images to one .npz each, from which the evaluator computes rFID, and a
picture of pairs. Images are divided into chunks of the batch size, so any number of processes,
interrupted or not, gives the same files and metrics.
"""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tokenizer.reconstruction_options import parse_args
from utils.options import answer_early, run_main

if __name__ == "__main__":
    answer_early(parse_args, __doc__)

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dataset.imagenet import CenterCrop, ImageFiles, list_images, say_if_enlarged, to_model_range
from tokenizer.layout import place_tokenizer
from tokenizer.load import load_tokenizer, resolve_image_size
from tokenizer.vq_loss import find_vgg, load_lpips
from tokenizer.vq_model import VQModel
from utils.checkpoints.weights_file import state_sha256
from utils.distributed import World, init_distributed
from utils.environment import write_options
from utils.files import atomic_path, prepare_folder
from utils.images import labelled_rows, save_png, to_uint8
from utils.lock import hold
from utils.logger import create_logger, progress
from utils.npz import member_names, open_member, open_npz, short_hash
from utils.performance import worker_count
from utils.precision import allow_tf32
from utils.quality import codebook_usage, perplexity, psnr, ssim
from utils.records import read_json
from utils.samples import SampleFile

PICTURE_COLUMNS = 10
SHOWN = {
    "psnr": "PSNR {:.2f} dB",
    "ssim": "SSIM {:.4f}",
    "lpips": "LPIPS {:.4f}",
    "codebook_used": "codebook used {:.1%}",
    "perplexity": "perplexity {:.4g}",
}


class Reconstructor:
    """Writes and measures reconstructions and originals, both uint8 (N, E, E, 3)."""

    def __init__(
        self, args: Namespace, world: World, vq: VQModel, lpips: nn.Module | None, name: str
    ):
        self.args, self.world, self.vq, self.lpips = args, world, vq, lpips
        self.samples = list_images(args.data_path).samples
        self.images = ImageFiles(self.samples, CenterCrop(args.image_size))
        self.fingerprint = self._fingerprint()
        self.base = base = Path(args.sample_dir) / name
        shape = (len(self.samples), args.image_size_eval, args.image_size_eval, 3)
        paths = (Path(f"{base}.npz"), Path(f"{base}-inputs.npz"))
        self.files = [
            SampleFile(p, self.fingerprint, shape, args.per_proc_batch_size) for p in paths
        ]
        self.figures, self.picture = Path(f"{base}.json"), Path(f"{base}.png")
        # one small .npz per chunk, until all exist
        self.scores = Path(f"{base}.{self.fingerprint}.scores")

    def _fingerprint(self) -> str:
        """Return a short hash of everything that the files and metrics depend on."""
        args = self.args
        sizes = [args.image_size, args.image_size_eval, args.per_proc_batch_size]
        options = [*sizes, self.lpips is not None]
        return short_hash([state_sha256(self.vq.weights()), options, self.samples])

    def finished(self) -> list[bool]:
        """Return which files are finished; ``ValueError`` for other options or weights."""
        finished = [file.npz.exists() for file in self.files]
        if any(finished):
            before = read_json(self.figures) if self.figures.is_file() else {}
            if not isinstance(before, dict) or before.get("fingerprint") != self.fingerprint:
                raise ValueError(
                    f"--sample-dir: {self.files[finished.index(True)].npz} already exists, made "
                    f"with other options, images or weights (see {self.figures.name} beside it); "
                    "move it away or give another folder"
                )
        return finished

    def score_path(self, chunk: int) -> Path:
        """Return the file of the scores of one chunk."""
        return self.scores / f"{chunk:07d}.npz"

    def missing(self, files: list[SampleFile]) -> list[int]:
        """Return the chunks that are still to be made for ``files``, or whose scores are lost."""
        chunks = set().union(*(file.missing() for file in files))
        return sorted(
            c for c in range(files[0].num_chunks) if c in chunks or not self.score_path(c).exists()
        )

    def clean(self) -> None:
        """Remove what a run killed at its very end left beside finished files."""
        for file in self.files:
            file.clean()
        shutil.rmtree(self.scores, ignore_errors=True)

    def make(self, chunks: list[int]) -> None:
        """Reconstruct, measure, write ``chunks``; scores first, as images are not made again."""
        keys = [[(i, 0) for i in self.files[0].images_of(chunk)] for chunk in chunks]
        workers = worker_count(self.args.num_workers)
        loader = DataLoader(self.images, batch_sampler=keys, num_workers=workers)
        batches = progress(self.world, "reconstructing", len(chunks), unit="batches", items=loader)
        for chunk, (pixels, labels, _) in zip(chunks, batches, strict=True):
            images = to_model_range(pixels, self.world.device)  # (B, 3, S, S)
            originals, reconstructions, codes = self.pairs(images)  # (B, E, E, 3) twice, (B, h, w)

            pair = (originals, reconstructions)
            scores = {"psnr": psnr(*pair), "ssim": ssim(*pair)}  # (B,) each
            if self.lpips is not None:
                in_range = (to_model_range(torch.from_numpy(x), self.world.device) for x in pair)
                scores["lpips"] = self.lpips(*in_range).flatten().cpu().numpy()  # (B,)

            with (
                atomic_path(self.score_path(chunk), tidy=False) as temporary,
                open(temporary, "wb") as f,
            ):
                np.savez(f, codes=codes.astype(np.uint32), labels=labels.numpy(), **scores)
            for file, content in zip(self.files, (reconstructions, originals), strict=True):
                if file.partial.exists():
                    file.write(chunk, content)

    def pairs(self, images: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(B, 3, S, S) in [-1, 1] -> originals and copies uint8 (B, E, E, 3), codes (B, h, w)."""
        size = self.args.image_size_eval
        codes = self.vq.encode(images)  # (B, h, w)
        reconstructions = to_uint8(self.vq.decode_code(codes), size)  # (B, E, E, 3)
        originals = to_uint8(images, size)  # (B, E, E, 3)
        return originals.cpu().numpy(), reconstructions.cpu().numpy(), codes.cpu().numpy()

    def summarise(self) -> tuple[dict[str, float], np.ndarray]:
        """Return means of scores, codebook usage and perplexity of all images; labels (N,)."""
        chunks: dict[str, list[np.ndarray]] = {}
        for chunk in range(self.files[0].num_chunks):
            with open_npz(self.score_path(chunk)) as archive:
                for key in member_names(archive):
                    member = open_member(archive, key)
                    chunks.setdefault(key, []).append(member.read(member.shape))
        scores = {k: np.concatenate(v) for k, v in chunks.items()}
        labels, codes = scores.pop("labels"), scores.pop("codes")  # (N,), (N, h, w)
        size = self.vq.config.codebook_size
        counts = torch.from_numpy(np.bincount(codes.reshape(-1), minlength=size))  # (V,)
        figures = {k: float(v.astype(np.float64).mean()) for k, v in scores.items()}
        figures |= {"codebook_used": codebook_usage(counts), "perplexity": perplexity(counts)}
        return figures, labels

    def draw(self) -> None:
        """Draw rows of images from all over the set, each above its reconstruction."""
        count = len(self.samples)
        chosen = np.linspace(0, count - 1, min(self.args.pairs, count), dtype=int)
        pixels = torch.stack([self.images[int(i), 0][0] for i in chosen])  # (N, S, S, 3)
        images = to_model_range(pixels, self.world.device)  # (N, 3, S, S)
        originals, reconstructions, _ = self.pairs(images)  # (N, E, E, 3) each
        columns = min(len(chosen), PICTURE_COLUMNS)
        white = np.full((-len(chosen) % columns, *originals.shape[1:]), 255, np.uint8)
        rows = [
            np.concatenate([images, white]).reshape(-1, columns, *originals.shape[1:])
            for images in (originals, reconstructions)
        ]  # (R, columns, E, E, 3) each
        both = np.stack(rows, axis=1)  # (R, 2, columns, E, E, 3)
        labels = ["images", "reconstructions"] * len(both)
        save_png(self.picture, labelled_rows(both.reshape(-1, *both.shape[2:]), labels))

    def finish(self) -> dict[str, float]:
        """Write metrics and picture, then name the files; to be called by one process only."""
        figures, labels = self.summarise()
        vgg = find_vgg(self.args.vgg_weights) if self.lpips is not None else None
        facts = {"fingerprint": self.fingerprint, "lpips_backbone": vgg}
        write_options(self.figures, self.args, **figures, **facts, images=len(self.samples))
        self.draw()
        for file in self.files:
            if file.partial.exists():
                bar = progress(self.world, "checksum", len(self.samples), unit="images")
                file.finish(labels, bar)
        return figures


@torch.inference_mode()
def main() -> None:
    """Reconstruct every missing chunk, then finish metrics, picture and files."""
    args = parse_args(__doc__)
    world = init_distributed()
    logger = create_logger(world)
    allow_tf32(False)
    vq, name = load_tokenizer(args)
    args.image_size = resolve_image_size(args.image_size, vq)
    args.image_size_eval = resolve_image_size(args.image_size_eval, vq)
    vq.config.grid(args.image_size)  # raises if they do not fit
    lpips = None
    if find_vgg(args.vgg_weights) is not None:
        lpips = load_lpips(args.vgg_weights).to(world.device)
    else:
        logger.info("LPIPS is left out: no VGG16 weights (see --vgg-weights)")
    prepare_folder(args.sample_dir, "--sample-dir")
    place_tokenizer(vq, world.device)
    name = f"{name}-{Path(args.vq_ckpt).stem}-size-{args.image_size}"
    r = Reconstructor(args, world, vq, lpips, name)
    hold(Path(f"{r.base}.lock"), world, f"--sample-dir: {r.base}")
    if world.is_main:
        say_if_enlarged(r.samples, args.image_size, logger)

    finished = r.finished()
    world.barrier()  # every rank has looked before any file gets its name
    if not all(finished):
        unfinished = [file for file, done in zip(r.files, finished, strict=True) if not done]
        if world.is_main:
            for file in unfinished:
                file.create()
            r.scores.mkdir(exist_ok=True)
        # listed by one rank: on a network disk others may see less of it yet
        missing = world.broadcast(r.missing(unfinished) if world.is_main else [])
        r.make(missing[world.rank :: world.size])
        world.barrier()

    if world.is_main:
        if not all(finished):
            r.finish()
        r.clean()
        figures = read_json(r.figures)
        logger.info(", ".join(form.format(figures[k]) for k, form in SHOWN.items() if k in figures))
        logger.info(f"over {figures['images']:,} images; a picture of some: {r.picture}")
        logger.info(f"rFID: python3 evaluations/c2i/evaluator.py {r.files[1].npz} {r.files[0].npz}")


if __name__ == "__main__":
    run_main(main)
