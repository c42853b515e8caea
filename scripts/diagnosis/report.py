"""What the doctor found: as text for the screen, as Markdown, as JSON."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from scripts.diagnosis.check import BROKEN, SLOW, STATUSES, Check, Result
from utils.files import atomic_path, write_json

Rows = list[tuple[Check, Result]]
STATUS_MEANINGS = {
    "ok": "works, and is not slow",
    "slow": "works, but below the stated share of the ceiling, slower than another way of doing "
    "the same, or without something that makes it fast",
    "broken": "does not work or gives wrong numbers",
    "not here": "this machine has nothing to check of",
    "left out": "not checked: by --quick, or for lack of time",
}


def title(check: Check) -> str:
    """Return the name of a check with its device."""
    return check.name if check.device == "any" else f"{check.name} ({check.device})"


def summary(rows: Rows) -> str:
    """Return how many checks have which status, as one line."""
    counts = Counter(result.status for _, result in rows)
    return ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])


def advice(rows: Rows) -> list[str]:
    """Return what to do about each check that is slow or broken."""
    return [
        f"{result.status}: {title(check)}. {result.advice[:1].upper()}{result.advice[1:]}."
        for check, result in rows
        if result.status in (SLOW, BROKEN)
    ]


def as_text(rows: Rows) -> str:
    """Return the table for the screen, with advice below it."""
    lines = []
    for group, members in groupby(rows, key=lambda row: row[0].group):
        lines += ["", group]
        for check, result in members:
            text = f"{title(check)}: {result.detail}"
            lines += textwrap.wrap(
                text, 110, initial_indent=f"  {result.status:9}", subsequent_indent=" " * 13
            )
    lines += ["", summary(rows)]
    for sentence in advice(rows):
        lines += textwrap.wrap(sentence, 110, initial_indent="- ", subsequent_indent="  ")
    return "\n".join(lines)


def as_markdown(heading: str, machine: dict[str, str], rows: Rows) -> str:
    """Return the report as Markdown: the machine, the table, advice, what the words mean."""
    lines = ["# Doctor", "", heading, "", f"**{summary(rows)}**", ""]
    lines += [f"- {sentence}" for sentence in advice(rows)]
    lines += ["", "## Machine", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(text)} |" for name, text in machine.items()]
    for group, members in groupby(rows, key=lambda row: row[0].group):
        lines += ["", f"## {group}", "", "| | check | result | s |", "|---|---|---|---:|"]
        for check, result in members:
            status = result.status if result.status == "ok" else f"**{result.status}**"
            lines.append(
                f"| {status} | {title(check)} | {_cell(result.detail)} | {result.seconds:.1f} |"
            )
    lines += ["", "## Words", ""]
    lines += [f"- {status}: {meaning}" for status, meaning in STATUS_MEANINGS.items()]
    lines += [
        "- n: tokens predicted at once.",
        "- the published way: the computation of the published PAR code, with the same weights.",
        "- MBU, MFU: the share that is reached of the speed of memory and of arithmetic, as "
        "measured here; in half precision on known GPUs, of the data sheet's figure.",
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def as_json(
    heading: str, machine: dict[str, str], options: dict[str, Any], rows: Rows
) -> dict[str, Any]:
    """Return the report as plain values."""
    results = []
    for check, result in rows:
        values = {"group": check.group, "name": check.name, "device": check.device}
        values |= asdict(result)
        # JSON has no NaN and no infinity
        figures = {k: v if math.isfinite(v) else None for k, v in result.figures.items()}
        results.append(values | {"figures": figures})
    broken = any(result.status == BROKEN for _, result in rows)
    return {
        "about": heading,
        "machine": machine,
        "options": options,
        "broken": broken,
        "results": results,
    }


def write_report(
    prefix: Path, heading: str, machine: dict[str, str], options: dict[str, Any], rows: Rows
) -> list[Path]:
    """Write ``prefix``.md and ``prefix``.json, each whole; return their paths."""
    paths = [Path(f"{prefix}.{suffix}") for suffix in ("md", "json")]
    with atomic_path(paths[0]) as temporary:
        temporary.write_text(as_markdown(heading, machine, rows))
    write_json(paths[1], as_json(heading, machine, options, rows))
    return paths
