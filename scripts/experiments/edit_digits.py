"""Hide half of held-out digits, complete them, and let the quickstart's classifier read the result.

One row per number of candidates: the share of completions that are read as the intended class,
beside the same share of the untouched digits' reconstructions. Run scripts/quickstart.sh first.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor

from autoregressive.decoding.generate import Generator
from autoregressive.decoding.sampling import SamplingOptions, image_randomness
from autoregressive.models.load import load_gpt
from dataset.codes import open_codes
from evaluations.c2i.classifier import load_classifier
from scripts.benchmarks.common import write_results
from scripts.experiments.common import newest
from tokenizer.load import load_vq
from utils.distributed import init_distributed
from utils.images import enlarge, image_grid, save_png, to_uint8
from utils.logger import progress
from utils.options import make_parser, positive_int, run_main

BATCH = 50
HALVES = {"left": np.s_[:, :4], "right": np.s_[:, 4:], "top": np.s_[:4], "bottom": np.s_[4:]}


def complete(
    generator: Generator, codes: Tensor, labels: Tensor, keep: Tensor, first: int, candidates: int
) -> Tensor:
    """Return the likeliest of the completions (B, T) of codes (B, T), numbered from ``first``."""
    batch, num_tokens = codes.shape
    rows = batch * candidates
    indices = range(first * candidates, first * candidates + rows)
    _, uniforms = image_randomness(0, indices, generator.decoder.config.num_classes, num_tokens)
    made = generator(
        labels.repeat_interleave(candidates),  # (B K,)
        torch.from_numpy(uniforms),  # (B K, T)
        known=codes.repeat_interleave(candidates, 0),
        keep=keep.expand(rows, -1),
    )  # (B K, T)
    likely = generator.kept_likelihood[:rows].view(batch, candidates)  # (B, K)
    best = likely.argmax(1) + candidates * torch.arange(batch)  # (B,)
    return made[best]  # (B, T)


def main() -> None:
    """Complete, classify, print, write JSON and a picture."""
    parser = make_parser(__doc__, "python3 scripts/experiments/edit_digits.py --candidates 1 4")
    parser.add_argument("--quickstart", default="quickstart", help="folder of the quickstart")
    text = "folder of codes of held-out digits, five crops each (scripts/experiments/mistakes.py)"
    parser.add_argument("--code-path", default="results/mistakes/codes-test", help=text)
    parser.add_argument("--images", type=positive_int, default=1000, help="digits to complete")
    text = "numbers of candidates to choose from"
    parser.add_argument("--candidates", type=positive_int, nargs="+", default=[1, 4], help=text)
    parser.add_argument("--half", choices=list(HALVES), default="bottom", help="what is hidden")
    parser.add_argument("--cfg-scale", type=float, default=2.0, help="CFG scale")
    parser.add_argument("--output", default="results/edit-digits.json", help="JSON to write")
    args = parser.parse_args()
    results = measure(args)
    for name, value in results.items():
        print(f"{name:32} {value:.1%}")
    write_results(args, results)


@torch.inference_mode()
def measure(args: Namespace) -> dict[str, float]:
    """Return the share of images read as their class, by kind; write a picture of some."""
    quickstart, world = Path(args.quickstart), init_distributed()
    vq = load_vq(newest(quickstart, "tokenizer/*/checkpoints/*.pt"), None)[0]
    gpt = load_gpt(newest(quickstart, "gpt/GPT-T-4x-*/checkpoints/*.pt"), grid=None)[0]
    network = load_classifier(quickstart / "classifier.pt", "--quickstart")[0]
    held_out = open_codes(args.code_path)
    images = np.arange(args.images) % len(held_out)
    crops = np.full(len(images), 4)  # centre
    codes, labels = map(torch.from_numpy, held_out.batch(images, crops))  # (N, T), (N,)
    hidden = np.zeros(gpt.order.grid, bool)  # (h, w)
    hidden[HALVES[args.half]] = True
    keep = torch.from_numpy(~hidden.reshape(1, -1))  # (1, T)

    def share_read(codes: Tensor) -> tuple[float, np.ndarray]:
        pixels = torch.cat(
            [to_uint8(vq.decode_code(c.view(-1, *gpt.order.grid))) for c in codes.split(100)]
        )  # (N, S, S, 3)
        read = torch.cat([network(p).probabilities.argmax(1) for p in pixels.split(100)])  # (N,)
        return (read == labels).float().mean().item(), pixels.numpy()

    results, columns = {}, []
    results["reconstructions"], pixels = share_read(codes)
    grey = enlarge(hidden, pixels.shape[1])  # (S, S, 1)
    columns += [pixels[:20], np.where(grey, np.uint8(128), pixels[:20])]
    options = SamplingOptions(cfg_scale=args.cfg_scale)
    for candidates in args.candidates:
        generator = Generator(gpt, gpt.order, options, BATCH * candidates, editing=True)
        made = []
        starts = range(0, len(codes), BATCH)
        for start in progress(world, f"{candidates} candidates", len(starts), items=starts):
            part = slice(start, start + BATCH)
            made.append(
                complete(generator, codes[part], labels[part], keep, start, candidates)
            )  # (B, T)
        results[f"{candidates} candidates"], pixels = share_read(torch.cat(made))
        columns.append(pixels[:20])
    picture = Path(args.output).with_suffix(".png")
    save_png(picture, image_grid(np.concatenate(columns), columns=20))
    print(f"{picture}: digits, what is kept, completions")
    return results


if __name__ == "__main__":
    run_main(main)
