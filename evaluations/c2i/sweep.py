"""Sample and evaluate a checkpoint at several guidance scales; plot FID and Inception Score, report
the best scale.

Samples go to OUTPUT/cfg-SCALE/, metrics to OUTPUT/sweep.json and sweep.md, the plot to
OUTPUT/sweep.png. The same command continues an interrupted sweep.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib

matplotlib.use("Agg")  # draws to files and needs no display
from matplotlib import pyplot

from evaluations.c2i.report import markdown
from utils.files import atomic_path, prepare_folder
from utils.options import make_parser, run_main, write_options

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    """Sample and evaluate at each scale, write metrics and plot."""
    args = parse_args()
    if not Path(args.reference).exists():
        raise ValueError(f"REF: {args.reference} does not exist")
    output = prepare_folder(args.output, "--output")
    scales = sorted(set(args.cfg_scales))
    evaluate = [
        "bash",
        ROOT / "scripts/launch.sh",
        "evaluations/c2i/evaluator.py",
        Path(args.reference).resolve(),
    ]
    results = []
    for scale in scales:
        samples = sample(scale, output / f"cfg-{scale}", shlex.split(args.sample)).resolve()
        numbers = samples.with_suffix(".metrics.json")
        call(
            [*evaluate, samples, *shlex.split(args.evaluate or ""), "--output", numbers],
            "evaluation",
        )
        results.append(json.loads(numbers.read_text()))
    metrics = [r["metrics"] for r in results]
    with atomic_path(output / "sweep.md") as temporary:
        temporary.write_text(markdown(results))
    write_options(output / "sweep.json", args, scales=scales, metrics=metrics)
    plot(scales, metrics, output / "sweep.png")
    best = min(range(len(scales)), key=lambda i: metrics[i]["fid"])
    print((output / "sweep.md").read_text(), end="")
    print(
        f"best FID {metrics[best]['fid']:.4f} at --cfg-scale {scales[best]}; plot: "
        f"{output / 'sweep.png'}"
    )


def parse_args() -> Namespace:
    """Parse the command line."""
    parser = make_parser(
        __doc__,
        "python3 evaluations/c2i/sweep.py VIRTUAL_imagenet256_labeled.npz --cfg-scales 1.35 1.5 "
        "1.65 \\\n"
        '    --sample "--gpt-ckpt GPT.pt --vq-ckpt VQ.pt --image-size-eval 256" --output sweep',
    )
    parser.add_argument(
        "reference", metavar="REF", help="reference for the evaluator: .npz or folder of images"
    )
    parser.add_argument(
        "--cfg-scales", type=float, nargs="+", required=True, help="guidance scales to evaluate"
    )
    parser.add_argument(
        "--sample",
        required=True,
        metavar="OPTIONS",
        help="options for sample_c2i.sh, as one string",
    )
    parser.add_argument(
        "--evaluate", metavar="OPTIONS", help="options for evaluator.py, as one string"
    )
    parser.add_argument("--output", default="sweep", help="folder for samples, metrics and plot")
    return parser.parse_args()


def sample(scale: float, folder: Path, options: list[str]) -> Path:
    """Return the .npz of samples at ``scale``; a finished one of an earlier sweep is kept."""
    script = ROOT / "scripts/autoregressive/sample_c2i.sh"
    call(
        ["bash", script, *options, "--cfg-scale", scale, "--sample-dir", folder],
        f"sampling at --cfg-scale {scale}",
    )
    files = list(folder.glob("*.npz"))
    if len(files) != 1:
        raise ValueError(
            f"{folder} holds {len(files)} .npz files, expected one from this sweep; "
            "choose another --output"
        )
    return files[0]


def call(words: list[object], what: str) -> None:
    """Run a command with its output shown; ``ValueError`` on a non-zero exit status."""
    done = subprocess.run([str(w) for w in words], check=False)
    if done.returncode:
        raise ValueError(f"the {what} failed with status {done.returncode}, see above")


def plot(scales: list[float], metrics: list[dict[str, float]], path: Path) -> None:
    """Plot FID (left axis) and Inception Score (right axis) against the CFG scale, as a PNG."""
    figure, left = pyplot.subplots(figsize=(6, 4), layout="constrained")
    right = left.twinx()
    for axis, name, title, style in (
        (left, "fid", "FID", "C0o-"),
        (right, "inception_score", "Inception Score", "C1s--"),
    ):
        axis.plot(scales, [m[name] for m in metrics], style, label=title)
        axis.set_ylabel(title, color=style[:2])
        axis.tick_params(axis="y", labelcolor=style[:2])
    left.set_xlabel("guidance scale")
    left.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    run_main(main)
