"""Tell what works on this machine and how fast: for a machine seen for the first time.

It describes the machine, recomputes stored results of the published code on each device with each
decoder and precision, resumes and shards a tiny training run, and measures sampling and training
against the machine's own ceilings and against the published way of doing the same. Checkpoints,
codes and images are checked if given. The last thing on the screen is a table of what is ok, slow
and broken, with advice; a Markdown and a JSON file hold the same. The exit status is 1 if something
is broken. PAR_CPU=avx2 or PAR_CPU=avx512 in the environment declares a lesser processor.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    from autoregressive.models.config import GPT_models
    from scripts.diagnosis.acceptance import ACCEPTANCE_MINUTES, FOLDERS, accept
    from scripts.diagnosis.curves import describe_run
    from scripts.diagnosis.examination import (
        DEFAULT_OUTPUT,
        FULL_MINUTES,
        FULL_N,
        QUICK_MINUTES,
        QUICK_N,
        examine,
    )
    from utils.options import make_parser, non_negative_float, positive_int, run_main
except ImportError as error:  # the one thing that no check could report
    python = Path(__file__).resolve().parents[1] / ".venv" / "bin" / "python"
    hint = f"; or use {python}, which quickstart.sh made" if python.exists() else ""
    install = f"{sys.executable} -m pip install -r requirements.txt"
    sys.exit(f"broken: {error}; install the packages: {install}{hint}")


def make_doctor_parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = make_parser(__doc__, "python3 scripts/doctor.py --quick")
    parser.add_argument("--quick", action="store_true", help="two minutes at most, fewer checks")
    parser.add_argument(
        "--minutes",
        type=non_negative_float,
        help=f"time for all checks (default: {FULL_MINUTES}; with --quick {QUICK_MINUTES}; with "
        f"--acceptance {ACCEPTANCE_MINUTES})",
    )
    parser.add_argument(
        "--acceptance",
        choices=list(FOLDERS),
        help="gpu: run the tests that need a GPU and measure sampling, training, tokenizer and "
        "evaluator there, for the tables of scripts/benchmarks; the same command again measures "
        "what is missing. rehearsal: the same, as small as can be, on any machine",
    )
    parser.add_argument(
        "--output",
        help="folder for doctor.md and doctor.json, or a path that .md and .json are added to "
        f"(default: {DEFAULT_OUTPUT}); with --acceptance folder for JSON files and a page of "
        f"tables (default: {FOLDERS['gpu']}, of a rehearsal {FOLDERS['rehearsal']})",
    )
    speed = parser.add_argument_group("what to measure")
    speed.add_argument(
        "--gpt-model",
        choices=list(GPT_models),
        default="GPT-B",
        help="size of the GPT to measure, with random weights",
    )
    speed.add_argument(
        "--ar-token-num",
        type=positive_int,
        help=f"tokens predicted at once, n (default: {FULL_N}; with --quick {QUICK_N})",
    )
    speed.add_argument(
        "--batch",
        type=positive_int,
        help="images per batch and training step (default: 1 on a CPU, 32 on a GPU)",
    )
    text = "folder of a run of the GPT's training, such as results/GPT-XL-4x-384: say what its "
    text += (
        "curves look like (overfitting, wrong codes, learning rate ...), and examine nothing else"
    )
    parser.add_argument("--run", metavar="FOLDER", help=text)
    given = parser.add_argument_group("files to check, alone and together")
    given.add_argument("--gpt-ckpt", help="GPT: file of weights or folder of a checkpoint")
    given.add_argument("--vq-ckpt", help="tokenizer: file of weights or folder of a checkpoint")
    given.add_argument("--code-path", help="folder of codes, from extract_codes_c2i.sh")
    given.add_argument("--data-path", help="folder of images, one sub-folder per class")
    return parser


def main() -> None:
    """Examine this machine; exit with status 1 if something is broken."""
    options = make_doctor_parser().parse_args()
    if options.run is not None:
        print(describe_run(options.run))
    elif not (accept if options.acceptance else examine)(options):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
