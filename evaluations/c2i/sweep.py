"""Sample and evaluate a checkpoint at several values of a sampling option, such as the guidance
scale; plot FID and Inception Score, report the best value.

Samples go to OUTPUT/NAME-VALUE/, metrics to OUTPUT/sweep.json and sweep.md, the plot to
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

from evaluations.c2i.options import parse_sweep_args as parse_args
from utils.options import answer_early, run_main

if __name__ == "__main__":
    answer_early(parse_args, __doc__)

import matplotlib

matplotlib.use("Agg")  # draws to files and needs no display
from matplotlib import pyplot

from evaluations.c2i.report import OWN_NAMES, TITLES, markdown
from utils.environment import write_options
from utils.files import atomic_path, prepare_folder

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"cfg-scale": "cfg"}  # names of folders that are shorter than the option


def main() -> None:
    """Sample and evaluate at each value, write metrics and plot."""
    args = parse_args(__doc__)
    if not Path(args.reference).exists():
        raise ValueError(f"REF: {args.reference} does not exist")
    output = prepare_folder(args.output, "--output")
    option, values = swept(args)
    evaluate = [
        "bash",
        ROOT / "scripts/launch.sh",
        "evaluations/c2i/evaluator.py",
        Path(args.reference).resolve(),
    ]
    results = []
    for value in values:
        folder = output / f"{FOLDERS.get(option, option)}-{value}"
        samples = sample(option, value, folder, shlex.split(args.sample)).resolve()
        numbers = samples.with_suffix(".metrics.json")
        call(
            [*evaluate, samples, *shlex.split(args.evaluate or ""), "--output", numbers],
            "evaluation",
        )
        results.append(json.loads(numbers.read_text()))
    metrics = [r["metrics"] for r in results]
    with atomic_path(output / "sweep.md") as temporary:
        temporary.write_text(markdown(results))
    write_options(output / "sweep.json", args, option=option, values=values, metrics=metrics)
    distance, score = (n if n in metrics[0] else OWN_NAMES[n] for n in ("fid", "inception_score"))
    best = min(range(len(values)), key=lambda i: metrics[i][distance])
    title = f"{results[0]['sample_images']:,} images each"
    plot(option, values, metrics, (distance, score), best, title, output / "sweep.png")
    print((output / "sweep.md").read_text(), end="")
    print(
        f"best {TITLES[distance]} {metrics[best][distance]:.4f} at --{option} {values[best]}; "
        f"plot: {output / 'sweep.png'}"
    )


def swept(args: Namespace) -> tuple[str, list[str]]:
    """Return the option that is swept and its values: numbers in order, or words as written."""
    if args.cfg_scales:
        return "cfg-scale", [str(scale) for scale in sorted(set(args.cfg_scales))]
    option, *words = args.vary
    if option.startswith("-") or not words:
        raise ValueError(f"--vary {' '.join(args.vary)}: expected an option's name, then values")
    words = list(dict.fromkeys(words))
    return option, words if numbers(words) is None else sorted(words, key=float)


def numbers(words: list[str]) -> list[float] | None:
    """Return ``words`` as numbers, None if one is no number."""
    try:
        return [float(word) for word in words]
    except ValueError:
        return None


def sample(option: str, value: str, folder: Path, options: list[str]) -> Path:
    """Return the .npz of samples at ``value``; a finished one of an earlier sweep is kept."""
    script = ROOT / "scripts/autoregressive/sample_c2i.sh"
    call(
        ["bash", script, *options, f"--{option}", value, "--sample-dir", folder],
        f"sampling at --{option} {value}",
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


def plot(
    option: str,
    values: list[str],
    metrics: list[dict[str, float]],
    names: tuple[str, str],
    best: int,
    title: str,
    path: Path,
) -> None:
    """Plot two metrics, left and right axis, against the values, as a PNG; the ``best`` value of
    the first is marked.
    """
    places = numbers(values) or values
    figure, left = pyplot.subplots(figsize=(6, 4), layout="constrained")
    right = left.twinx()
    for axis, name, style in zip((left, right), names, ("C0o-", "C1s--"), strict=True):
        axis.plot(places, [m[name] for m in metrics], style)
        axis.set_ylabel(TITLES[name], color=style[:2])
        axis.tick_params(axis="y", labelcolor=style[:2])
    height = metrics[best][names[0]]
    at = (places[best], height)
    left.annotate(f"{height:.2f}", at, (0, 9), textcoords="offset points")
    left.plot([places[best]], [height], "C0*", markersize=14)
    figure.suptitle(title)
    left.set_xlabel(f"--{option}")
    left.grid(alpha=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    run_main(main)
