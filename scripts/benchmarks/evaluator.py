"""The evaluator's three costs against the straightforward way, as ratios within one run.

Network: images/s of the 2015 Inception, random weights, against torchvision's blocks as they are
(eager float32, NCHW, batch norms of their own), resize included. FID: the trace at 2048 features
against scipy's matrix square root. Precision and Recall: two sets of 2048 features in the published
half precision.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from evaluations.c2i.inception import Inception2015, build_inception
from evaluations.c2i.metrics import frechet_distance, mean_and_covariance, precision_recall
from scripts.benchmarks.common import fastest, write_results
from utils.distributed import init_distributed
from utils.options import make_parser, positive_int, run_main
from utils.performance import peak_flops

# of one image at 299 x 299: multiply-adds of the convolutions, counted once with a hook
FLOPS = 2 * 5.73e9


@torch.inference_mode()
def network_figures(args: Namespace, device: torch.device) -> dict[str, float]:
    """Images/s of each way."""
    torch.manual_seed(0)
    plain = Inception2015().eval().requires_grad_(False)
    ours = build_inception(plain.state_dict(), "random").to(device)
    plain = plain.to(device)
    images = torch.randint(0, 256, (args.batch_size, 256, 256, 3), dtype=torch.uint8, device=device)
    ways = {"straightforward": plain, "ours": ours}
    if args.compile:
        ways["compiled"] = torch.compile(ours)
    figures = {}
    for way, network in ways.items():
        network(images)
        figures[way] = args.batch_size / fastest(partial(network, images), args.repeats)
        print(
            f"network    {way:16} {figures[way]:8.1f} images/s "
            f"{figures[way] / figures['straightforward']:5.2f}x"
        )
    return figures


def frechet_figures(width: int) -> dict[str, float]:
    """Seconds of each way at ``width`` features; the distances must agree."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((width, width)) / (45 * (width / 2048) ** 0.5)
    first, second = (
        mean_and_covariance((rng.standard_normal((5000, width)) @ mix * scale).astype(np.float32))
        for scale in (1.0, 1.1)
    )
    figures, found = {}, {}
    for method in ("sqrtm", "symmetric"):
        started = time.perf_counter()
        found[method] = frechet_distance(*first, *second, method)
        figures[method] = time.perf_counter() - started
        print(
            f"FID trace  {method:16} {figures[method]:8.2f} s        "
            f"{figures['sqrtm'] / figures[method]:5.2f}x"
        )
    print(f"           differ by {abs(found['sqrtm'] / found['symmetric'] - 1):.1e}")
    return figures


def precision_figures(count: int, device: torch.device) -> dict[str, float]:
    """Seconds for two sets of ``count`` rows in the half mode and in float32."""
    rng = np.random.default_rng(0)
    first, second = (
        np.abs(rng.standard_normal((count, 2048))).astype(np.float32) * 0.4 for _ in range(2)
    )
    figures = {}
    for name, exact in (("half", False), ("float32", True)):
        started = time.perf_counter()
        result = precision_recall(first, second, exact=exact, device=device)
        figures[name] = time.perf_counter() - started
        blocks = f"{result.float32_blocks} of {result.blocks} blocks in float32"
        print(f"P and R    {name:16} {figures[name]:8.2f} s  {count:,} x {count:,}, {blocks}")
    return figures


def main() -> None:
    """Measure, print, write JSON."""
    parser = make_parser(
        __doc__, "python3 scripts/benchmarks/evaluator.py --batch-size 16 --output evaluator.json"
    )
    parser.add_argument("--batch-size", type=positive_int, default=16, help="images a forward pass")
    parser.add_argument(
        "--repeats", type=positive_int, default=3, help="batches timed, of which the fastest counts"
    )
    parser.add_argument(
        "--features",
        type=positive_int,
        default=10_000,
        help="rows of each set for Precision, Recall",
    )
    parser.add_argument(
        "--width", type=positive_int, default=2048, help="features per image in the FID trace"
    )
    parser.add_argument("--compile", action="store_true", help="measure the compiled network too")
    parser.add_argument("--output", default="evaluator.json", help="JSON to write")
    args = parser.parse_args()
    device = init_distributed().device
    network = network_figures(args, device)
    peak = peak_flops(device, "none")[0]
    best = max(network.values()) * FLOPS
    print(f"           {best / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s")
    results = {"images/s": network, "frechet s": frechet_figures(args.width)}
    results |= {
        "precision s": precision_figures(args.features, device),
        "GFLOP/s": best / 1e9,
        "peak": peak / 1e9,
    }
    write_results(args, results)


if __name__ == "__main__":
    run_main(main)
