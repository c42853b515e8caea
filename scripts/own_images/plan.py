"""A folder of class folders -> a plan that fits a budget of minutes on this machine, and its
commands.

Called by scripts/own_images.sh, which runs the commands. The plan is written to OUTPUT/plan.json; a
rerun takes it from there.
"""

from __future__ import annotations

import time

STARTED = time.time()  # before the imports, which are a part of the budget

import json
import shlex
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts.own_images.choices import Options, Plan, choose, default_output, describe, load_plan, warnings
from scripts.own_images.commands import commands
from scripts.own_images.images import held_out, look, split
from utils.files import atomic_path, prepare_folder, require_file, require_folder, write_json
from utils.options import make_parser, non_negative_int, positive_int, run_main

STARTUP = time.process_time()  # seconds that the imports of a program take here
RELEASED = ROOT / "pretrained_models" / "vq_ds16_c2i.pt"


def parse_args() -> Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__, "bash scripts/own_images.sh FOLDER --budget 20", arguments="FOLDER")
    parser.prog = "bash scripts/own_images.sh"
    parser.add_argument("folder", metavar="FOLDER", help="folder with one sub-folder of images per class")
    parser.add_argument("--size", type=positive_int, help="side of the images to make, pixels (default: what the budget allows)")
    parser.add_argument("--budget", type=float, default=20.0, help="minutes that all stages together may take")
    parser.add_argument("--output", help="folder to write to (default: results/own-images/ and the name of FOLDER)")
    parser.add_argument(
        "--tokenizer",
        help="file of a tokenizer to use instead of training one (default: the released one if it is in "
        "pretrained_models/ and the images and the budget allow 128 pixels)",
    )
    parser.add_argument("--finetune", action="store_true", help="train the --tokenizer further on the images")
    parser.add_argument("--no-flip", action="store_true", help="do not mirror images (for text, digits, all that has a left and a right)")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="random seed of the split, training and samples")
    parser.add_argument("--dry-run", action="store_true", help="print plan and commands; write and train nothing")
    parser.add_argument("--relative-to", default=".", help="folder that relative paths start from")
    parser.add_argument("--write-commands", help="file to write the commands to: per line title, file made, output folder, command")
    return parser.parse_args()


def read_options(args: Namespace) -> Options:
    """Return the options with absolute paths; ``ValueError`` for those that cannot be."""
    start = Path(args.relative_to)
    folder = require_folder(start / args.folder, "FOLDER", "expected one sub-folder of images per class").resolve()
    output = (start / args.output).resolve() if args.output else default_output(folder, ROOT)
    if output.is_relative_to(folder):
        raise ValueError(f"--output: {output} is inside FOLDER, whose images it would join; give another folder")
    if not args.budget > 0:
        raise ValueError(f"--budget {args.budget:g} must be a number of minutes above 0")
    if args.finetune and not args.tokenizer:
        raise ValueError("--finetune needs --tokenizer, the file to start from")
    tokenizer = str(require_file(start / args.tokenizer, "--tokenizer").resolve()) if args.tokenizer else None
    return Options(
        str(folder), str(output), args.size, args.budget, tokenizer, args.finetune, not args.no_flip, args.seed
    )  # fmt: skip


def find_plan(options: Options) -> Plan | None:
    """Return the plan of an earlier run, or None; ``ValueError`` if it had other options."""
    path = Path(options.output) / "plan.json"
    if not path.exists():
        if Path(options.output).is_dir() and any(Path(options.output).iterdir()):
            raise ValueError(f"--output: {options.output} holds other files; give a new folder")
        return None
    plan = load_plan(json.loads(path.read_text()))
    if differing := [k for k, v in asdict(options).items() if asdict(plan.options)[k] != v]:
        k = differing[0]
        raise ValueError(
            f"--output: {path} was made with another {k} ({asdict(plan.options)[k]} there, {asdict(options)[k]} now); "
            "give another --output, or the same options to go on"
        )
    return plan


def make_plan(options: Options) -> Plan:
    """Look at the images, measure this machine, choose."""
    images = look(Path(options.folder))
    held_out(images.counts)  # raises before the measurement if there are too few

    from evaluations.c2i.inception import PUBLISHED_WEIGHTS
    from scripts.own_images.measure import Machine, open_tokenizer

    inception = any((ROOT / "pretrained_models" / w.name).is_file() for w in PUBLISHED_WEIGHTS)
    path = options.tokenizer or (str(RELEASED) if RELEASED.is_file() and images.sides[1] >= 128 else None)
    print("measuring this machine, a few steps of each model", file=sys.stderr)
    return choose(options, images, Machine(STARTED, STARTUP), open_tokenizer(Path(path)) if path else None, inception)


def main() -> None:
    """Print plan, warnings and commands; write the plan and the split unless it is a dry run."""
    args = parse_args()
    options = read_options(args)
    earlier = find_plan(options)
    plan = earlier or make_plan(options)
    print(f"plan{f', of {options.output}/plan.json' if earlier else ''}")
    for line in describe(plan):
        print(f"  {line}")
    for line in warnings(plan):
        print(f"warning: {line}")
    if args.dry_run:
        for title, _, words in commands(plan):
            print(f"\n=== {title}\n+ {shlex.join(words)}")
        return
    prepare_folder(options.output, "--output")
    if not earlier:
        write_json(Path(options.output) / "plan.json", asdict(plan))
    split(Path(options.folder), Path(options.output) / "images", plan.images, plan.most, options.seed)
    if args.write_commands:
        with atomic_path(args.write_commands) as temporary:
            temporary.write_text("".join(f"{t}\t{made}\t{options.output}\t{shlex.join(w)}\n" for t, made, w in commands(plan)))


if __name__ == "__main__":
    run_main(main)
