"""Checkpoints: untrusted files in, whole files out."""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.files import atomic_path, require_file

CHECKPOINT_NAME = re.compile(r"(\d{7,})\.pt")


def load_checkpoint(path: str | Path, option: str) -> dict[str, Any]:
    """Read a ``.pt`` file on the CPU without running any code from it.

    ``weights_only`` with ``argparse.Namespace`` allowed (released files hold one under ``args``). Zip-format
    files are memory-mapped, so a tensor costs memory only when it is used. Raises ``ValueError`` naming ``option``.
    """
    path = require_file(path, option)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged or hostile file may break the reader in any way
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{option}: {path} is no readable checkpoint of tensors: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{option}: {path} holds a {type(checkpoint).__name__}, expected a dict of tensors")
    return checkpoint


def find_state_dict(checkpoint: dict[str, Any], keys: Sequence[str], path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict under the first of ``keys`` that is there, or the checkpoint itself if it is a bare one.

    A ``module.`` (DDP) or ``_orig_mod.`` (compile) prefix on the names is removed.
    """
    state = next((checkpoint[k] for k in keys if isinstance(checkpoint.get(k), dict)), checkpoint)
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no weights: expected one of the keys {', '.join(keys)} or a bare state dict")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", str(k)): v for k, v in tensors.items()}


def load_strictly(module: nn.Module, state: dict[str, torch.Tensor], path: str | Path, what: str) -> None:
    """Load ``state`` into ``module``; names and shapes must all fit, else a ``ValueError`` says which do not.

    Tensors are taken over, not copied, so a module on the meta device may be loaded.
    """
    own = module.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing (first: {missing[0]})")
    if unknown:
        problems.append(f"{len(unknown)} unknown (first: {unknown[0]})")
    if shapes:
        k = min(shapes)
        problems.append(
            f"{len(shapes)} of another shape (first: {k} is {tuple(state[k].shape)}, expected {tuple(own[k].shape)})"
        )
    if problems:
        raise ValueError(f"{path} does not fit {what}: parameters " + ", ".join(problems))
    module.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items()}, assign=True)


def state_sha256(state: dict[str, torch.Tensor]) -> str:
    """Hex SHA-256 over names, shapes and bytes of tensors: tells weights apart however their file was written."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def resolve(option: str, written: Any, fixed: Any, source: str) -> Any:
    """The value that ``source`` fixes; a different one that the user wrote is a ``ValueError``."""
    if written is not None and written != fixed:
        raise ValueError(f"{option} {written} contradicts {source}, which says {fixed}; leave the option out")
    return fixed


def save_checkpoint(checkpoint: dict[str, Any], *paths: str | Path) -> None:
    """Write one checkpoint under each path, each whole or not at all; the first is serialised, the rest copied."""
    first, *others = paths
    with atomic_path(first) as temporary:
        torch.save(checkpoint, temporary)
    for path in others:
        with atomic_path(path) as temporary:
            shutil.copyfile(first, temporary)


def newest_checkpoint(*folders: str | Path) -> Path | None:
    """The checkpoint (``<step>.pt``) of the highest step in any of the folders, the first that has it, or None."""
    found = [p for folder in folders if Path(folder).is_dir() for p in Path(folder).iterdir()]
    steps = {p: int(m[1]) for p in found if (m := CHECKPOINT_NAME.fullmatch(p.name))}
    return max(steps, key=steps.__getitem__, default=None)
