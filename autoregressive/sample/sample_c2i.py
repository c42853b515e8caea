"""GPT checkpoint -> one picture: a row of images per class; --trace shows them fill in."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from autoregressive.sample.classes import class_labels, class_names, find_classes
from autoregressive.sample.options import (
    RETIRED_OPTIONS,
    add_model_options,
    add_sampling_options,
    parse_sampler,
    picture_path,
)
from autoregressive.sample.pipeline import load_pipeline
from autoregressive.sample.trace import Trace, write_trace
from utils.distributed import init_distributed
from utils.files import prepare_folder
from utils.images import labelled_rows, save_png, to_uint8
from utils.logger import progress
from utils.options import (
    add_retired,
    make_parser,
    non_negative_int,
    positive_int,
    run_main,
    write_options,
)

PUBLISHED_CLASSES = ["207", "360", "387", "974", "88", "979", "417", "279"]


def parse_args() -> Namespace:
    """Parse the options; names and defaults are those of the published script."""
    parser = make_parser(
        __doc__,
        "python3 autoregressive/sample/sample_c2i.py --vq-ckpt ./pretrained_models/vq_ds16_c2i.pt "
        '--gpt-ckpt ./pretrained_models/PAR-3B-4x.pt --classes "golden retriever, 360" '
        "--images-per-class 4 --trace",
    )
    add_model_options(parser)
    add_sampling_options(parser, cfg_scale=4.0, top_k=2000, compiled=False)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--classes",
        nargs="+",
        default=PUBLISHED_CLASSES,
        help="class ids, or names separated by commas, such as 'golden retriever, 360'",
    )
    output.add_argument("--images-per-class", type=positive_int, default=4, help="images per class")
    output.add_argument(
        "--seed", type=non_negative_int, default=0, help="random seed of the tokens"
    )
    output.add_argument("--output", default="samples/grid.png", help="file of the picture, .png")
    output.add_argument(
        "--trace",
        action="store_true",
        help="also write a .gif and a strip of the images as they fill in",
    )
    output.add_argument(
        "--trace-frames", type=positive_int, default=48, help="maximum number of frames of --trace"
    )
    add_retired(parser, RETIRED_OPTIONS)
    return parse_sampler(parser)


def main() -> None:
    """Generate class by class and write the picture."""
    args = parse_args()
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
