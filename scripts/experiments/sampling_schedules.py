"""Plot what --cfg-schedule and --temperature-schedule do over the 147 steps of a PAR-4x model."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib

matplotlib.use("Agg")  # draws to files and needs no display
from matplotlib import pyplot

from autoregressive.decoding.sampling import (
    CFG_SCHEDULES,
    TEMPERATURE_SCHEDULES,
    SamplingOptions,
)
from autoregressive.models.region_order import RegionOrder
from scripts.experiments.common import save_figure
from utils.options import make_parser, run_main

STYLES = ("-", "--", "-.", ":")


def main() -> None:
    """Draw both, each value at the number of tokens before its step."""
    parser = make_parser(__doc__, "python3 scripts/experiments/sampling_schedules.py")
    parser.add_argument("--output", default="assets/sampling_schedules.png", help="PNG to write")
    args = parser.parse_args()
    order = RegionOrder.build(24, 4)
    total, decoded = order.num_tokens, [step.first for step in order.steps]

    guided = {f"--cfg-schedule {s}": SamplingOptions(4.0, cfg_schedule=s) for s in CFG_SCHEDULES}
    guided["--cfg-interval 288"] = SamplingOptions(4.0, cfg_interval=288)
    tempered = {
        f"--temperature-schedule {s}": SamplingOptions(temperature_schedule=s, temperature_end=0.7)
        for s in TEMPERATURE_SCHEDULES
    }
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for (label, options), style in zip(guided.items(), STYLES, strict=True):
        left.plot(decoded, [options.scale(d, total) for d in decoded], style, label=label)
    for (label, options), style in zip(tempered.items(), STYLES, strict=False):
        right.plot(decoded, [options.temperature_at(d, total) for d in decoded], style, label=label)
    left.set_ylabel("guidance scale, --cfg-scale 4")
    right.set_ylabel("temperature, --temperature-end 0.7")
    for axis in (left, right):
        axis.set_xlabel("codes decoded, of 576")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    save_figure(figure, Path(args.output))
    print(args.output)


if __name__ == "__main__":
    run_main(main)
