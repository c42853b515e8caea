"""E2: what should stand in for tokens where a step has more than the one before?

The paper learns n - 1 vectors, without a position, whose queries and keys are therefore zero.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.experiments.arms import Arm, add_training_options, compare
from utils.options import make_parser, run_main

BASE = "learned, n = 4"
ARMS = {
    BASE: Arm(4),
    "one learned for all": Arm(4, ("--special-tokens", "shared")),
    "zeros": Arm(4, ("--special-tokens", "zeros")),
    "class embedding": Arm(4, ("--special-tokens", "class")),
    "last token again": Arm(4, ("--special-tokens", "last")),
    "learned, with positions": Arm(4, ("--special-positions", "predicted")),
    "one for all, with positions": Arm(
        4, ("--special-tokens", "shared", "--special-positions", "predicted")
    ),
    "last token, with positions": Arm(
        4, ("--special-tokens", "last", "--special-positions", "predicted")
    ),
}


def main() -> None:
    """Run every arm, write JSON and plot."""
    parser = make_parser(__doc__, "bash scripts/experiments/run.sh e2 --seeds 0 1 2")
    add_training_options(parser)
    compare(parser.parse_args(), ARMS, BASE, "e2")


if __name__ == "__main__":
    run_main(main)
