"""Files of a tokenizer's weights, released or our own -> VQModel."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields
from pathlib import Path

import torch

from tokenizer.vq_model import VQConfig, VQModel, make_vq_config
from utils.checkpoints.folder import read_meta, read_sharded
from utils.checkpoints.weights_file import (
    find_state_dict,
    load_checkpoint,
    load_strictly,
    require_facts,
    state_sha256,
)
from utils.options import resolve
from utils.records import build, has_type

LEVELS, LARGEST_BLOCKS = range(1, 9), 64  # of a config: more would be made for hours
PUBLISHED_SIZE = 256  # pixels: of the published commands


def require_tokenizer(vq: VQModel, sha256: str | None, path: str | Path, source: str) -> None:
    """Raise ``ValueError`` unless ``vq``, read from ``path``, made the codes of ``source``.

    sha256: of that tokenizer's weights; None, where it is not known, fits any.
    """
    if sha256 is not None and sha256 != state_sha256(vq.weights()):
        raise ValueError(f"--vq-ckpt {path} is not the tokenizer that made the codes of {source}")


def load_vq(
    path: str | Path | None, vq_model: str | None, **written: object
) -> tuple[VQModel, str]:
    """Return the tokenizer of a file or checkpoint folder, ``eval()``, CPU, and its size's name.

    Our own checkpoints carry their config; for released ones it is that of ``vq_model`` (default
    VQ-16) with the fields ``written`` (None: not written by the user). Raises ``ValueError`` where
    the two contradict, or where names or shapes do not fit.
    """
    if path is None:
        raise ValueError("--vq-ckpt is required")
    if (Path(path) / "meta.json").is_file():
        checkpoint = read_meta(Path(path)) | {"model": read_sharded(Path(path), "model.")}
        average = read_sharded(Path(path), "ema.", check=False)
        checkpoint |= {"ema": average} if average else {}
    else:
        checkpoint = load_checkpoint(path, "--vq-ckpt")
    own = checkpoint.get("config")
    if own is not None:
        known = {f.name for f in fields(VQConfig)}
        if not isinstance(own, dict) or set(own) != known:
            raise ValueError(
                f"--vq-ckpt: {path} holds no tokenizer: its config is of another model"
            )
        require_facts(checkpoint, f"--vq-ckpt {path}")
        config = build(VQConfig, own, f"--vq-ckpt {path}: its config")
        if len(config.ch_mult) not in LEVELS or config.num_res_blocks > LARGEST_BLOCKS:
            raise ValueError(f"--vq-ckpt {path}: its config is of no tokenizer that could be made")
        name = resolve("--vq-model", vq_model, checkpoint.get("vq_model"), f"--vq-ckpt {path}")
        for field, value in written.items():
            option = f"--{field.replace('_', '-')}"
            resolve(option, value, getattr(config, field), f"--vq-ckpt {path}")
    else:
        name = vq_model or "VQ-16"
        config = make_vq_config(name, **written)
    try:
        with torch.device("meta"):
            model = VQModel(config)
    except ValueError as error:  # of its widths
        raise ValueError(f"--vq-ckpt {path}: its config: {error}") from error
    state = find_state_dict(checkpoint, ("ema", "model", "state_dict"), path)
    load_strictly(model, state, path, f"the tokenizer {name}")
    run = checkpoint.get("run")
    size = run.get("image_size") if isinstance(run, dict) else None
    is_size = has_type(size, int, least=1)
    if own is not None and size is not None and not is_size:
        raise ValueError(f"--vq-ckpt {path}: its image_size is {str(size)[:60]}")
    model.trained_size = size if is_size else None
    return model.eval().requires_grad_(False), name


def load_tokenizer(args: Namespace) -> tuple[VQModel, str]:
    """Load the selected tokenizer, see ``load_vq``; options left out are filled from it."""
    written = dict(codebook_size=args.codebook_size, codebook_embed_dim=args.codebook_embed_dim)
    vq, name = load_vq(args.vq_ckpt, args.vq_model, **written)
    args.vq_model, args.codebook_size = name, vq.config.codebook_size
    args.codebook_embed_dim = vq.config.codebook_embed_dim
    return vq, name


def resolve_image_size(written: int | None, vq: VQModel) -> int:
    """Return the side of images for ``vq``: as written, else as trained, else 256, as published."""
    return written or vq.trained_size or PUBLISHED_SIZE
