"""Figures of the acceptance run as they are kept: a JSON per table, row by row."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from scripts.diagnosis.acceptance_tables import add_ratios
from scripts.diagnosis.check import ROOT
from utils.files import sha256_file, write_json

Row = dict[str, Any]  # a case and its figures, or ``error``


def is_of(row: Row, case: Row) -> bool:
    """Return whether ``row`` holds figures of ``case``."""
    return is_whole(row) and all(row.get(k) == v for k, v in case.items())


def is_whole(row: Row) -> bool:
    """Return whether a row needs no second try."""
    return "error" not in row and "unfinished" not in row


def read_rows(path: Path) -> list[Row]:
    """Return the rows that a part has written so far."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError):  # of a part that was killed as it wrote
            rows.append(json.loads(line))
    return rows


def hash_of_code() -> str:
    """Return a short hash of all sources, which a machine without git has too."""
    folders = ("utils", "dataset", "tokenizer", "autoregressive", "evaluations", "scripts")
    paths = [p for folder in folders for p in (ROOT / folder).rglob("*")]
    sources = sorted(p for p in paths if p.suffix in (".py", ".cpp", ".h"))
    names = (f"{p.relative_to(ROOT)} {sha256_file(p)}" for p in sources)
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]


class Records:
    """The rows of each table, kept in a JSON that the tables of the benchmarks' page come from."""

    def __init__(self, folder: Path, run: Row):
        self.folder, self.run = folder, run
        self.tables: dict[str, list[Row]] = {}

    def path(self, table: str) -> Path:
        """Return the file of a table."""
        return self.folder / f"gpu-{table}.json"

    def rows(self, table: str) -> list[Row]:
        """Return the rows of a table: at first those of an earlier run of the same code here."""
        if table not in self.tables:
            self.tables[table] = []
            if self.path(table).exists():
                record = json.loads(self.path(table).read_text())
                if all(record.get(k) == self.run[k] for k in ("device", "code")):
                    self.tables[table] = list(filter(is_whole, record["results"]))
        return self.tables[table]

    def add(self, table: str, rows: list[Row], options: Row) -> None:
        """Add rows and write the table."""
        self.rows(table).extend(rows)
        if table == "sampling":
            add_ratios([row for row in self.rows(table) if "error" not in row])
        results = {"options": options, "results": self.rows(table)}
        write_json(self.path(table), results | self.run)
