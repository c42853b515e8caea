"""The figures of the acceptance run as Markdown tables, in the form of the benchmarks' page."""

from __future__ import annotations

from itertools import groupby
from typing import Any

Rows = list[dict[str, Any]]
OURS, COMPILED, PUBLISHED = "compiled", "published-compiled", "published"
TABLES = ("sampling", "training", "networks", "tests")


def as_tables(records: dict[str, Rows]) -> str:
    """Return a section for each of ``records``, the rows of some of ``TABLES``."""
    write = {
        "sampling": ("Sampling", sampling_table),
        "training": ("Training step", training_table),
        "networks": ("Tokenizer and evaluator", networks_table),
        "tests": ("Tests", tests_table),
    }
    sections = []
    for name, every in records.items():
        title, table = write[name]
        rows = [row for row in every if "error" not in row]
        failed = [row for row in every if "error" in row]
        lines = [f"## {title}", ""] + (table(rows) if rows else ["Nothing was measured."])
        for row in failed:
            case = ", ".join(str(v) for k, v in row.items() if k not in ("error", "took", "log"))
            lines.append(f"- failed: {case}: {row['error']}")
        sections.append("\n".join(lines))
    return "\n\n".join(sections)


def add_ratios(rows: Rows) -> None:
    """Give each way of sampling its speed over the published ways of the same case."""
    by = {(*key_of(row), row["way"]): row for row in rows}
    for row in rows:
        for base, name in ((PUBLISHED, "over published"), (COMPILED, "over published-compiled")):
            if other := by.get((*key_of(row), base)):
                row[name] = other["seconds"] / row["seconds"]


def key_of(row: dict[str, Any]) -> tuple[str, int, int]:
    """Return what rows of one line of the sampling table share."""
    return row["gpt_model"], row["n"], row["batch"]


def line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def heading(*names: str) -> list[str]:
    return [line(*names), "|" + "---|" * len(names)]


def number(row: dict[str, Any] | None, name: str, form: str = ".3g") -> str:
    """Return a figure of a row as text, empty where there is none."""
    return format(row[name], form) if row and name in row else ""


def sampling_table(rows: Rows) -> list[str]:
    """Return seconds per batch by each way, and what bounds ours."""
    names = ["size", "n", "batch", "published", "published, compiled", "ours", "over published"]
    names += ["over compiled", "images/s", "MBU", "MFU", "peak GiB"]
    lines = heading(*names)
    for key, group in groupby(sorted(rows, key=key_of), key=key_of):
        ways = {row["way"]: row for row in group}
        ours = ways.get(OURS)
        lines.append(
            line(
                *key,
                *(number(ways.get(way), "seconds") for way in (PUBLISHED, COMPILED, OURS)),
                number(ours, "over published", ".2f") + "x" * bool(ours and PUBLISHED in ways),
                number(ours, "over published-compiled", ".2f")
                + "x" * bool(ours and COMPILED in ways),
                number(ours, "images/s"),
                number(ours, "MBU", ".0%"),
                number(ours, "MFU", ".0%"),
                number(ours, "peak GiB", ".1f"),
            )
        )
    return lines


def training_table(rows: Rows) -> list[str]:
    """Return seconds per step by each way, utilisation and memory."""
    lines = heading("size", "way", "images per step", "s/step", "images/s", "MFU", "peak GiB")
    for row in rows:
        figures = (number(row, "seconds"), number(row, "images/s"), number(row, "mfu", ".1%"))
        shape = (row["gpt_model"], row["way"], row["images per step"])
        lines.append(line(*shape, *figures, number(row, "peak GiB", ".1f")))
    return lines


def networks_table(rows: Rows) -> list[str]:
    """Return images per second of each network."""
    lines = heading("network", "precision", "what", "images/s")
    for row in rows:
        for name, value in row.items():
            if name.endswith(" images/s"):
                what = name.removesuffix(" images/s")
                lines.append(
                    line(row["network"], row.get("precision", "none"), what, f"{value:.3g}")
                )
    return lines


def tests_table(rows: Rows) -> list[str]:
    """Return how many tests had which outcome, and those that did not pass."""
    lines = []
    for row in rows:
        counts = {k: v for k, v in row.items() if k in ("passed", "failed", "error", "skipped")}
        lines.append(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
        outcomes = row["outcomes"].items()
        lines += [f"- {outcome}: {name}" for name, outcome in outcomes if outcome != "passed"]
    return lines
