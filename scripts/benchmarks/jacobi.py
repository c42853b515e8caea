"""Jacobi decoding against decoding step by step: forward calls, seconds, and equal images.

Both decode the same images of each checkpoint in one process, with the same weights, decoder and
random numbers.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from autoregressive.decoding.decoder import (
    Decoder,
    make_decoder,
    place_for_decoding,
    possible_ways,
)
from autoregressive.decoding.generate import Generator
from autoregressive.decoding.sampling import NOISES, SamplingOptions, image_randomness
from autoregressive.models.load import load_gpt
from scripts.benchmarks.common import seconds, write_results
from utils.distributed import init_distributed
from utils.hub import weights_path
from utils.options import make_parser, positive_int, run_main


def load_decoder(path: str, rows: int, precision: str) -> Decoder:
    """Return the fastest decoder there is of a checkpoint: our kernels, or torch.compile."""
    device = init_distributed().device
    ways, _ = possible_ways(device, precision, None if device.type == "cpu" else True, False)
    model = place_for_decoding(load_gpt(path, grid=None)[0], ways[0].dtype, device)
    return make_decoder(model, ways[0], rows)


def measure(args: Namespace, decoder: Decoder) -> list[dict[str, object]]:
    """Decode the images in every way; one row of figures each."""
    order, config, device = decoder.order, decoder.config, decoder.device
    rows = []
    for scale, noise, batch in product(args.cfg_scales, args.noise, args.batch):
        options = SamplingOptions(cfg_scale=scale, noise=noise)
        parts = [range(i, i + batch) for i in range(0, args.images - batch + 1, batch)]
        drawn = [image_randomness(0, p, config.num_classes, order.num_tokens, noise) for p in parts]
        batches = [tuple(torch.from_numpy(x).to(device) for x in pair) for pair in drawn]
        for window in dict.fromkeys((1, *args.windows)):
            generator = Generator(decoder, order, options, batch, window=window)
            generator(*batches[0])  # warm up
            calls, codes = [], []

            def decode(generator=generator, batches=batches, calls=calls, codes=codes) -> None:
                for cond, numbers in batches:
                    codes.append(generator(cond, numbers))
                    calls.append(generator.calls)

            each = seconds(decode) / (len(batches) * batch)
            made = torch.cat(codes)
            if window == 1:
                by_step, expected = each, made
            rows.append(
                {
                    "n": order.n,
                    "schedule": order.schedule,
                    "cfg scale": scale,
                    "noise": noise,
                    "batch": batch,
                    "window": window,
                    "steps": len(order.steps),
                    "calls": sum(calls) / len(calls),
                    "ms per image": 1e3 * each,
                    "over step by step": by_step / each,
                    "equal images": (made == expected).all(1).float().mean().item(),
                }
            )
            print(describe(rows[-1]), flush=True)
    return rows


def describe(row: dict[str, object]) -> str:
    """Return one line of figures."""
    line = (
        "n {n:2}  cfg {cfg scale}  {noise:7}  batch {batch:2}  window {window:3}  {calls:5.1f} of "
        "{steps} calls  {ms per image:6.2f} ms an image  {over step by step:.2f}x  "
        "{equal images:.1%} of images equal"
    )
    return line.format(**row)


def main() -> None:
    """Measure every checkpoint, print, write JSON."""
    parser = make_parser(
        __doc__,
        "python3 scripts/benchmarks/jacobi.py --gpt-ckpt pretrained_models/small/digits-4x",
    )
    parser.add_argument("--gpt-ckpt", nargs="+", required=True, help="checkpoints to decode with")
    parser.add_argument("--images", type=positive_int, default=200, help="images per row")
    parser.add_argument(
        "--batch", type=positive_int, nargs="+", default=[1, 8], help="images at once"
    )
    parser.add_argument(
        "--windows", type=positive_int, nargs="+", default=[2, 4, 8, 64], help="steps at once"
    )
    parser.add_argument(
        "--noise", choices=NOISES, nargs="+", default=list(NOISES), help="kinds of random numbers"
    )
    parser.add_argument(
        "--cfg-scales", type=float, nargs="+", default=[1.0, 1.5, 2.0], help="CFG scales"
    )
    parser.add_argument(
        "--precision", choices=["none", "bf16"], default="none", help="type of the weights"
    )
    parser.add_argument("--output", default="jacobi.json", help="JSON to write")
    args = parser.parse_args()
    for path in args.gpt_ckpt:
        weights_path(path, "--gpt-ckpt")
    results = {}
    for path in args.gpt_ckpt:
        print(path)
        rows = 2 * max(args.batch) * max(args.windows)
        results[path] = measure(args, load_decoder(path, rows, args.precision))
    write_results(args, results)


if __name__ == "__main__":
    run_main(main)
