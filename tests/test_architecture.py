"""The shape of the tree: imports flow one way, every option is read, every script explains
itself.
"""

import ast
import functools
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.effects import declared_options, is_declaration
from tests.helpers import ROOT

# layer -> what it may import of ours; entry scripts may import everything below them
ALLOWED = {
    "utils": {"utils"},
    "dataset": {"dataset", "utils"},
    "tokenizer": {"tokenizer", "dataset", "utils"},
    "autoregressive/models": {"autoregressive.models", "utils"},
    "autoregressive": {"autoregressive", "tokenizer", "dataset", "utils"},
    "evaluations": {"evaluations", "dataset", "utils"},
}
OURS = ("utils", "dataset", "tokenizer", "autoregressive", "evaluations")
SOURCES = sorted(p.relative_to(ROOT) for top in OURS for p in (ROOT / top).rglob("*.py"))
SCRIPTS = [p for p in SOURCES if "__main__" in (ROOT / p).read_text()]
SCRIPTS += sorted(
    p.relative_to(ROOT) for p in (ROOT / "scripts").rglob("*.py") if "__main__" in p.read_text()
)


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
        elif isinstance(node, ast.Import):
            modules |= {a.name for a in node.names}
    return {m for m in modules if m.split(".")[0] in OURS}


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_flow_one_way(path):
    layer = max((k for k in ALLOWED if str(path).startswith(k + "/")), key=len)
    for module in imported_modules(path):
        assert any(module == a or module.startswith(a + ".") for a in ALLOWED[layer]), (
            f"{path} imports {module}"
        )


TESTS = sorted(p.relative_to(ROOT) for p in (ROOT / "tests").rglob("*.py") if p.stat().st_size)


@pytest.mark.parametrize("path", TESTS, ids=str)
def test_test_files_share_through_helpers_alone(path):
    imports = (
        node
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.ImportFrom)
    )
    names = {f"{node.module}.{alias.name}" for node in imports for alias in node.names}
    shared = {"helpers", "effects", "fake_cuda", "crash_points"}
    shared |= {"forks", "kill_table", "fuzz", "fuzz_kinds", "fuzz_readers"}
    ours = [name.split(".") for name in names if name.startswith("tests.")]
    assert not [name for name in ours if not shared & set(name)]


MIRRORED = [
    p.relative_to("tests") for p in TESTS if p.name.startswith("test_") and len(p.parts) > 2
]


@pytest.mark.parametrize("path", MIRRORED, ids=str)
def test_test_files_mirror_the_tree(path):
    """tests/X/test_y.py is of X/y.py, or of a script or folder X/y; others lie in tests/."""
    name = path.stem.removeprefix("test_")
    assert (ROOT / path.parent / name).is_dir() or list((ROOT / path.parent).glob(f"{name}.*"))


def test_no_script_imports_another():
    names = {str(p.with_suffix("")).replace("/", ".") for p in SCRIPTS}
    for path in SOURCES:
        assert not imported_modules(path) & names, path


@functools.cache
def names_read(path: Path) -> set[str]:
    """Names that a file reads as args.NAME, holds as a string, or has as a field of a class."""
    names = set()
    tree = ast.parse((ROOT / path).read_text())
    declared = {
        a for n in ast.walk(tree) if isinstance(n, ast.Call) and is_declaration(n) for a in n.args
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and getattr(node.value, "attr", getattr(node.value, "id", "")) == "args"
        ):
            names.add(node.attr)
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in declared
        ):
            names.add(node.value)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


@pytest.mark.parametrize("path", [p for p in SOURCES if declared_options(p)], ids=str)
def test_every_option_is_read(path):
    """A declared option is read in its layer; of trainers, tests/effects.py asks for more."""
    layer = [p for p in SOURCES if path.parts[0] in ("utils", p.parts[0])]
    assert declared_options(path) <= set().union(*map(names_read, layer))


@pytest.mark.parametrize("path", SCRIPTS, ids=str)
def test_help_has_an_example(path, monkeypatch, capsys):
    """Run in this process, as starting one for each script takes over a minute."""
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    text = capsys.readouterr().out
    assert end.value.code == 0 and "example:" in text
    assert "sys.path.insert(0, " in (ROOT / path).read_text(), "it must run from anywhere"
    assert len(text.splitlines()) > 5


# folders and files whose options come from modules that compute
IMPORT_TORCH_FIRST = ("scripts/benchmarks", "scripts/experiments", "scripts/quickstart")
IMPORT_TORCH_FIRST += ("scripts/small_models", "scripts/doctor.py")
HELP_WITHOUT_TORCH = """
import os, runpy, sys
heavy = ("torch", "torchvision", "timm", "scipy", "matplotlib", "PIL")
sys.modules.update(dict.fromkeys(heavy))  # importing them is an ImportError
root = sys.path[:]
sys.stdout = open(os.devnull, "w")
for path in sys.argv[1:]:
    sys.argv, sys.path = [path, "--help"], root[:]
    try:
        runpy.run_path(path, run_name="__main__")
    except (SystemExit, ImportError) as end:
        if getattr(end, "code", end) != 0:
            print(path, end, file=sys.stderr)
"""


def test_help_comes_without_importing_torch():
    """In one process, where it cannot be imported: it takes seconds."""
    scripts = [str(p) for p in SCRIPTS if not str(p).startswith(IMPORT_TORCH_FIRST)]
    command = [sys.executable, "-c", HELP_WITHOUT_TORCH, *scripts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(scripts) > 16 and not done.stderr
