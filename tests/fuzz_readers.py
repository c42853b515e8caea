"""What the commands read files by, called in this process by ``tests/fuzz.py``, with a folder that
holds a damaged file. Each returns what was read.
"""

from __future__ import annotations

import json
import logging
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoregressive.sample import sample_c2i_ddp
from autoregressive.sample.classes import class_names
from autoregressive.sample.pipeline import load_pipeline
from autoregressive.train.data import CodeBatches, open_training_codes
from autoregressive.train.extract_codes_c2i import check_shards
from dataset.codes import open_codes
from dataset.imagenet import open_image
from dataset.shards import finish_codes, shard_path, start_codes, write_shard
from evaluations.c2i import evaluator, inception
from evaluations.c2i.graphdef import read_graphdef
from evaluations.c2i.report import TITLES
from scripts import convert_codes, export_checkpoint, inspect_codes
from tests.helpers import (
    make_plan,
    small_state,
    take_step,
)
from tokenizer.load import load_vq
from utils.distributed import World
from utils.lock import hold, release_all
from utils.training.run_folder import RunFolder

WORLD = World(0, 1, torch.device("cpu"))
PLAN = make_plan(shard_size=5)
QUIET = logging.getLogger("fuzz")


def command(main: Callable[[], None], *words: object) -> str:
    """Run a command in this process; return what it printed."""
    sys.argv = ["command", *map(str, words)]
    with redirect_stdout(StringIO()) as printed:
        main()
    return printed.getvalue()


def train_on(folder: Path) -> object:
    """Read codes as training does: the checks at its start, then every batch."""
    names = ("image_size", "vocab_size", "num_classes", "downsample_size", "mix_code_path")
    args = Namespace(code_path=str(folder), **dict.fromkeys(names))
    codes = open_training_codes(args, WORLD)
    batches = CodeBatches(codes, args.vocab_size, 5, 0)
    read = [batches.rank_slice(step, WORLD) for step in range(4)]
    return [vars(args) | {"code_path": ""}, codes.num_classes, read]


def inspect(folder: Path) -> object:
    """Read codes as ``inspect_codes.py`` does."""
    output = folder / "report.png"
    command(inspect_codes.main, "--code-path", folder, "--output", output)
    return json.loads(output.with_suffix(".json").read_text())


def extract_again(folder: Path) -> object:
    """Check plan and shards as a rerun of extraction does, make again what it deletes."""
    start_codes(folder, PLAN)
    args = Namespace(code_path=folder, retry_skipped=False, verify=False)
    check_shards(args, WORLD, PLAN, QUIET)
    codes = open_codes(folder.parent / "whole codes")
    for shard in range(PLAN.num_shards):
        if not shard_path(folder, shard).exists():
            index = np.array(PLAN.shard_images(shard))
            crops = [codes.gather(index, np.full(len(index), c)) for c in range(2)]
            again = np.stack(crops, 1)
            write_shard(folder, PLAN, shard, again, codes.labels[index], index)
    meta = finish_codes(folder, PLAN, [f"{i}.png" for i in range(PLAN.num_images)])
    return [{k: v for k, v in meta.items() if k != "shards"}, train_on(folder)]


def resume(folder: Path) -> object:
    """Resume as training does; the checkpoint before may be taken in place of a damaged one."""
    state = small_state(0.0)
    steps = RunFolder(WORLD, folder, (folder,), 9, 0).resume(state, {"epochs": 3})
    expected = trained_state(steps)
    equal = all(torch.equal(v, expected.tensors()[k]) for k, v in state.tensors().items())
    equal &= torch.equal(state.guard.state, expected.guard.state)
    return "whole" if equal and steps in (1, 2) else [steps, state.tensors()]


@cache
def trained_state(steps: int) -> Any:
    """Return the state after a few steps; computed before the fork, where autograd cannot run."""
    state = small_state(1.0)
    for step in range(steps):
        take_step(state, step, 0.5)
    return state


def export(folder: Path) -> object:
    """Export a checkpoint and load the file as the sampler does."""
    output = folder / "out.safetensors"
    words = ("--checkpoint", folder / "0000002", "--output", output)
    command(export_checkpoint.main, *words)
    return sample_with(output, folder.parent / "vq.pt")


def sample_with(gpt: Path, vq: Path) -> object:
    """Load both files as the sampler does."""
    sys.argv = ["command", "--gpt-ckpt", str(gpt), "--vq-ckpt", str(vq), "--sample-dir", "/none"]
    sys.argv += ["--precision", "none", "--no-compile"]
    pipeline = load_pipeline(sample_c2i_ddp.parse_args(""), WORLD, False)
    names = class_names(pipeline)
    facts = [asdict(pipeline.gpt.config), names, pipeline.gpt_name, pipeline.image_size]
    return [pipeline.gpt.state_dict(), pipeline.vq.state_dict(), facts]


def tokenizer(folder: Path, vq_model: str | None = None, size: int | None = None) -> object:
    vq, name = load_vq(folder / "vq.pt", vq_model, codebook_size=size)
    return [vq.state_dict(), asdict(vq.config), name, vq.trained_size]


def evaluate(folder: Path) -> object:
    """Return the metrics that the evaluator writes."""
    words = ("ref.npz", "sam.npz", "--feature-network", "net.pt")
    words = tuple(folder / w if "." in w else w for w in words)
    printed = command(evaluator.main, *words, "--device", "cpu", "--class-fid")
    return [line for line in printed.splitlines() if line.partition(": ")[0] in TITLES.values()]


def graph(folder: Path, known: inception.WeightsFile | None = None) -> object:
    """Read a TensorFlow graph; known: the published file that it must be."""
    path = folder / "graph.pb"
    inception.PUBLISHED_WEIGHTS = (known,)
    inception.find_weights(path, folder, allow_unknown=known is None)
    try:
        nodes = read_graphdef(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error  # as ``load_inception`` does
    return {name: [node.op, node.value, node.switches] for name, node in nodes.items()}


def picture(folder: Path, name: str) -> object:
    return np.asarray(open_image(folder / name))


def convert(folder: Path, name: str) -> object:
    """Return the shards that conversion makes of another project's codes."""
    words = ("--code-path", folder / name, "--output", folder / "out", "--codebook-size", 64)
    command(convert_codes.main, *words)
    codes = open_codes(folder / "out")
    return [codes.batch(np.arange(len(codes)), np.zeros(len(codes), int)), codes.num_classes]


def records(folder: Path) -> object:
    """Read what says who holds a folder, how samples were made."""
    hold(folder / ".lock", WORLD, str(folder))
    release_all(delete=False)
    return evaluate(folder)
