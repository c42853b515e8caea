"""Files of weights, released or our own -> GPT; checks of what users write of one."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from autoregressive.models.gpt import GPT, GPT_models, GPTConfig
from autoregressive.models.region_order import split_regions
from autoregressive.models.schedules import canonical
from utils.checkpoints.weights_file import (
    find_state_dict,
    load_checkpoint,
    load_strictly,
    require_facts,
)
from utils.options import resolve
from utils.records import build

LARGEST_GRID = 1 << 20  # codes, of a config


def load_gpt(
    path: str | Path,
    grid: tuple[int, int] | None,
    default_grid: tuple[int, int] = (24, 24),
    gpt_model: str | None = None,
    ar_token_num: int | None = None,
    schedule: str | None = None,
    num_classes: int | None = None,
    vocab_size: int | None = None,
    bare: bool = False,
    ema: bool = False,
) -> tuple[GPT, str, dict]:
    """Return a checkpoint's GPT, in ``eval()`` mode on the CPU, its size name and other records.

    Our own checkpoints carry their config. For a released one it is read off the shapes of its
    weights, and ``grid`` (height, width in codes; None: ``default_grid``) is taken as given.
    Arguments that are not None were written by the user: each must agree, else ``ValueError``.
    ``bare``: the file must be a state dict with nothing around it. ``ema``: take its moving average
    of the weights.
    """
    checkpoint = load_checkpoint(path, "--gpt-ckpt")
    source = f"--gpt-ckpt {path}"
    if ema and not isinstance(checkpoint.get("ema"), dict):
        raise ValueError(f"--gpt-ema: {path} holds no moving average; train with --ema to keep one")
    keys = ("ema",) if ema else () if bare else ("model", "module", "state_dict")
    state = find_state_dict(checkpoint, keys, path)
    own = checkpoint.get("config")
    if own is not None:
        known = {f.name for f in fields(GPTConfig)}
        if not isinstance(own, dict) or not set(own) <= known or "n_layer" not in own:
            raise ValueError(f"{source} holds no GPT: its config is of another model")
        config = build(GPTConfig, own, f"{source}: its config")
        require_facts(checkpoint, source)
        name = str(checkpoint.get("gpt_model"))
        if config.grid_height * config.grid_width > LARGEST_GRID:
            raise ValueError(f"{source}: its config has a grid of more than {LARGEST_GRID:,} codes")
        if config.n_layer != (found := count_layers(state)):  # before as many are made
            raise ValueError(f"{source}: its config has {config.n_layer} layers, it has {found}")
        own_grid = (config.grid_height, config.grid_width)
        resolve("the code grid of --image-size", grid, own_grid, source)
    else:
        config, name = config_from_shapes(state, grid or default_grid, path)
    resolve("--gpt-model", gpt_model, name, source)
    resolve("--ar-token-num", ar_token_num, config.ar_token_num, source)
    if schedule is not None:
        tokens = config.grid_height * config.grid_width
        schedule = canonical(schedule, config.ar_token_num, tokens)
    resolve("--schedule", schedule, config.schedule, source)
    resolve("--num-classes", num_classes, config.num_classes, source)
    resolve("a codebook of size", vocab_size, config.vocab_size, source)
    try:
        with torch.device("meta"):
            model = GPT(config)
    except ValueError as error:  # of its schedule or regions
        raise ValueError(f"{source}: {error}") from error
    classes = checkpoint.get("classes")
    if own is not None and classes is not None and len(classes) != config.num_classes:
        raise ValueError(f"{source}: {len(classes)} names of {config.num_classes} classes")
    load_strictly(model, state, path, f"the model {name}")
    return model.eval().requires_grad_(False), name, checkpoint


def resolve_parallelism(
    ar_token_num: int, spe_token_num: int | None, grid: tuple[int, int] | None = None
) -> int:
    """Return n from the published option pair, for codes of ``grid`` (h, w) if that is known.

    Special tokens are n - 1, and n must cut the grid into equal regions; anything else
    is a ``ValueError``.
    """
    if spe_token_num is not None and spe_token_num != ar_token_num - 1:
        raise ValueError(
            f"--spe-token-num {spe_token_num} contradicts --ar-token-num {ar_token_num}: "
            "predicting n tokens at once takes n-1 special tokens, so either --spe-token-num "
            f"{ar_token_num - 1} or --ar-token-num {spe_token_num + 1}"
        )
    if grid is not None:
        try:
            split_regions(grid, ar_token_num)
        except ValueError as error:
            raise ValueError(f"--ar-token-num {ar_token_num}: {error}") from error
    return ar_token_num


def count_layers(state: dict[str, Tensor]) -> int:
    """Return the number of transformer layers that a state dict holds."""
    return len({k.split(".")[1] for k in state if k.startswith("layers.")})


def config_from_shapes(
    state: dict[str, Tensor], grid: tuple[int, int], path: str | Path
) -> tuple[GPTConfig, str]:
    """Return config and size name from the weights' shapes; ``ValueError`` if no size fits."""
    try:
        vocab_size, dim = state["tok_embeddings.weight"].shape
        classes = len(state["cls_embedding.embedding_table.weight"]) - 1
        wqkv_rows = len(state["layers.0.attention.wqkv.weight"])
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"--gpt-ckpt: {path} is not a class-conditional GPT: {error} is missing or misshapen"
        ) from error
    n_layer = count_layers(state)
    sizes = {(s["n_layer"], s["dim"]): name for name, s in GPT_models.items()}
    if (n_layer, dim) not in sizes:
        raise ValueError(
            f"--gpt-ckpt: {path} has {n_layer} layers of width {dim}, which is "
            "not a size of GPT_models"
        )
    name = sizes[n_layer, dim]
    n_head = GPT_models[name]["n_head"]
    special = state.get("spe_tok_embeddings.special_embeddings.weight", ())
    config = GPTConfig(
        **GPT_models[name],
        n_kv_head=(wqkv_rows // (dim // n_head) - n_head) // 2,
        vocab_size=vocab_size,
        num_classes=classes,
        grid_height=grid[0],
        grid_width=grid[1],
        ar_token_num=len(special) + 1,
    )
    return config, name
