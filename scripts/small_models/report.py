"""Gather what scripts/small_models.sh measured: metrics as JSON, loss curves as a picture.

Reads OUTPUT, the folder of that script, and writes OUTPUT/report.json and OUTPUT/curves.png.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib

matplotlib.use("Agg")  # draws to files and needs no display
from matplotlib import pyplot

from scripts.benchmarks.common import write_results
from scripts.experiments.common import newest, save_figure
from utils.options import make_parser, run_main


def read_curve(run: Path, name: str) -> list[tuple[int, float]]:
    """Return (step, value) of ``name`` in the metrics of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[name]) for line in lines if name in line]


def plot_curves(output: Path, path: Path) -> None:
    """Plot training loss, thin, and held-out loss, thick, of every GPT."""
    figure, axis = pyplot.subplots(figsize=(6.4, 3.8), layout="constrained")
    for i, run in enumerate(sorted((output / "gpt").iterdir())):
        n, style = run.name.split("-")[2].removesuffix("x"), ("-", "--")[i % 2]
        axis.plot(*zip(*read_curve(run, "loss"), strict=True), color="0.7", linewidth=0.8)
        held_out = read_curve(run, "val/loss")
        axis.plot(*zip(*held_out, strict=True), "o", linestyle=style, color="black", markersize=4)
        axis.annotate(
            f"n = {n}, held out", held_out[-1], (6, 0), textcoords="offset points", va="center"
        )
    axis.set_xlabel("step of 32 images")
    axis.set_ylabel("loss, nats per code")
    axis.set_xlim(0, 1.25 * held_out[-1][0])  # room for the labels
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)
    save_figure(figure, path)


def main() -> None:
    """Write the report and the picture."""
    parser = make_parser(__doc__, "python3 scripts/small_models/report.py --output results/small")
    parser.add_argument("--output", required=True, help="folder of scripts/small_models.sh")
    args = parser.parse_args()
    output = Path(args.output)
    report: dict[str, Any] = {"metrics": {}, "held-out loss": {}}
    for path in sorted(output.rglob("*.metrics.json")):
        report["metrics"][path.name.removesuffix(".metrics.json")] = json.loads(path.read_text())
    for run in sorted((output / "gpt").iterdir()):
        report["held-out loss"][run.name] = read_curve(run, "val/loss")
    record = json.loads(newest(output / "reconstructions", "*-32.json").read_text())
    report["reconstructions"] = {k: record[k] for k in ("psnr", "ssim", "codebook_used")}
    report["reconstructions"]["perplexity"] = record["perplexity"]
    args.output = str(output / "report.json")
    write_results(args, report)
    plot_curves(output, output / "curves.png")
    for name, result in report["metrics"].items():
        print(name, {k: round(v, 4) for k, v in result["metrics"].items()})


if __name__ == "__main__":
    run_main(main)
