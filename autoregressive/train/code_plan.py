"""The plan of an extraction of codes and the listing of its images: made by process 0, for all."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from logging import Logger
from pathlib import Path
from typing import Any, TypeVar

from dataset.augmentation import crop_names
from dataset.imagenet import ImagePaths, list_images, say_if_enlarged
from dataset.shards import CodesPlan, start_codes
from tokenizer.vq_model import VQModel
from utils.checkpoints.weights_file import state_sha256
from utils.files import prepare_folder, require_folder
from utils.records import read_json

T = TypeVar("T")
LISTING = "listing.npz"


def make_plan(args: Namespace, vq: VQModel, name: str, **listing: Any) -> CodesPlan:
    """Return what the code folder will hold; options, listing and tokenizer must fit.

    listing: ``classes``, ``num_images`` and ``source_sha256`` of the plan.
    """
    if args.crop_range < 1.0:
        raise ValueError(f"--crop-range {args.crop_range} must be at least 1")
    return CodesPlan(
        **listing,
        image_size=args.image_size,
        grid=[vq.config.grid(args.image_size)] * 2,
        crops=crop_names(args.ten_crop, flips=not args.no_flip),
        crop_range=args.crop_range if args.ten_crop else 1.0,
        codebook_size=vq.config.codebook_size,
        tokenizer=name,
        tokenizer_sha256=state_sha256(vq.weights()),
        precision=args.precision,
        shard_size=args.shard_size,
    )


def list_and_plan(
    args: Namespace, vq: VQModel, name: str, logger: Logger
) -> tuple[ImagePaths, CodesPlan]:
    """List the images, and record plan and listing for the other processes; for process 0."""
    listing = list_images(args.data_path)
    samples = listing.samples[:100] if args.debug else listing.samples
    say_if_enlarged(samples, args.image_size, logger)
    paths = ImagePaths.pack(samples, args.data_path)
    sha256 = paths.sha256()
    plan = make_plan(
        args, vq, name, classes=listing.classes, num_images=len(paths), source_sha256=sha256
    )
    prepare_folder(args.code_path, "--code-path")
    start_codes(args.code_path, plan)
    if read_listing(args, plan) is None:
        paths.save(Path(args.code_path) / LISTING)
    return paths, plan


def wait_for_plan(
    args: Namespace, vq: VQModel, name: str, logger: Logger
) -> tuple[ImagePaths, CodesPlan]:
    """Return listing and plan of process 0, which may start later than this one.

    ``ValueError`` if they were made with other options.
    """
    require_folder(args.data_path, "--data-path")
    path = Path(args.code_path) / "plan.json"
    wait_for(path.exists, logger)
    recorded, names = read_json(path), ("classes", "num_images", "source_sha256")
    if not isinstance(recorded, dict) or not recorded.keys() >= set(names):
        raise ValueError(f"{path} is damaged: it lacks {' or '.join(names)}")
    plan = make_plan(args, vq, name, **{k: recorded[k] for k in names})
    start_codes(args.code_path, plan)
    return wait_for(lambda: read_listing(args, plan), logger), plan


def wait_for(look: Callable[[], T | None], logger: Logger) -> T:
    """Return what ``look`` finds, once it finds something."""
    started, patience = time.monotonic(), 60.0
    while not (found := look()):
        if time.monotonic() - started > patience:
            logger.warning("waiting for process 0 to list the images")
            patience *= 10
        time.sleep(0.1)
    return found


def read_listing(args: Namespace, plan: CodesPlan) -> ImagePaths | None:
    """Return the listing in ``--code-path``; None if there is none, or not that of the plan."""
    try:
        paths = ImagePaths.load(Path(args.code_path) / LISTING, args.data_path)
    except ValueError:
        return None
    return paths if paths.sha256() == plan.source_sha256 else None
