"""E2: what should stand in for tokens where a step has more than the one before?

The paper learns n - 1 vectors, without a position, whose queries and keys are therefore zero.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.experiments.arms import Arm, compare
from utils.options import run_main

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


if __name__ == "__main__":
    run_main(lambda: compare(__doc__, "e2", ARMS, BASE))
