"""E3: where do tokens that are predicted at once depend on one another?

Three figures: the loss of each group of 4 tokens predicted at once, less that of the same tokens in
the same order one at a time, which is their total correlation; the mutual information of two tokens
given the class, and given the first four tokens too, against their distance; the loss of each cell.

The mutual information is the gain in held-out loss of a probe that sees the other token: counting
pairs of 1,024 x 1,024 values would take more images than there are.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.models.region_order import RegionOrder
from dataset.codes import Codes, open_codes
from scripts.benchmarks.common import write_results
from scripts.experiments.arms import Arm, add_training_options, run_arms
from scripts.experiments.data import prepare
from scripts.experiments.plots import plot_cells, plot_lines
from utils.options import make_parser, positive_int, run_main

N, SIDE = 4, 8
TOGETHER, ALONE = "n = 4", "one at a time, same order"
ARMS = {TOGETHER: Arm(N), ALONE: Arm(N, ("--schedule", "1x64"))}
ORDER = RegionOrder.build(SIDE, N).permutation  # (T,)
WIDTH, BATCH = 128, 512


class PairProbe(nn.Module):
    """Logits of one token from its place, the class, and any of: another token, the first four."""

    def __init__(self, vocab_size: int, classes: int, tokens: int):
        super().__init__()
        self.token = nn.Embedding(vocab_size + 1, WIDTH)  # the last row: not shown
        self.start = nn.ModuleList(nn.Embedding(vocab_size + 1, WIDTH) for _ in range(N))
        self.label = nn.Embedding(classes, WIDTH)
        self.place = nn.Embedding(tokens, WIDTH)
        self.offset = nn.Embedding(tokens * tokens + 1, WIDTH)  # the last row: none shown
        self.layers = nn.Sequential(
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 4 * WIDTH),
            nn.GELU(),
            nn.Linear(4 * WIDTH, 4 * WIDTH),
            nn.GELU(),
            nn.Linear(4 * WIDTH, vocab_size),
        )

    def forward(
        self, label: Tensor, place: Tensor, pair: Tensor, token: Tensor, start: Tensor
    ) -> Tensor:
        """(B,), (B,), (B,), (B,), (B, N) -> (B, V)."""
        x = self.label(label) + self.place(place) + self.offset(pair) + self.token(token)  # (B, W)
        for i, table in enumerate(self.start):
            x = x + table(start[:, i])  # (B, W)
        return self.layers(x)  # (B, V)


def probe_losses(
    probe: PairProbe, codes: Tensor, labels: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return losses (4, B) of a random token of each image, and the pair (B,) of places.

    Rows: shown nothing, another token, the first four, both. codes: (B, T) raster.
    """
    batch, tokens = codes.shape
    hidden = probe.token.num_embeddings - 1
    rest = ORDER[N:]  # what is predicted after the first four
    chosen = torch.rand(batch, len(rest), generator=generator).argsort(1)[:, :2]  # (B, 2)
    place, other = rest[chosen].unbind(1)  # (B,) each
    rows = torch.arange(batch)
    target, seen, start = codes[rows, place], codes[rows, other], codes[:, ORDER[:N]]
    pair, none = place * tokens + other, torch.full((batch,), tokens * tokens)  # (B,)
    no_token, no_start = torch.full((batch,), hidden), torch.full((batch, N), hidden)
    shown = ((none, no_token, no_start), (pair, seen, no_start))
    shown += ((none, no_token, start), (pair, seen, start))
    losses = [
        F.cross_entropy(probe(labels, place, *given), target, reduction="none") for given in shown
    ]
    return torch.stack(losses), pair  # (4, B), (B,)


