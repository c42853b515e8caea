"""A page to play with: images that fill in step by step, editing, and the order they are made in.

It needs nothing but this repository: the small models in pretrained_models/small are trained, and
the page asks nothing of any other host. Open the printed address in a browser; Ctrl-C ends it.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from autoregressive.sample.command_lines import parse_demo as parse_args
from utils.options import answer_early, run_main

if __name__ == "__main__":
    answer_early(parse_args, __doc__)

from autoregressive.sample.page.orders import describe_order
from autoregressive.sample.page.server import PageServer
from autoregressive.sample.page.studio import Model, Studio, load_model
from utils.distributed import init_distributed
from utils.presets import SMALL_PRESETS


def load_models(args: Namespace) -> list[Model]:
    """Load what the command line names."""
    world = init_distributed()
    names = args.model or ([] if args.gpt_ckpt else list(SMALL_PRESETS))
    download = ["--download"] if args.download else []
    models: list[Model] = []
    for name in names:
        way = models[0].way if models else None
        models.append(load_model(name, ["--model", name, *download], world, way))
    if args.gpt_ckpt:
        words = ["--gpt-ckpt", args.gpt_ckpt, "--vq-ckpt", args.vq_ckpt]
        models.append(load_model(Path(args.gpt_ckpt).stem, words, world))
    return models


def main() -> None:
    """Load the models and serve the page until it is interrupted."""
    args = parse_args(__doc__)
    studio = Studio(load_models(args))
    looks = {"/api/models": studio.list_models, "/api/order": describe_order}
    works = {"/api/generate": studio.generate, "/api/edit": studio.edit}
    try:
        server = PageServer((args.host, args.port), looks, works)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {args.host} --port {args.port}: {error}") from error
    print(f"{server.url}   ({', '.join(studio.models)})", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.jobs.close()
        print("stopped", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
