"""What a finished run of scripts/own_images.sh made: pictures, metrics with their meaning, next steps."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts.own_images.choices import GPTS, Plan, load_plan
from scripts.own_images.commands import Files, draw, train_gpt
from utils.options import make_parser, run_main

# name in a .metrics.json -> title, meaning
MEANING = {
    "fid": ("{distance}", "how far apart the features of two sets are; lower is better"),
    "sfid": ("sFID", "the same for the layout of images; lower is better"),
    "precision": ("Precision", "share of images that look like some reference image"),
    "recall": ("Recall", "share of reference images that some image looks like: variety"),
    "inception_score": ("{score}", "sure and varied classes; higher is better"),
    "class_accuracy": ("Class accuracy", "share that the classifier takes for the intended class"),
}


def metrics_table(plan: Plan, files: Files) -> list[str]:
    """Return the metrics of samples, reconstructions and real images, a line each with its meaning."""
    paths = (files.samples, files.reconstructions, f"{files.reconstructions}-inputs")
    columns = [json.loads((ROOT / f"{path}.metrics.json").read_text()) for path in paths]
    own = plan.classifier_epochs > 0
    names = {
        "distance": "Frechet distance *" if own else "FID",
        "score": "Classifier's score *" if own else "Inception Score",
    }
    counts = [f"{column['sample_images']:,}" for column in columns]
    lines = [f"{'':22}{'samples':>12}{'reconstr.':>12}{'real':>12}", f"{'images':22}" + "".join(f"{c:>12}" for c in counts)]
    for key, (title, meaning) in MEANING.items():
        if all(key in column["metrics"] for column in columns):
            numbers = "".join(f"{column['metrics'][key]:12.3f}" for column in columns)
            lines.append(f"{title.format(**names):22}{numbers}   {meaning}")
    psnr = json.loads((ROOT / f"{files.reconstructions}.json").read_text())["psnr"]
    lines.append(f"{'PSNR, dB':22}{'':12}{psnr:12.2f}{'':12}   how exactly the tokenizer keeps pixels; the samples' ceiling")
    lines.append(
        "real: held-out images that nothing was trained on, the yardstick: no sampler does better by much; "
        "reconstr.: the same after the tokenizer"
    )
    if own:
        lines.append(
            "* in the features of a small classifier trained on these images: not FID, not Inception Score, "
            "comparable only within this folder"
        )
    return lines


def next_steps(plan: Plan, files: Files) -> list[tuple[str, str]]:
    """Return what to do next: purpose, command."""
    options, output = plan.options, files.output
    again = ["bash", "scripts/own_images.sh", options.folder, "--budget", f"{6 * options.budget:g}"]
    again += ["--output", f"{output}-longer"] + ([] if options.flip else ["--no-flip"])
    larger = list(GPTS)[min(list(GPTS).index(plan.gpt) + 1, len(GPTS) - 1)]
    longer = [*train_gpt(plan, files, f"{output}/gpt-longer", 4 * plan.gpt_epochs), "--gpt-ckpt", files.gpt]
    bigger = train_gpt(plan, files, f"{output}/gpt-bigger", 4 * plan.gpt_epochs, larger)
    steps = [
        ("more samples, or of other classes (--help: guidance, temperature)", draw(plan, files)),
        ("train the GPT longer, from where it is", longer),
        (f"a bigger GPT ({larger}) on the same codes", bigger),
        ("all of it with six times the time (more images: put them into the folder first)", again),
    ]
    text = [(title, shlex.join(words)) for title, words in steps]
    text.append(
        (
            "photographs: the released tokenizer and GPT weights (pretrained_models/README.md), then a GPT fine-tuned from them",
            f"bash scripts/own_images.sh {shlex.quote(options.folder)} --size 256 --tokenizer ./pretrained_models/vq_ds16_c2i.pt "
            f"--output {shlex.quote(output + '-256')}\n      bash scripts/autoregressive/train_c2i.sh --gpt-ckpt "
            "./pretrained_models/PAR-XL-4x.pt --gpt-model GPT-XL ...   see autoregressive/train/README.md",
        )
    )
    return text


def main() -> None:
    """Print the report."""
    parser = make_parser(__doc__, "python3 scripts/own_images/report.py --output results/own-images/NAME")
    parser.add_argument("--output", required=True, help="folder that scripts/own_images.sh wrote")
    args = parser.parse_args()
    plan = load_plan(json.loads((Path(args.output) / "plan.json").read_text()))
    files = Files(plan)
    print(f"\npictures\n  samples, a row per class                        {files.picture}")
    print(f"  held-out images, each beside its reconstruction  {files.reconstructions}.png")
    print("\nmetrics against held-out images")
    for line in metrics_table(plan, files):
        print(f"  {line}")
    print("\nnext steps")
    for title, command in next_steps(plan, files):
        print(f"  {title}\n      {command}")


if __name__ == "__main__":
    run_main(main)
