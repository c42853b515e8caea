"""Facts read from files: JSON with a hash of its own, and dataclasses of checked values."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from utils.files import json_sha256, write_json

T = TypeVar("T")
SEAL = "meta_sha256"  # where a file holds the hash of its other fields
LARGEST = 1 << 31  # of whole numbers


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; ``ValueError`` naming it if it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}") from error


def write_sealed(path: Path, facts: dict[str, Any]) -> None:
    """Write ``facts`` and their SHA-256 as JSON, whole or not at all."""
    facts = json.loads(json.dumps(facts, default=str))
    write_json(path, facts | {SEAL: json_sha256(facts)})


def read_sealed(path: Path) -> dict[str, Any]:
    """Return what ``write_sealed`` wrote; ``ValueError`` if it is missing or has changed.

    A file without a hash, as earlier versions wrote, is taken as it is.
    """
    facts = read_json(path)
    if not isinstance(facts, dict):
        raise ValueError(f"{path} is missing or damaged: it does not hold a JSON object")
    sha256 = facts.pop(SEAL, None)
    if sha256 is not None and sha256 != json_sha256(facts):
        raise ValueError(f"{path} is missing or damaged: its bytes have changed")
    return facts


def build(kind: type[T], values: Any, source: str, least: int = 1) -> T:
    """Return dataclass ``kind`` of ``values`` from a file; ``ValueError`` naming ``source`` unless
    each field has its type and nothing else is there. least: of whole numbers.
    """
    hints = get_type_hints(kind)
    if not isinstance(values, dict) or not values.keys() <= hints.keys():
        raise ValueError(f"{source} is not that of a {kind.__name__}")
    needed = {f.name for f in fields(kind) if f.default is MISSING}  # type: ignore[arg-type]
    if missing := sorted(needed - values.keys()):
        raise ValueError(f"{source}: it lacks {', '.join(missing)}")
    for name, value in values.items():
        require_type(value, hints[name], f"{source}: {name}", least)
        if get_origin(hints[name]) is tuple:
            values = values | {name: tuple(value)}
    try:
        return kind(**values)
    except ValueError as error:  # of fields that do not fit each other
        raise ValueError(f"{source}: {error}") from error


def require_type(value: Any, hint: Any, what: str, least: int = 0) -> None:
    """Raise ``ValueError`` naming ``what`` unless a value from JSON is a ``hint``."""
    if not has_type(value, hint, least):
        name = str(hint) if get_args(hint) else hint.__name__
        raise ValueError(f"{what} is {str(value)[:40]}, expected {name}")


def has_type(value: Any, hint: Any, least: int = 0) -> bool:
    """Return whether a value from JSON is a ``hint``, such as ``list[str]`` or ``int | None``.

    Whole numbers lie in ``least`` ... 2^31 - 1, others in 0 ... 1e15.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return any(has_type(value, h, least) for h in inner)
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(has_type(v, inner[0], least) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(has_type(v, inner[1], least) for v in value.values())
    if hint is int:
        return type(value) is int and least <= value < LARGEST
    if hint is float:
        return type(value) in (int, float) and 0 <= value < 1e15
    return type(value) is hint
