"""Weights in one file: reading untrusted ones, writing whole ones."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from utils.checkpoints.folder import read_meta, read_sharded
from utils.files import atomic_path, json_sha256, readable_size, write_json
from utils.hub import CONFIG_FILE, WEIGHTS_FILE, weights_path
from utils.records import require_type

HASH = "content_sha256"  # where a file holds the hash of its content


def load_checkpoint(path: str | Path, option: str) -> dict[str, Any]:
    """Read a ``.pt`` or ``.safetensors`` file, or a folder or repository in the hub's form, on the
    CPU without running any code from it.

    ``weights_only`` with ``argparse.Namespace`` allowed (released files hold one under ``args``).
    Zip-format files are memory-mapped, so a tensor costs memory only when it is used. A file that
    holds the SHA-256 of its content, as ours do, is compared with it: about a second per GB.
    Raises ``ValueError`` naming ``option``.
    """
    if path is not None and (Path(path) / "meta.json").is_file():
        raise ValueError(
            f"{option}: {path} is a training checkpoint; python3 scripts/export_checkpoint.py "
            f"--checkpoint {path} --output FILE.pt makes a file of it"
        )
    path = weights_path(path, option)
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                facts = json.loads(metadata.get("facts") or _config_beside(path))
                if HASH in metadata:
                    facts[HASH] = metadata[HASH]
                names = list(file.keys())
                checkpoint = facts | {"model": {k: file.get_tensor(k) for k in names}}
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):
                checkpoint = torch.load(
                    path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
                )
        sha256 = checkpoint.pop(HASH, None) if isinstance(checkpoint, dict) else None
        _require_plain(checkpoint)
        if sha256 is not None and sha256 != content_sha256(checkpoint):
            raise ValueError("its bytes have changed since it was written")
    except Exception as error:  # a damaged or hostile file may break the reader in any way
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{option}: {path} is not a readable checkpoint of tensors: {reason}"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"{option}: {path} holds a {type(checkpoint).__name__}, expected a dict of tensors"
        )
    return checkpoint


def _require_plain(content: object) -> None:
    """Raise ``ValueError`` for a tensor that is not as large as its bytes in the file, as one that
    repeats a single number a billion times, or that has none, as sparse ones.
    """
    for name, value in content.items() if isinstance(content, dict) else ():
        _require_plain(value)
        if isinstance(value, Tensor) and not (
            value.layout is torch.strided
            and value.device.type == "cpu"
            and not value.is_quantized
            and value.nbytes <= value.untyped_storage().nbytes()
        ):
            raise ValueError(f"{str(name)[:80]} is not a plain tensor")


def _config_beside(path: Path) -> str:
    """Return the text of the config.json beside weights in the hub's form."""
    config = path.with_name(CONFIG_FILE)
    return config.read_text() if path.name == WEIGHTS_FILE and config.is_file() else "{}"


FACTS = {
    "gpt_model": str, "vq_model": str, "classes": list[str] | None, "steps": int,
    "tokenizer_sha256": str | None, "run": dict,
}  # fmt: skip


def require_facts(checkpoint: dict[str, Any], source: str) -> None:
    """Raise ``ValueError`` naming ``source`` if a fact beside the weights is of another type."""
    for name, hint in FACTS.items():
        if name in checkpoint:
            require_type(checkpoint[name], hint, f"{source}: {name}")
    for name in ("gpt_model", "vq_model"):  # files are named by them
        if name in checkpoint and not re.fullmatch(r"\w[\w.-]{0,63}", checkpoint[name]):
            raise ValueError(f"{source}: {name} {checkpoint[name][:64]!r} is not a name")


def find_state_dict(
    checkpoint: dict[str, Any], keys: Sequence[str], path: str | Path
) -> dict[str, Tensor]:
    """Return the state dict under the first of ``keys`` present, or a bare checkpoint itself.

    A ``module.`` (DDP) or ``_orig_mod.`` (compile) prefix on the names is removed.
    """
    state = next((checkpoint[k] for k in keys if isinstance(checkpoint.get(k), dict)), checkpoint)
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    if not tensors:
        raise ValueError(
            f"{path} holds no weights: expected one of the keys "
            f"{', '.join(keys)} or a bare state dict"
        )
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", str(k)): v for k, v in tensors.items()}


def load_strictly(module: nn.Module, state: dict[str, Tensor], path: str | Path, what: str) -> None:
    """Load ``state`` into ``module``; ``ValueError`` with the names and shapes that do not fit.

    Tensors are assigned, not copied, so a module on the meta device may be loaded.
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
            f"{len(shapes)} of another shape (first: {k} is {tuple(state[k].shape)}, expected "
            f"{tuple(own[k].shape)})"
        )
    if problems:
        raise ValueError(f"{path} does not fit {what}: parameters " + ", ".join(problems))
    module.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items()}, assign=True)


def state_sha256(state: dict[str, Tensor]) -> str:
    """Return a hex SHA-256 of names, shapes and bytes of tensors, however a file was written."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def content_sha256(checkpoint: dict[str, Any]) -> str:
    """Return a hex SHA-256 of all tensors of a checkpoint, one level deep, and of its facts."""
    hashes = {
        k: state_sha256({n: v for n, v in value.items() if isinstance(v, Tensor)})
        for k, value in checkpoint.items()
        if isinstance(value, dict) and any(isinstance(v, Tensor) for v in value.values())
    }
    hashes[""] = state_sha256({k: v for k, v in checkpoint.items() if isinstance(v, Tensor)})
    facts = {k: v for k, v in checkpoint.items() if k not in hashes and not isinstance(v, Tensor)}
    return json_sha256({"tensors": hashes, "facts": facts})


