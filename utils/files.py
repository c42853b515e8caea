"""Files that appear whole or not at all, hashes of files, checks of paths."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from utils.processes import has_ended, machine


@contextmanager
def atomic_path(path: str | Path, tidy: bool = True) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; on success fsync it and rename it to ``path``.

    If the block raises (disk full, Ctrl-C), the half-written file is removed and whatever stood
    under ``path`` before is untouched; the error of a full disk then names ``path``. A process
    killed in between leaves a ``*.tmp-*`` file, which the next writer of ``path`` removes. tidy:
    False leaves it there; finding it lists the folder, which takes long where there are many files.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if tidy:
        remove_ended(path)
    temporary = temporary_path(path)
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # of a write: disk full
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """Return a new name beside ``path`` that says which process writes there."""
    return path.with_name(f"{path.name}.tmp-{process_name()}-{uuid.uuid4().hex[:8]}")


def process_name() -> str:
    """Return a name that no other living process of any machine has."""
    return f"{os.getpid()}-{hashlib.sha256(machine().encode()).hexdigest()[:8]}"


def remove_ended(path: str | Path) -> None:
    """Delete temporary files of ``path``, or of all files in a folder, whose process, of this
    machine, has ended.
    """
    path = Path(path)
    folder, name = (path, "*") if path.is_dir() else (path.parent, escape(path.name))
    for leftover in folder.glob(f"{name}.tmp-*"):
        if _has_ended(leftover):
            leftover.unlink(missing_ok=True)


def remove_temporary(path: str | Path) -> None:
    """Delete all temporary files of ``path``, those of other machines too; only its one writer may
    call this.
    """
    path = Path(path)
    for leftover in path.parent.glob(f"{escape(path.name)}.tmp-*"):
        if _has_ended(leftover) is not False:
            leftover.unlink(missing_ok=True)


def _has_ended(temporary: Path) -> bool | None:
    """Return whether the process that wrote a temporary file has ended; None: not known."""
    name = re.search(r"\.tmp-(\d+)-([0-9a-f]{8})-[0-9a-f]{8}$", temporary.name)
    if name is None or name[2] != hashlib.sha256(machine().encode()).hexdigest()[:8]:
        return None
    return has_ended(int(name[1]))


def cut_torn_line(path: Path) -> None:
    """Cut off what a killed writer or a full disk left of a last line, before others follow it.

    ``ValueError`` for a link: in a folder from elsewhere it may lead to any file of the user's.
    """
    if path.is_symlink():
        raise ValueError(f"{path} is a link; lines are added to files of this folder alone")
    if path.is_file():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)


def readable_size(count: int) -> str:
    """Return a number of bytes in GiB, or in KiB where that would be 0.0 GiB."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**28 else f"{count / 2**10:,.0f} KiB"


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, default=str) + "\n")


def json_sha256(value: Any) -> str:
    """Return the hex SHA-256 of a value that JSON can hold, whatever the order of its fields."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Return the hex SHA-256 of a file's bytes, read in 1 MiB blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def require_file(path: str | Path | None, option: str, hint: str = "") -> Path:
    """Return ``path`` if it is a file; else raise a ``ValueError`` that names the option."""
    hint = f" ({hint})" if hint else ""
    if path is None:
        raise ValueError(f"{option} is required{hint}")
    if not Path(path).is_file():
        what = "is a folder, not a file" if Path(path).is_dir() else f"does not exist{_where(path)}"
        raise ValueError(f"{option}: {path} {what}{hint}")
    return Path(path)


def require_folder(path: str | Path, option: str, hint: str = "") -> Path:
    """Return ``path`` if it is a folder; else raise a ``ValueError`` that names the option."""
    if not Path(path).is_dir():
        what = "is a file, not a folder" if Path(path).exists() else f"does not exist{_where(path)}"
        raise ValueError(f"{option}: {path} {what}{f' ({hint})' if hint else ''}")
    return Path(path)


def _where(path: str | Path) -> str:
    """Return the current folder in words for a relative path that is not found."""
    return "" if Path(path).is_absolute() else f" in {Path.cwd()}"


def prepare_folder(path: str | Path, option: str) -> Path:
    """Create the folder and try to write in it; ``ValueError`` naming the option if that fails."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"{option}: cannot write in {path}: {error.strerror}") from error
    return path
