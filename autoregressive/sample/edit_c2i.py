"""Image, mask and class -> the image with the masked part made anew: inpainting, outpainting
(--margins), another class in a box, variations (--keep-share).

Masked codes are drawn, all others are forced at their step. A code sees those before it in the
region order only, which is spread over the whole image, so what comes later is not known when a
code is drawn: --candidates K makes K completions and keeps the one under which the kept codes are
likeliest.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from autoregressive.sample.command_lines import parse_edit as parse_args
from utils.options import answer_early, run_main

if __name__ == "__main__":
    answer_early(parse_args, __doc__)

import numpy as np

from autoregressive.sample.canvas import mask_of_codes, open_canvas
from autoregressive.sample.classes import class_labels, class_names, find_classes
from autoregressive.sample.edit import Completions, Edit, complete, encode
from autoregressive.sample.options import picture_path
from autoregressive.sample.pipeline import Pipeline, load_pipeline
from autoregressive.sample.trace import Trace, write_trace
from utils.distributed import init_distributed
from utils.environment import write_options
from utils.files import prepare_folder, require_file
from utils.images import labelled_rows, save_png
from utils.logger import progress

TRACE_FRAMES = 48


def codes_anew(args: Namespace, masked: np.ndarray, pipeline: Pipeline) -> np.ndarray:
    """Return bool (h, w), True for codes to make anew; ``ValueError`` if there is none."""
    anew = mask_of_codes(masked, pipeline.gpt.order.grid)  # (h, w)
    draws = np.random.default_rng(args.seed).random(anew.shape)
    anew |= draws >= args.keep_share
    if not anew.any():
        raise ValueError("nothing to make anew: give --mask, --box, --margins or --keep-share")
    return anew


def write(
    args: Namespace, pipeline: Pipeline, edit: Edit, made: list[Completions], labels: list[str]
) -> None:
    """Write results, sheet and record of all classes."""
    output = Path(args.output)
    results = np.concatenate([completions.results for completions in made])  # (R N, S, S, 3)
    paths = [output.with_stem(f"{output.stem}-{i}") for i in range(len(results))]
    paths = paths if len(results) > 1 else [output]
    for path, image in zip(paths, results, strict=True):
        save_png(path, image)

    rows = []
    for completions in made:
        row = [edit.pixels[None], edit.covered()[None], completions.results]
        if args.candidates > 1:
            row.append(completions.candidates.reshape(-1, *edit.pixels.shape))
        rows.append(np.concatenate(row))
    content = "image, mask, result" + ", candidates" * (args.candidates > 1)
    sheet = output.with_stem(f"{output.stem}-sheet")
    save_png(sheet, labelled_rows(np.stack(rows), [f"{label}: {content}" for label in labels]))

    facts = {"class_names": labels, "codes_made_anew": int(edit.anew.sum())}
    likelihoods = [completions.likelihoods.tolist() for completions in made]
    facts |= {"log_likelihood_of_kept_codes": likelihoods}
    write_options(output.with_suffix(".json"), args, **facts, **pipeline.facts())
    kept = "the image's own" if args.kept_pixels == "own" else "decoded from its codes"
    print(
        f"{', '.join(map(str, paths))}: {edit.anew.sum()} of {edit.anew.size} codes made anew, "
        f"kept pixels are {kept}; all in {sheet}"
    )


def main() -> None:
    """Encode the image, complete it for each class, write."""
    args = parse_args(__doc__)
    output = picture_path(args.output)
    require_file(args.image, "--image")
    if args.mask is not None:
        require_file(args.mask, "--mask")
    world = init_distributed()
    pipeline = load_pipeline(args, world, compiled=False)
    names = class_names(pipeline)
    args.classes = find_classes(args.classes, names)
    size = pipeline.image_size
    pixels, masked = open_canvas(
        args.image, size, args.mask, args.box or (), args.margins or (0, 0, 0, 0)
    )
    anew = codes_anew(args, masked, pipeline)  # (h, w)
    prepare_folder(output.parent, "--output")

    batch = args.images_per_class * args.candidates
    generator = pipeline.start_generator(args, batch, editing=True)
    edit = Edit(pixels, encode(pipeline, pixels), anew, generator)

    classes = progress(world, "editing", len(args.classes), unit="classes", items=args.classes)
    made, traces = [], []
    feather = args.feather if args.kept_pixels == "own" else None
    for row, label in enumerate(classes):
        randomness = pipeline.randomness(args.seed, range(row * batch, (row + 1) * batch))
        trace = Trace(pipeline, TRACE_FRAMES) if args.trace else None
        made.append(complete(pipeline, edit, label, randomness, args.candidates, feather, trace))
        traces.append(trace.frames if trace else [])
    write(args, pipeline, edit, made, class_labels(args.classes, names))
    if args.trace:
        write_trace(output, traces, columns=batch)


if __name__ == "__main__":
    run_main(main)
