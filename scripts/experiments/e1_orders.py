"""E1: the paper's table 4 by the loss. Which order, start and attention in the group cost what?

Every arm is compared with raster order one token at a time, over the same held-out images.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.experiments.arms import Arm, compare
from utils.options import run_main

BASE = "raster, n = 1"
ARMS = {
    BASE: Arm(1),
    "region, one at a time": Arm(4, ("--schedule", "1x64")),
    "region, n = 4": Arm(4),
    "region, n = 4, causal in the group": Arm(4, ("--group-attention", "causal")),
    "region, n = 4, no sequential start": Arm(4, ("--schedule", "4x16")),
    "raster, n = 4": Arm(4, ("--order", "raster")),
    "region, n = 2": Arm(2),
    "region, n = 8": Arm(8),
    "region, n = 16": Arm(16),
}


if __name__ == "__main__":
    run_main(lambda: compare(__doc__, "e1", ARMS, BASE))
