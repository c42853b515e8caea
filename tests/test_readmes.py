"""READMEs: links and paths exist, commands name scripts and options that there are, and no
placeholder is left.
"""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.helpers import ROOT

READMES = sorted(
    p
    for p in ROOT.rglob("*.md")
    if not {".venv", ".versions", "quickstart", "results"} & set(p.relative_to(ROOT).parts)
)
# of the user, or of torchrun and our shell scripts; what a command writes
OUTSIDE = re.compile(
    r"IMAGENET|IMAGES|CODES|DIR|FILE|FOLDER|NAME|VIRTUAL_|results/|samples/|quickstart/|\.\.\.|~|://"
)


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def commands(path: Path) -> list[list[str]]:
    """Return the commands in a page's blocks of code, as words."""
    blocks = re.findall(r"^```\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines = [line for line in lines if re.match(r"(\w+=\S+ )*(bash|python3) ", line)]
    return [shlex.split(line, comments=True) for line in lines]


def script_of(words: list[str]) -> Path:
    """Return the Python file that a command runs, or the shell script if it runs none by itself."""
    script = Path(next(w for w in words if w.endswith((".py", ".sh"))))
    if script.suffix == ".sh":
        started = re.search(r"launch\.sh\" (\S+\.py)", (ROOT / script).read_text())
        return Path(started[1]) if started else script
    return script


@pytest.mark.parametrize("path", READMES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file) if file else path
        assert linked.exists(), f"{path}: {target}"
        assert not anchor or anchor in anchors(linked), f"{path}: {target}"


@pytest.mark.parametrize("path", READMES, ids=lambda p: str(p.relative_to(ROOT)))
def test_paths_exist_and_no_placeholder_is_left(path):
    text = re.sub(r"^```\n.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    code = re.findall(r"`([^`\n]+)`", text)
    for word in (
        w for c in code for w in c.split() if re.fullmatch(r"[\w./-]+/[\w.-]+\.(py|sh|md|h|txt)", w)
    ):
        known = [ROOT / word, path.parent / word, ROOT / "autoregressive" / word]
        assert OUTSIDE.search(word) or any(p.exists() for p in known), f"{path}: {word}"
    assert not re.findall(r"\b[A-Z]{3,}_[A-Z]{3,}\b", re.sub(r"`[^`]*`|\([^)]*\)", "", text)), path


@pytest.mark.parametrize(
    "path", [p for p in READMES if commands(p)], ids=lambda p: str(p.relative_to(ROOT))
)
def test_commands_name_scripts_and_options_that_there_are(path, capsys, monkeypatch):
    for words in commands(path):
        script = script_of(words)
        assert (ROOT / script).is_file(), f"{path}: {script}"
        options = {w.partition("=")[0] for w in words if w.startswith("--") and " " not in w}
        text = (ROOT / script).read_text()
        seen, todo = set(), [script] if script.suffix == ".py" else []
        while todo:  # the script and all modules of ours below it
            source = (ROOT / todo.pop()).read_text()
            text += source
            for module in set(re.findall(r"^from ([\w.]+) import", source, re.MULTILINE)) - seen:
                seen.add(module)
                file = Path(*module.split(".")).with_suffix(".py")
                todo += [file] if (ROOT / file).is_file() else []
        unknown = {o for o in options if f'"{o}"' not in text}
        assert script.suffix == ".sh" or not unknown, (
            f"{path}: {script} has no {', '.join(sorted(unknown))}"
        )


BENCHMARKS = ROOT / "scripts" / "benchmarks" / "README.md"
RESULTS = re.compile(r"\]\((results/[\w-]+\.json)\)")
FIGURE = re.compile(r"(?<![\w.])(\d[\d,]*(?:\.\d+)?(?:e-?\d+)?)(x\b|%)?")
UNRECORDED = "before results were kept"


def sections(page: Path) -> dict[str, str]:
    """Return the text below each heading of a page, up to the next heading."""
    parts = re.split(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def numbers_in(value: object) -> set[float]:
    """Return all numbers in a JSON value."""
    if isinstance(value, dict):
        return numbers_in(list(value.values()))
    if isinstance(value, list):
        return set().union(*map(numbers_in, value))
    return {float(value)} if isinstance(value, int | float) else set()


def is_recorded(text: str, unit: str, recorded: set[float]) -> bool:
    """Return whether a figure is one of the recorded numbers, rounded as it is written."""
    text = text.replace(",", "")
    decimals = len(text.partition("e")[0].partition(".")[2])
    scale = 10.0 ** int(text.partition("e")[2] or 0) / (100 if unit == "%" else 1)
    margin = 0.501 * 10.0**-decimals * scale
    value = float(text) / (100 if unit == "%" else 1)
    return any(abs(value - number) <= margin for number in recorded)


MEASURED = {h: t for h, t in sections(BENCHMARKS).items() if re.search(r"^\|", t, re.MULTILINE)}


@pytest.mark.parametrize("heading", MEASURED)
def test_measured_tables_stand_in_a_json_that_the_benchmark_wrote(heading):
    text = MEASURED[heading]
    files = RESULTS.findall(text)
    assert bool(files) != (UNRECORDED in text), f"{heading}: name its results, or say {UNRECORDED}"
    records = [json.loads((BENCHMARKS.parent / file).read_text()) for file in files]
    for record in records:
        assert {"git", "device"} <= record.keys() | record.get("environment", {}).keys(), heading
    recorded = numbers_in(records)
    rows = [line for line in text.splitlines() if line.startswith("|") and files]
    for row in rows[2:]:
        for text, unit in FIGURE.findall(row):
            assert is_recorded(text, unit, recorded), f"{heading}: {text}{unit} in {row}"


def test_figures_are_told_from_others():
    recorded = {2.4537, 0.946, 1.97e-6, 4.0}
    assert all(is_recorded(*figure, recorded) for figure in FIGURE.findall("2.45 2.5 95% 2.0e-6 4"))
    assert not any(is_recorded(*figure, recorded) for figure in FIGURE.findall("2.46 94% 2.1e-6 5"))


@pytest.mark.parametrize(
    "path", [p for p in READMES if p != BENCHMARKS], ids=lambda p: str(p.relative_to(ROOT))
)
def test_ratios_quoted_on_other_pages_stand_among_the_benchmarks(path):
    text = re.sub(r"`[^`]*`|\[[^\]]*\]\([^)]*\)", "", path.read_text())
    text = re.sub(r"^```\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    quoted = set(re.findall(r"(?<![\w-])\d+(?:\.\d+)?x\b", text))
    measured = {float(m) for m in re.findall(r"\b(\d+(?:\.\d+)?)x", BENCHMARKS.read_text())}
    missing = [q for q in quoted if not is_recorded(q[:-1], "", measured)]
    assert not missing, f"{path}: {', '.join(missing)}"
