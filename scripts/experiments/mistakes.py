"""Make the mistakes of training a GPT for real, on the quickstart's digits, and keep their curves.

Each run trains GPT-T for at least 600 steps with one thing wrong, and validates on held-out digits.
The curves go to scripts/diagnosis/curves/NAME.jsonl, by which `scripts/doctor.py --run` judges
others. Run scripts/quickstart.sh first. Finished runs are not made again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from autoregressive.models.region_order import RegionOrder
from dataset.codes import open_codes
from dataset.shards import finish_codes, plan_of, start_codes, write_shard
from scripts.experiments.common import ROOT, extract, newest, run
from utils.options import make_parser, run_main

CURVES = ROOT / "scripts" / "diagnosis" / "curves"
KEPT = ("step", "loss", "grad_norm", "skipped", "val/loss", "val/loss_first", "val/loss_rest")
STEPS, BATCH, N = 600, 16, 4
RNG = np.random.default_rng(0)


def in_region_order(codes: np.ndarray) -> np.ndarray:
    """Permute codes (N, crops, T) into region order: what a trainer that expects raster order gets
    from a program that has permuted them already.
    """
    side = round(codes.shape[-1] ** 0.5)
    return codes[..., RegionOrder.build(side, N).permutation.numpy()]


def shuffled(codes: np.ndarray) -> np.ndarray:
    """Shuffle the codes of each crop on its own: what a wrong reshape or a mixed-up file leaves."""
    return RNG.permuted(codes, axis=-1)


# name -> (change of the codes, of both sets; images kept; options of the trainer)
MISTAKES: dict[str, tuple[Callable | None, int | None, tuple[object, ...]]] = {
    "healthy": (None, None, ()),
    "overfitting": (None, 32, ()),
    "wrong order": (in_region_order, None, ()),
    "wrong codes": (shuffled, None, ()),
    "dead codebook": (None, None, ()),
    "learning rate too high": (None, None, ("--lr", 0.1, "--max-loss-spike", 0)),
    "learning rate too low": (None, None, ("--lr", 2e-6)),
}


def change_codes(source: Path, output: Path, change: Callable | None, images: int | None) -> Path:
    """Write the codes of ``source``, changed and cut to ``images``, and return their folder."""
    codes = open_codes(source)
    kept = np.linspace(0, len(codes) - 1, images or len(codes)).astype(np.int64)
    crops = [codes.gather(kept, np.full(len(kept), c)) for c in range(codes.num_crops)]
    changed = np.stack(crops, 1)  # (N, crops, T)
    if change is not None:
        changed = change(changed)
    plan = plan_of(codes.meta, source)
    plan = replace(plan, num_images=len(kept), shard_size=len(kept))
    start_codes(output, plan)
    write_shard(output, plan, 0, changed, codes.labels[kept], np.arange(len(kept)))
    finish_codes(output, plan, [str(i) for i in kept])
    return output


def collapsed(quickstart: Path, output: Path) -> Path:
    """Train a tokenizer at a learning rate 50 times too high, which leaves 5% of its codebook in
    use, and return its path.
    """
    run(
        *("bash", "scripts/tokenizer/train_vq.sh", "--data-path", quickstart / "digits" / "train"),
        *("--cloud-save-path", output, "--no-local-save", "--vq-model", "VQ-4"),
        *("--codebook-size", 256, "--image-size", 32, "--no-flip", "--epochs", 1, "--lr", 0.1),
        *("--global-batch-size", 40, "--perceptual-weight", 0, "--disc-weight", 0),
        *("--num-workers", 0),
    )
    return output / "VQ-4-32" / "checkpoints" / "0000100.pt"


def make_curve(name: str, quickstart: Path, output: Path, vq: Path) -> None:
    """Train with mistake ``name`` and keep its curves."""
    change, images, options = MISTAKES[name]
    work = output / name.replace(" ", "-")
    tokenizer = collapsed(quickstart, work) if name == "dead codebook" else vq
    folders = []
    for split in ("train", "test"):
        codes = output if tokenizer == vq else work
        codes = extract(tokenizer, quickstart / "digits" / split, codes / f"codes-{split}")
        cut = images if split == "train" else None
        folders.append(change_codes(codes, work / split, change, cut))
    train, held_out = folders
    crop_images = len(open_codes(train))
    run(
        *("bash", "scripts/autoregressive/train_c2i.sh", "--cloud-save-path", work),
        *("--no-local-save", "--code-path", train, "--val-code-path", held_out),
        *("--spe-token-num", N - 1, "--ar-token-num", N, "--image-size", 32),
        *("--gpt-model", "GPT-T", "--epochs", -(-STEPS * BATCH // crop_images), "--lr", 2e-3),
        *("--global-batch-size", BATCH, "--warmup-epochs", 0, "--dropout-p", 0),
        *("--attn-dropout-p", 0, "--token-dropout-p", 0, "--val-every", 50, "--log-every", 10),
        *("--val-images", 200, *options),
    )
    (metrics,) = work.glob("GPT-T*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    kept = [{"vocab_size": open_codes(train).meta["codebook_size"]}]
    kept += [{k: round(v, 4) for k, v in line.items() if k in KEPT} for line in lines]
    CURVES.mkdir(exist_ok=True)
    path = CURVES / f"{name.replace(' ', '-')}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    print(f"{path}: {len(kept)} lines")


def main() -> None:
    """Make every curve that is missing."""
    parser = make_parser(__doc__, "python3 scripts/experiments/mistakes.py")
    parser.add_argument("--quickstart", default="quickstart", help="folder of the quickstart")
    parser.add_argument("--output", default="results/mistakes", help="folder for the runs")
    parser.add_argument(
        "--names",
        nargs="+",
        choices=list(MISTAKES),
        default=list(MISTAKES),
        help="mistakes to make",
    )
    args = parser.parse_args()
    quickstart, output = Path(args.quickstart).resolve(), Path(args.output).resolve()
    vq = newest(quickstart, "tokenizer/*/checkpoints/*.pt")
    for name in args.names:
        make_curve(name, quickstart, output, vq)


if __name__ == "__main__":
    run_main(main)
