"""E5: does it matter which way regions are cut? Two halves, and four quarters or stripes.

Images are nearly mirror-symmetric, so left and right halves may depend on one another more.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.experiments.arms import Arm, compare
from utils.options import run_main

BASE = "one at a time"
ARMS = {
    BASE: Arm(1),
    "n = 2, left and right": Arm(2),
    "n = 2, top and bottom": Arm(2, ("--order", "2x1")),
    "n = 4, quarters": Arm(4),
    "n = 4, rows": Arm(4, ("--order", "4x1")),
    "n = 4, columns": Arm(4, ("--order", "1x4")),
}


if __name__ == "__main__":
    run_main(lambda: compare(__doc__, "e5", ARMS, BASE))