def draw(codes: Codes, images: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return codes (B, T) and labels (B,) of random crops."""
    x, y = codes.batch(images, rng.integers(codes.num_crops, size=len(images)))
    return torch.from_numpy(x), torch.from_numpy(y)


def mutual_information(args: Namespace, codes: Codes, held_out: Codes) -> dict[str, list[float]]:
    """Train the probe; return nats of mutual information by distance, and their standard errors."""
    torch.manual_seed(0)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    vocab, classes = codes.meta["codebook_size"], len(codes.meta["classes"])
    probe = PairProbe(vocab, classes, SIDE * SIDE)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=1e-3, weight_decay=0.01)
    steps = args.probe_steps
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        x, y = draw(codes, rng.integers(len(codes), size=BATCH), rng)
        loss = probe_losses(probe, x, y, generator)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    gains, far = [], []
    with torch.no_grad():
        for _ in range(max(steps // 10, 10)):
            x, y = draw(held_out, rng.integers(len(held_out), size=BATCH), rng)
            losses, pair = probe_losses(probe, x, y, generator)
            a, b = pair // SIDE**2, pair % SIDE**2
            distance = torch.hypot(a // SIDE - b // SIDE + 0.0, a % SIDE - b % SIDE + 0.0)
            gains.append(torch.stack([losses[0] - losses[1], losses[2] - losses[3]]))
            far.append(distance.round().long())
    gain, bins = torch.cat(gains, 1), torch.cat(far)  # (2, pairs), (pairs,)
    found: dict[str, list[float]] = {"distance": sorted(set(bins.tolist()))}
    for row, name in enumerate(("given the class", "given the first four too")):
        parts = [gain[row, bins == d] for d in found["distance"]]
        found[name] = [part.mean().item() for part in parts]
        found[f"{name}, error"] = [(part.std() / len(part) ** 0.5).item() for part in parts]
    return found


def group_gaps(results: dict[str, list[dict]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the total correlation (groups,) of each group of 4, in nats, and its errors."""
    gaps = []
    for together, alone in zip(results[TOGETHER], results[ALONE], strict=True):
        with np.load(together["losses"]) as a, np.load(alone["losses"]) as b:
            assert np.array_equal(a["raster"], b["raster"])
            gaps.append((a["losses"] - b["losses"]).reshape(len(a["losses"]), -1, N).sum(-1))
    gap = np.mean(gaps, axis=0)  # (I, groups)
    return gap.mean(0), gap.std(0) / len(gap) ** 0.5


def main() -> None:
    """Train two models and the probe, write JSON and three plots."""
    parser = make_parser(__doc__, "bash scripts/experiments/run.sh e3 --seeds 0 1 2")
    add_training_options(parser, samples=0)
    parser.add_argument(
        "--probe-steps", type=positive_int, default=4000, help="training steps of the pair probe"
    )
    args = parser.parse_args()
    if args.quick:
        args.probe_steps = 50
    results, data = run_arms(args, ARMS), prepare(args)
    mean, error = group_gaps(results)
    information = mutual_information(args, open_codes(data.codes), open_codes(data.held_out))
    with np.load(results[ALONE][0]["losses"]) as file:
        cells = np.zeros(SIDE * SIDE)
        cells[file["raster"]] = file["losses"].mean(0)
    folder = Path(args.output) / "e3" / args.data
    groups = {"mean": mean.tolist(), "error": error.tolist()}
    args.output = folder / "results.json"
    write_results(
        args,
        {"runs": results, "groups": groups, "information": information, "cells": cells.tolist()},
    )
    plot_lines(
        np.arange(len(mean)),
        {"": (mean, error)},
        ("group of 4 tokens, in the order of decoding", "total correlation, nats per image"),
        folder / "groups.png",
    )
    plot_lines(
        np.array(information["distance"]),
        {
            k: (np.array(v), np.array(information[f"{k}, error"]))
            for k, v in information.items()
            if k != "distance" and not k.endswith("error")
        },
        ("distance of two tokens, cells", "mutual information, nats"),
        folder / "information.png",
    )
    plot_cells(cells.reshape(SIDE, SIDE), "nats of each cell", folder / "cells.png")
    for i, (m, e) in enumerate(zip(mean, error, strict=True)):
        print(f"group {i:2}: {m:+.3f} +- {e:.3f} nats per image")


if __name__ == "__main__":
    run_main(main)
