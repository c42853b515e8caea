"""What a finished run of scripts/own_images.sh made: pictures, metrics, next steps."""

from __future__ import annotations

import json
import shlex
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.options import answer_early, make_parser, non_negative_int, run_main


def parse_args() -> Namespace:
    """Parse the command line."""
    example = "python3 scripts/own_images/report.py --output results/own-images/NAME"
    parser = make_parser(__doc__, example)
    text = "folder that scripts/own_images.sh wrote"
    parser.add_argument("--output", required=True, help=text)
    text = "seconds that the run took, or its last part; for the record"
    parser.add_argument("--seconds", type=non_negative_int, help=text)
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(parse_args)

from scripts.own_images.choices import GPTS, Plan, load_plan
from scripts.own_images.commands import Files, draw, q, train_gpt
from utils.environment import write_options
from utils.files import require_file

# name in a .metrics.json -> title, meaning
MEANING = {
    "fid": ("FID", "distance from the reference; lower is better"),
    "frechet_distance": ("Frechet distance *", "distance from the reference; lower is better"),
    "sfid": ("sFID", "the same, of layouts; lower is better"),
    "precision": ("Precision", "share that looks like some reference image"),
    "recall": ("Recall", "share of the reference that is covered: variety"),
    "inception_score": ("Inception Score", "clear and varied classes; higher is better"),
    "class_score": ("Class score *", "clear and varied classes; higher is better"),
    "class_accuracy": ("Class accuracy", "share that the classifier takes for its class"),
}


def read_metrics(files: Files) -> dict[str, dict]:
    """Return what the evaluator wrote about samples, decoded and real held-out images."""
    paths = {"samples": files.samples, "decoded": files.reconstructions}
    paths["real"] = f"{files.reconstructions}-inputs"
    return {
        name: json.loads((ROOT / f"{path}.metrics.json").read_text())
        for name, path in paths.items()
    }


def metrics_table(plan: Plan, measured: dict[str, dict], psnr: float) -> list[str]:
    """Return the metrics of samples, reconstructions and real images, a line each."""
    own = plan.classifier_epochs > 0
    columns = list(measured.values())
    images = "".join(f"{column['sample_images']:12,}" for column in columns)
    lines = [f"{'':20}{'samples':>12}{'decoded':>12}{'real':>12}", f"{'images':20}{images}"]
    for key, (title, meaning) in MEANING.items():
        if all(key in column["metrics"] for column in columns):
            numbers = "".join(f"{column['metrics'][key]:12.3f}" for column in columns)
            lines.append(f"{title:20}{numbers}   {meaning}")
    lines.append(f"{'PSNR, dB':20}{'':12}{psnr:12.2f}{'':12}   how exactly decoded pixels are kept")
    lines.append("real: other held-out images: samples can hardly be better")
    lines.append("decoded: these after the tokenizer, what samples could reach with this tokenizer")
    if own:
        lines.append(
            "* in the features of a classifier trained on these images: not FID, not the Inception"
        )
        lines.append("  Score; comparable only between runs on this folder with this classifier")
    return lines


def next_steps(plan: Plan, files: Files) -> list[tuple[str, str]]:
    """Return what to do next: purpose, command."""
    options, output, epochs = plan.options, files.output, 4 * plan.gpt_epochs
    sizes = list(GPTS)
    larger = sizes[min(sizes.index(plan.gpt) + 1, len(sizes) - 1)]
    again = ["bash", "scripts/own_images.sh", options.folder]
    again += [] if options.flip else ["--no-flip"]
    start = f" --gpt-ckpt {q(files.gpt)}"
    return [
        (
            "more samples (--help: classes, guidance, temperature)",
            draw(plan, files, options.seed + 1, f"{output}/samples-2.png"),
        ),
        (
            "train the GPT four times as long, from where it is",
            train_gpt(plan, files, f"{output}/gpt-longer", epochs, plan.gpt) + start,
        ),
        (
            f"a larger GPT, {larger}, on the same codes",
            train_gpt(plan, files, f"{output}/gpt-larger", epochs, larger),
        ),
        (
            "all of it longer; images added to the folder are used",
            shlex.join([*again, "--budget", f"{6 * options.budget:g}", "--output", f"{output}-2"]),
        ),
        (
            "photographs: the released tokenizer (pretrained_models/README.md), then GPT weights "
            "by --gpt-ckpt (autoregressive/train/README.md)",
            shlex.join([*again, "--size", "256", "--output", f"{output}-256"])
            + " --tokenizer ./pretrained_models/vq_ds16_c2i.pt",
        ),
    ]


def main() -> None:
    """Print the report, and write it to report.json."""
    args = parse_args()
    path = require_file(Path(args.output) / "plan.json", "--output", "not of own_images.sh")
    plan = load_plan(path)
    files = Files(plan)
    measured = read_metrics(files)
    psnr = json.loads((ROOT / f"{files.reconstructions}.json").read_text())["psnr"]
    metrics = {name: found["metrics"] for name, found in measured.items()}
    record = path.with_name("report.json")
    if not record.exists():  # a rerun of a finished run changes nothing
        facts = asdict(plan)
        for place in ("folder", "output"):  # of this machine alone
            del facts["options"][place]
        write_options(record, args, plan=facts, psnr=psnr, **metrics)
    print(
        f"\npictures\n  samples, a row per class                    {files.picture}\n"
        f"  held-out images beside their reconstruction  {files.reconstructions}.png"
    )
    print("\nmetrics against held-out images")
    print("".join(f"  {line}\n" for line in metrics_table(plan, measured, psnr)), end="")
    print(f"\nnext steps, in {ROOT} with this environment active ({Path(sys.prefix).name})")
    print("".join(f"  {title}\n      {line}\n" for title, line in next_steps(plan, files)), end="")


if __name__ == "__main__":
    run_main(main)
