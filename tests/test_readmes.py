"""READMEs: links and paths exist, commands name scripts and options that there are, and no
placeholder is left.
"""

import re
import shlex
from pathlib import Path

import pytest

from tests.helpers import ROOT

READMES = sorted(
    p
    for p in ROOT.rglob("*.md")
    if not {".venv", "quickstart", "results"} & set(p.relative_to(ROOT).parts)
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