def save_checkpoint(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint file, whole or not at all, with the SHA-256 of its content unless it is a
    bare state dict.
    """
    if not all(isinstance(v, Tensor) for v in checkpoint.values()):
        checkpoint = {**checkpoint, HASH: content_sha256(checkpoint)}
    with atomic_path(path) as temporary:
        torch.save(checkpoint, temporary)


def export_checkpoint(
    folder: Path, output: Path, ema: bool | None = None, bf16: bool = False
) -> None:
    """Write a training checkpoint's weights as ``.pt`` (published format) or ``.safetensors``.

    ``ema``: True takes the moving average as the weights, False leaves it out, None keeps both
    (``.pt`` only; the average, if there is one, under ``ema``). ``bf16``: round the weights to
    bfloat16. Config and other facts go along. ``ValueError`` says what does not fit.
    """
    if output.suffix not in (".pt", ".safetensors"):
        raise ValueError(f"--output {output} must end in .pt or .safetensors")
    weights, facts = _read_export(folder, ema, bf16)
    averages = read_sharded(folder, "ema.", check=False) if ema is None else {}
    try:
        if output.suffix == ".safetensors":
            _save_safetensors(weights, facts, output)
        else:
            save_checkpoint(
                {"model": weights, **({"ema": averages} if averages else {}), **facts}, output
            )
    except Exception as error:  # each writer has its own for a full disk
        free = readable_size(shutil.disk_usage(output.parent).free)
        raise ValueError(
            f"{output} could not be written ({free} free): {error}; {folder} is untouched"
        ) from error


def export_to_hub_form(folder: Path, output: Path, ema: bool = False, bf16: bool = False) -> None:
    """Write a training checkpoint as a folder that huggingface.co and ``--gpt-ckpt`` /
    ``--vq-ckpt`` take: config.json, model.safetensors and, unless there is one, a model card.

    ``ema``, ``bf16`` as for ``export_checkpoint``. ``ValueError`` says what does not fit.
    """
    weights, facts = _read_export(folder, ema, bf16)
    try:
        output.mkdir(parents=True, exist_ok=True)
        _save_safetensors(weights, facts, output / WEIGHTS_FILE)
        write_json(output / CONFIG_FILE, facts)
        card = output / "README.md"
        if not card.exists():  # else its owner may have filled it in
            with atomic_path(card) as temporary:
                temporary.write_text(model_card(weights, facts, output.name))
    except Exception as error:
        raise ValueError(f"--hub {output} could not be written: {error}") from error


def model_card(weights: dict[str, Tensor], facts: dict[str, Any], name: str) -> str:
    """Return the model card of a checkpoint, with what its facts say; the rest is the owner's."""
    gpt = "gpt_model" in facts
    option, kind = ("--gpt-ckpt", "GPT") if gpt else ("--vq-ckpt", "VQ tokenizer")
    rows = {
        "size": facts.get("gpt_model") or facts.get("vq_model"),
        "parameters": f"{sum(w.numel() for w in weights.values()):,}",
        "training steps": facts.get("steps"),
        "commit of the code": facts.get("git"),
        **(facts.get("config") or {}),
    }
    if gpt:
        rows["SHA-256 of its tokenizer's weights"] = facts.get("tokenizer_sha256")
        rows["classes"] = len(facts.get("classes") or ()) or None
    table = "".join(f"| {k} | {v} |\n" for k, v in rows.items() if v is not None)
    command = "python3 autoregressive/sample/sample_c2i.py --vq-ckpt TOKENIZER --gpt-ckpt"
    if not gpt:
        command = "bash scripts/tokenizer/reconstruction_vq.sh --data-path IMAGES --vq-ckpt"
    return f"""---
library_name: pytorch
pipeline_tag: unconditional-image-generation
tags:
- image-generation
- class-conditional
- autoregressive
---
# {name}

{kind} of an implementation of Parallelized Autoregressive Visual Generation
([arXiv 2412.15119](https://arxiv.org/abs/2412.15119)).

| | |
|---|---|
{table}
From a clone of the code, with this folder, or `hf:OWNER/{name}` once it is uploaded, as `{option}`:

```
{command} {name}
```

To be filled in by its owner: training data and their licence, licence of the weights, metrics and
how they were measured.
"""


def _read_export(
    folder: Path, ema: bool | None, bf16: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights of a training checkpoint, or their moving average, and its facts."""
    meta = read_meta(folder)
    facts = {k: v for k, v in meta.items() if k not in ("files", "sha256", "scalars")}
    weights = read_sharded(folder, "ema." if ema else "model.")
    if not weights:
        raise ValueError(f"--ema: {folder} holds no moving average; train with --ema to keep one")
    if bf16:
        weights = {k: v.bfloat16() if v.is_floating_point() else v for k, v in weights.items()}
    return weights, facts


def _save_safetensors(weights: dict[str, Tensor], facts: dict[str, Any], path: Path) -> None:
    """Write tensors, with the facts and a hash in the header, whole or not at all."""
    facts = json.loads(json.dumps(facts))
    metadata = {"format": "pt", "facts": json.dumps(facts)}
    metadata[HASH] = content_sha256({"model": weights, **facts})
    with atomic_path(path) as temporary:
        save_file(weights, temporary, metadata=metadata)
