"""What is known of shards without reading them: size, time and SHA-256 as they were written.

A process appends a line of JSON per shard to a file of its own, ``records-PROCESS.jsonl``, before
the shard gets its name; finishing joins them to ``records.jsonl``. A record counts as long as size
and time of the shard are the recorded ones.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from utils.files import atomic_path, process_name


@dataclass(frozen=True)
class Record:
    """One shard as it was written."""

    shard: int
    images: int  # whose codes it holds
    sha256: str
    size: int  # bytes
    time: int  # of the last change, nanoseconds

    def line(self) -> bytes:
        """Return the record as one line of JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"


class Records:
    """The records in a folder of codes, as they are now."""

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        self._files = sorted(self._folder.glob("records*.jsonl"))
        self._records: dict[int, list[Record]] = defaultdict(list)
        for file in self._files:  # "records.jsonl" is the last
            content = b""
            with suppress(FileNotFoundError):  # joined since we looked
                content = file.read_bytes()
            for line in content.splitlines():
                try:
                    record = Record(**json.loads(line))
                except (ValueError, TypeError):  # cut off by the end of its process
                    continue
                self._records[record.shard].append(record)

    def find(self, shard: int, path: Path) -> Record | None:
        """Return the record of ``shard`` if its file is unchanged since, as far as size and time
        show; None for a file that is not there, too.
        """
        try:
            now = path.stat()
        except FileNotFoundError:
            return None
        facts = (now.st_size, now.st_mtime_ns)
        return next((r for r in self._records[shard] if (r.size, r.time) == facts), None)

    def join(self, records: list[Record]) -> None:
        """Replace all files that were read by one of ``records``."""
        joined = self._folder / "records.jsonl"
        with atomic_path(joined) as temporary:
            temporary.write_bytes(b"".join(record.line() for record in records))
        for file in self._files:
            if file != joined:
                file.unlink(missing_ok=True)


def add_record(folder: str | Path, record: Record) -> None:
    """Append ``record`` to this process's file; no other process writes there."""
    path = Path(folder) / f"records-{process_name()}.jsonl"
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(file, record.line())
    finally:
        os.close(file)
