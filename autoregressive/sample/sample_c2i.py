"""GPT checkpoint -> one picture: a row of images per class; --trace shows them fill in."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor

from autoregressive.decoding.sampling import image_randomness
from autoregressive.sample.options import (
    RETIRED_OPTIONS,
    add_model_options,
    add_sampling_options,
    parse_sampler,
)
from autoregressive.sample.pipeline import Pipeline, load_pipeline
from utils.distributed import init_distributed
from utils.files import prepare_folder
from utils.images import image_grid, labelled_rows, save_gif, save_png, to_uint8
from utils.logger import progress
from utils.options import (
    add_retired,
    make_parser,
    non_negative_int,
    positive_int,
    run_main,
    write_options,
)

GREY = 96  # of codes that are not decoded yet
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


def class_names(pipeline: Pipeline) -> list[str]:
    """Return a name per class: ImageNet's in words, or those of the folders learned from."""
    names, num_classes = pipeline.classes, pipeline.gpt.config.num_classes
    if names is None or len(names) != num_classes:
        names = None if num_classes == 1000 else [str(i) for i in range(num_classes)]
    if names is not None and not any(re.fullmatch(r"n\d{8}", name) for name in names):
        return names
    # here: it takes a second or two, and other data sets need no names of it
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    wnids = info.label_names()
    known = set(wnids)
    return [info.label_name_to_description(n) if n in known else n for n in names or wnids]


def find_classes(words: list[str], names: list[str]) -> list[int]:
    """Return the class ids that ``--classes`` lists, as ids or as names between commas.

    Where classes are named by numbers, a number is an id. Raises ``ValueError`` if there is
    no such class.
    """
    found: list[int] = []
    for item in filter(None, map(str.strip, " ".join(words).split(","))):
        if all(part.isdigit() for part in item.split()):
            found += map(int, item.split())
        else:
            found.append(find_name(item, names))
    if not found:
        raise ValueError("--classes names no class")
    if bad := [i for i in found if i >= len(names)]:
        raise ValueError(f"--classes {bad[0]}: the checkpoint has classes 0 to {len(names) - 1}")
    return found


def find_name(name: str, names: list[str]) -> int:
    """Return the class of this name: one of its synonyms, else a part of only one class's name."""
    synonyms = [[s.strip().lower() for s in n.split(",")] for n in names]
    exact = [i for i, s in enumerate(synonyms) if name.lower() in s]
    found = exact or [i for i, n in enumerate(names) if name.lower() in n.lower()]
    if not found:
        raise ValueError(f"--classes {name}: the checkpoint has no class of this name")
    if len(found) > 1:
        raise ValueError(
            f"--classes {name}: which of {', '.join(f'{i} ({names[i]})' for i in found[:5])}?"
        )
    return found[0]


class Trace:
    """Frames of a batch as it is decoded: images of the tokens so far, grey where unknown."""

    def __init__(self, pipeline: Pipeline, frames: int):
        self.pipeline, steps = pipeline, len(pipeline.gpt.order.schedule)
        wanted = np.linspace(0, steps - 1, min(frames, steps)).round().astype(int)
        self.wanted = set(wanted.tolist())
        self.step = 0
        self.frames: list[np.ndarray] = []  # (B, S, S, 3) each

    def __call__(self, tokens: Tensor, decoded: int) -> None:
        """Take a frame: region-ordered tokens (B, T), the first ``decoded`` are known."""
        if self.step in self.wanted:
            order = self.pipeline.gpt.order
            codes = tokens[:, order.inverse.to(tokens.device)]  # (B, T)
            pixels = to_uint8(self.pipeline.decode(codes)).cpu().numpy()  # (B, S, S, 3)
            there = (order.inverse < decoded).view(order.grid).numpy()  # (h, w)
            side = pixels.shape[1] // order.grid[0]
            there = there.repeat(side, 0).repeat(side, 1)[None, :, :, None]  # (1, S, S, 1)
            self.frames.append(np.where(there, pixels, np.uint8(GREY)))
        self.step += 1


def main() -> None:
    """Generate class by class and write the picture."""
    args = parse_args()
    output = Path(args.output)
    if output.suffix != ".png":
        raise ValueError(f"--output {output}: the picture's name must end in .png")
    world = init_distributed()
    if args.trace and args.compile and world.device.type == "cuda":
        raise ValueError(
            "--trace looks at every step, which --compile makes one of on CUDA; leave --compile out"
        )
    pipeline = load_pipeline(args, world, compiled=False)
    names = class_names(pipeline)
    args.classes = find_classes(args.classes, names)
    prepare_folder(output.parent, "--output")
    way, reason = pipeline.choose_way(args.images_per_class)
    print(reason, file=sys.stderr)
    args.precision, args.compile = way.precision, way.compiled
    generator = pipeline.make_generator(way, args.images_per_class, args.quantize)
    num_classes, num_tokens = pipeline.gpt.config.num_classes, pipeline.gpt.order.num_tokens
    rows, traces = [], []
    classes = progress(world, "sampling", len(args.classes), unit="classes", items=args.classes)
    for row, label in enumerate(classes):
        indices = range(row * args.images_per_class, (row + 1) * args.images_per_class)
        _, uniforms = image_randomness(args.seed, indices, num_classes, num_tokens)
        cond = torch.full((args.images_per_class,), label, device=world.device)  # (b,)
        trace = Trace(pipeline, args.trace_frames) if args.trace else None
        codes = generator(cond, torch.from_numpy(uniforms).to(world.device), trace)  # (b, T)
        rows.append(to_uint8(pipeline.decode(codes)).cpu().numpy())  # (b, S, S, 3)
        if trace:
            traces.append(trace.frames)
    first_names = [name.split(",")[0] for name in names]
    labels = [f"{i} {first_names[i]}" if first_names[i] != str(i) else str(i) for i in args.classes]
    save_png(output, labelled_rows(np.stack(rows), labels))
    write_options(output.with_suffix(".json"), args, class_names=labels, **pipeline.facts())
    print(f"{output}: a row each of {', '.join(labels)}")
    if args.trace:
        write_trace(output, traces, args.images_per_class)


def write_trace(output: Path, traces: list[list[np.ndarray]], columns: int) -> None:
    """Write an animation of all rows of images, and a strip of eight moments of the first image."""
    frames = [image_grid(np.concatenate(rows), columns) for rows in zip(*traces, strict=True)]
    save_gif(output.with_suffix(".gif"), frames)
    moments = np.linspace(0, len(frames) - 1, min(8, len(frames))).round().astype(int)
    strip = np.stack([traces[0][i][0] for i in moments])  # (8, S, S, 3)
    save_png(output.with_name(f"{output.stem}-strip.png"), image_grid(strip, columns=len(strip)))
    print(f"{output.with_suffix('.gif')}: {len(frames)} frames")


if __name__ == "__main__":
    run_main(main)
