"""GPT checkpoint -> one picture: a row of images per class; --trace shows them fill in."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from autoregressive.sample.command_lines import parse_picture as parse_args
from utils.options import answer_early, run_main

if __name__ == "__main__":
    answer_early(parse_args, __doc__)

import numpy as np
import torch

from autoregressive.sample.classes import class_labels, class_names, find_classes
from autoregressive.sample.options import picture_path
from autoregressive.sample.pipeline import load_pipeline
from autoregressive.sample.trace import Trace, write_trace
from utils.distributed import init_distributed
from utils.environment import write_options
from utils.files import prepare_folder
from utils.images import labelled_rows, save_png, to_uint8
from utils.logger import progress


def main() -> None:
    """Generate class by class and write the picture."""
    args = parse_args(__doc__)
    output = picture_path(args.output)
    world = init_distributed()
    if args.trace and args.compile and world.device.type == "cuda":
        raise ValueError(
            "--trace looks at every step, which --compile makes one of on CUDA; leave --compile out"
        )
    pipeline = load_pipeline(args, world, compiled=False)
    names = class_names(pipeline)
    args.classes = find_classes(args.classes, names)
    prepare_folder(output.parent, "--output")
    generator = pipeline.start_generator(args, args.images_per_class)
    rows, traces, calls = [], [], []
    classes = progress(world, "sampling", len(args.classes), unit="classes", items=args.classes)
    for row, label in enumerate(classes):
        indices = range(row * args.images_per_class, (row + 1) * args.images_per_class)
        randomness = pipeline.randomness(args.seed, indices)  # (b, T)
        cond = torch.full((args.images_per_class,), label, device=world.device)  # (b,)
        trace = Trace(pipeline, args.trace_frames) if args.trace else None
        codes = generator(cond, randomness, trace)  # (b, T)
        calls.append(generator.calls)
        rows.append(to_uint8(pipeline.decode(codes)).cpu().numpy())  # (b, S, S, 3)
        if trace:
            traces.append(trace.frames)
    labels = class_labels(args.classes, names)
    save_png(output, labelled_rows(np.stack(rows), labels))
    write_options(output.with_suffix(".json"), args, class_names=labels, **pipeline.facts())
    steps = len(pipeline.gpt.order.steps)
    by_jacobi = f", in {np.mean(calls):.1f} forward calls, not {steps}" if args.jacobi else ""
    print(f"{output}: a row each of {', '.join(labels)}{by_jacobi}")
    if args.trace:
        write_trace(output, traces, args.images_per_class)


if __name__ == "__main__":
    run_main(main)
