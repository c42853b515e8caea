"""GPT checkpoint -> one picture, a row of images per class."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from autoregressive.models.generate import generate, image_randomness
from autoregressive.sample.pipeline import add_model_options, add_sampling_options, load_pipeline
from utils.distributed import init_distributed
from utils.files import prepare_folder
from utils.images import image_grid, save_png, to_uint8
from utils.logger import progress
from utils.options import add_retired, count, make_parser, positive_int, run, write_options


def parse_args() -> Namespace:
    """Options; names and defaults of the published script."""
    parser = make_parser(
        __doc__,
        "python3 autoregressive/sample/sample_c2i.py --vq-ckpt ./pretrained_models/vq_ds16_c2i.pt "
        "--gpt-ckpt ./pretrained_models/PAR-3B-4x.pt --classes 207 360 387 974 --images-per-class 4",
    )
    add_model_options(parser)
    add_sampling_options(parser, cfg_scale=4.0, top_k=2000, compiled=False)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--classes", type=int, nargs="+", default=[207, 360, 387, 974, 88, 979, 417, 279], help="class ids"
    )
    output.add_argument("--images-per-class", type=positive_int, default=4, help="images in a row")
    output.add_argument("--seed", type=count, default=0, help="of the tokens")
    output.add_argument("--output", default="samples/grid.png", help="picture to write")
    add_retired(parser, {"--cls-token-num": (True, "there is one class token")})
    return parser.parse_args()


def main() -> None:
    """Generate class by class and write the picture."""
    args = parse_args()
    output = Path(args.output)
    if output.suffix != ".png":
        raise ValueError(f"--output {output}: the picture's name must end in .png")
    world = init_distributed()
    pipeline = load_pipeline(args, world.device)
    num_classes = pipeline.gpt.config.num_classes
    if bad := [c for c in args.classes if not 0 <= c < num_classes]:
        raise ValueError(f"--classes {bad[0]}: the checkpoint has classes 0 to {num_classes - 1}")
    prepare_folder(output.parent, "--output")
    rows = []
    for row, label in enumerate(progress(world, "sampling", len(args.classes), unit="classes", items=args.classes)):
        indices = range(row * args.images_per_class, (row + 1) * args.images_per_class)
        _, uniforms = image_randomness(args.seed, indices, num_classes, pipeline.gpt.order.num_tokens)
        cond = torch.full((args.images_per_class,), label, device=world.device)  # (b,)
        codes = generate(pipeline.gpt, cond, torch.from_numpy(uniforms).to(world.device), pipeline.options)  # (b, T)
        rows.append(to_uint8(pipeline.decode(codes)).cpu().numpy())  # (b, S, S, 3)
    save_png(output, image_grid(np.concatenate(rows), columns=args.images_per_class))
    write_options(output.with_suffix(".json"), args, **pipeline.facts())
    print(f"{output}: one row per class, {' '.join(map(str, args.classes))} from the top")


if __name__ == "__main__":
    run(main)
