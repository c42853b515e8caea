"""A folder of class folders -> a plan that fits a budget of minutes on this machine.

Called by scripts/own_images.sh, which runs the plan's commands. The plan is written to
OUTPUT/plan.json, from which a rerun takes it.
"""

from __future__ import annotations

import time

STARTED = time.time()  # before the imports, which are a part of the budget

import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.options import answer_early, make_parser, non_negative_int, positive_int, run_main


def parse_args() -> Namespace:
    """Parse the command line."""
    example = "bash scripts/own_images.sh FOLDER --budget 20"
    parser = make_parser(__doc__, example, arguments="FOLDER")
    parser.prog = "bash scripts/own_images.sh"
    text = "folder with one sub-folder of images per class"
    parser.add_argument("folder", metavar="FOLDER", help=text)
    text = "minutes that all stages together may take"
    parser.add_argument("--budget", type=float, default=20.0, help=text)
    text = "side of the images to make, pixels (default: the largest that the budget allows)"
    parser.add_argument("--size", type=positive_int, help=text)
    text = "folder to write to (default: results/own-images/ and the name of FOLDER)"
    parser.add_argument("--output", help=text)
    text = (
        "file of a tokenizer to use instead of training one (default: the released one, if it is "
        "in pretrained_models/ and images and budget allow 128 pixels)"
    )
    parser.add_argument("--tokenizer", metavar="FILE", help=text)
    text = "train the tokenizer of --tokenizer further on the images"
    parser.add_argument("--finetune", action="store_true", help=text)
    text = "do not mirror images (for text, digits, all that has a left and a right)"
    parser.add_argument("--no-flip", action="store_true", help=text)
    text = "random seed of the split, training and samples"
    parser.add_argument("--seed", type=non_negative_int, default=0, help=text)
    text = "print plan and commands; train and write nothing"
    parser.add_argument("--dry-run", action="store_true", help=text)
    text = "folder that relative paths start from"
    parser.add_argument("--relative-to", metavar="FOLDER", default=".", help=text)
    text = "file for the stages, a line each: title, file made, output folder, command"
    parser.add_argument("--write-commands", metavar="FILE", help=text)
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(parse_args)

from scripts.own_images.choices import Options, Plan, choose, load_plan
from scripts.own_images.commands import commands
from scripts.own_images.explain import describe, warnings
from scripts.own_images.images import held_out, look, split
from utils.files import atomic_path, prepare_folder, require_file, require_folder, write_json

STARTUP = time.process_time()  # seconds that the imports of a program take here
PRETRAINED = ROOT / "pretrained_models"


def read_options(args: Namespace) -> Options:
    """Return the options with absolute paths; ``ValueError`` for those that cannot be."""
    start, hint = Path(args.relative_to), "expected one sub-folder of images per class"
    folder = require_folder(start / args.folder, "FOLDER", hint).resolve()
    output = ROOT / "results" / "own-images" / folder.name
    if args.output:
        output = (start / args.output).resolve()
    if output.is_relative_to(folder):
        raise ValueError(f"--output: {output} is inside FOLDER, among the images; give another")
    if not 0 < args.budget < float("inf"):
        raise ValueError(f"--budget {args.budget:g} must be a number of minutes above 0")
    if args.finetune and not args.tokenizer:
        raise ValueError("--finetune needs --tokenizer, the file to start from")
    tokenizer = None
    if args.tokenizer:
        tokenizer = str(require_file(start / args.tokenizer, "--tokenizer").resolve())
    return Options(
        folder=str(folder),
        output=str(output),
        size=args.size,
        budget=args.budget,
        tokenizer=tokenizer,
        finetune=args.finetune,
        flip=not args.no_flip,
        seed=args.seed,
    )


def find_plan(options: Options) -> Plan | None:
    """Return the plan of an earlier run, or None; ``ValueError`` if it had other options."""
    path = Path(options.output) / "plan.json"
    if not path.exists():
        if path.parent.is_dir() and any(path.parent.iterdir()):
            raise ValueError(f"--output: {path.parent} holds other files; give a new folder")
        return None
    plan = load_plan(path)
    before, now = asdict(plan.options), asdict(options)
    if differing := [k for k in now if before[k] != now[k]]:
        k = differing[0]
        raise ValueError(
            f"--output: {path} was made with another {k} ({before[k]} there, {now[k]} now); give "
            "another --output, or the same options to go on"
        )
    return plan


def make_plan(options: Options) -> Plan:
    """Look at the images, measure this machine, choose."""
    from evaluations.c2i.inception import PUBLISHED_WEIGHTS
    from scripts.own_images.measure import Machine, open_tokenizer

    images = look(Path(options.folder))
    held_out(images.counts)  # raises before the measurement if there are too few
    released = PRETRAINED / "vq_ds16_c2i.pt"
    path = options.tokenizer
    if path is None and released.is_file() and images.sides[1] >= 128:
        path = str(released)
    inception = any((PRETRAINED / weights.name).is_file() for weights in PUBLISHED_WEIGHTS)
    print("measuring this machine: a few steps of each model", file=sys.stderr)
    machine = Machine(STARTED, STARTUP)
    return choose(options, images, machine, open_tokenizer(path) if path else None, inception)


def main() -> None:
    """Print plan, warnings and commands; write plan and split unless it is a dry run."""
    args = parse_args()
    options = read_options(args)
    output, earlier = Path(options.output), find_plan(options)
    plan = earlier or make_plan(options)
    print(f"plan, of {output}/plan.json" if earlier else "plan")
    print("".join(f"  {line}\n" for line in describe(plan)), end="")
    print("".join(f"warning: {line}\n" for line in warnings(plan)), end="")
    stages = commands(plan)
    for text in (text for stage in stages for text in stage if set("\t\n") & set(text)):
        raise ValueError(f"the path in {text!r} has a tab or line break, which no command can have")
    if args.dry_run:
        print("".join(f"\n=== {title}\n+ {line}\n" for title, _, line in stages), end="")
        return

    prepare_folder(output, "--output")
    if not earlier:
        write_json(output / "plan.json", asdict(plan))
    split(Path(options.folder), output / "images", plan.images, plan.most, options.seed)
    if args.write_commands:
        lines = [f"{title}\t{made}\t{output}\t{line}\n" for title, made, line in stages]
        with atomic_path(args.write_commands) as temporary:
            temporary.write_text("".join(lines))


if __name__ == "__main__":
    run_main(main)
