"""Which Python quickstart.sh, test.sh and rehearsal.sh run on; with fake ones, as making a real
one takes minutes.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

PROBE = (
    'source scripts/environment.sh requirements-dev.txt; echo "$PYTHON"; '
    "python --probe; python3 --probe"
)
# stands for an interpreter: says which one it is, logs what it is told to do, looks for
# packages in FAKE_PACKAGES
FAKE = f"""#!/bin/bash
case $1 in
    --probe) echo "$0" ;;
    -) PYTHONPATH=$FAKE_PACKAGES exec {sys.executable} -S "$@" ;;
    *)
        echo "$0 $*" >> "$FAKE_LOG"
        [ "$2" != venv ] || {{ mkdir -p .venv/bin && cp "$0" .venv/bin/python; }}
        ;;
esac
"""


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the scripts, without ``.venv``."""
    shutil.copytree(ROOT / "scripts", tmp_path / "tree" / "scripts")
    for path in (ROOT / "requirements.txt", ROOT / "requirements-dev.txt"):
        shutil.copy(path, tmp_path / "tree")
    (tmp_path / "tree" / "images" / "ape").mkdir(parents=True)
    (tmp_path / "tree" / "images" / "ape" / "1.png").write_bytes(b"")
    return tmp_path / "tree"


@pytest.fixture
def packages(tmp_path, tree) -> Path:
    """A folder that looks as if all that is required were installed in it."""
    for path in tree.glob("requirements*.txt"):
        for line in path.read_text().splitlines():
            if line and line[0].isalpha():
                install(tmp_path / "packages", line.split(">=")[0], "99.0.1")
    return tmp_path / "packages"


def install(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def make_python(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(FAKE)
    path.chmod(0o755)
    return path


@pytest.fixture
def bash(tmp_path, tree, packages):
    """``bash(command)`` in the tree, nothing active; an unwanted python3 is first in PATH."""
    other = make_python(tmp_path / "other" / "python3").parent
    make_python(other / "python")
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX", "nproc_per_node")
    }
    kept |= {"PATH": f"{other}:{os.environ['PATH']}", "FAKE_PACKAGES": str(packages)}
    kept["FAKE_LOG"] = str(tmp_path / "log")

    def call(command: str, cwd: Path = tree, **environment: object) -> subprocess.CompletedProcess:
        env = kept | {k: str(v) for k, v in environment.items()}
        return subprocess.run(
            ["bash", "-c", command], cwd=cwd, env=env, capture_output=True, text=True, timeout=60
        )

    return call


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_an_active_environment_is_used_as_it_is(bash, tree, tmp_path, variable):
    python = make_python(tmp_path / "my env" / "bin" / "python")
    make_python(python.with_name("python3"))
    done = bash(PROBE, **{variable: tmp_path / "my env"})
    assert done.stdout.splitlines() == [str(python), str(python), f"{python}3"], done.stderr
    assert not (tree / ".venv").exists() and not (tmp_path / "log").exists()


def test_the_virtual_environment_goes_before_conda_s_and_PYTHON_before_both(bash, tmp_path):
    venv, conda = (
        make_python(tmp_path / name / "bin" / "python").parents[1] for name in ("venv", "conda")
    )
    both = {"VIRTUAL_ENV": venv, "CONDA_PREFIX": conda}
    assert bash(PROBE, **both).stdout.splitlines()[0] == f"{venv}/bin/python"
    mine = make_python(tmp_path / "mine" / "python-mine")
    assert bash(PROBE, **both, PYTHON=mine).stdout.splitlines() == [str(mine)] * 3


def test_PYTHON_may_be_a_name_or_a_relative_path(bash, tree, tmp_path):
    """``python`` is that very one, though another stands beside it and before it in PATH."""
    mine = make_python(tmp_path / "mine" / "python-mine")
    make_python(mine.with_name("python"))
    by_name = bash(f"PATH=$PATH:{mine.parent}; {PROBE}", PYTHON="python-mine")
    elsewhere = PROBE.replace("scripts/", f"{tree}/scripts/")
    by_path = bash(elsewhere, cwd=tmp_path, PYTHON="mine/python-mine")
    again = bash(elsewhere, cwd=tmp_path / "mine", PYTHON="./python-mine")
    for done in (by_name, by_path, again):
        assert done.stdout.splitlines() == [str(mine)] * 3, done.stderr
    assert not (tree / ".venv").exists()


def test_PYTHON_that_is_not_there_is_an_error(bash):
    done = bash(PROBE, PYTHON="python9")
    assert (done.returncode, done.stdout, done.stderr) == (
        2,
        "",
        "error: PYTHON: there is no program python9\n",
    )


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh", "rehearsal.sh images"])
def test_missing_packages_are_named_before_any_work(bash, packages, tree, tmp_path, script):
    """One that is absent, one that is too old; nothing runs and nothing is installed."""
    shutil.rmtree(packages / "timm.dist-info")
    install(packages, "torch", "2.6.1+cu126")
    python = make_python(tmp_path / "env" / "bin" / "python")
    done = bash(f"bash scripts/{script}", VIRTUAL_ENV=tmp_path / "env")
    assert done.returncode == 2 and done.stdout == ""
    command = f"{python} -m pip install 'torch>=2.7' 'timm>=1.0'"
    assert done.stderr == f"error: {python} lacks torch>=2.7, timm>=1.0; to install: {command}\n"
    assert sorted(p.name for p in tree.iterdir()) == [
        "images",
        "requirements-dev.txt",
        "requirements.txt",
        "scripts",
    ]
    assert not (tmp_path / "log").exists()


def test_without_an_environment_one_is_made_once(bash, tree, tmp_path):
    for _ in range(2):
        done = bash(PROBE)
        assert done.stdout.splitlines()[-3:-1] == [f"{tree}/.venv/bin/python"] * 2, done.stderr
    made, installed = (tmp_path / "log").read_text().splitlines()
    assert made.endswith("python3 -m venv .venv")
    assert ".venv/bin/python -m pip install" in installed and installed.endswith(
        "-r requirements-dev.txt"
    )


def test_rehearsal_hands_options_on(bash, tree, tmp_path):
    python = make_python(tmp_path / "python")
    options = "--gpt-model GPT-L --mixed-precision none -- --precision none --top-k 5"
    done = bash(f"bash scripts/rehearsal.sh images {options}", PYTHON=python)
    assert done.returncode == 0, done.stderr
    steps = {
        line.split()[1].split("/")[-1]: line for line in (tmp_path / "log").read_text().splitlines()
    }
    names = [
        "random_weights.py",
        "extract_codes_c2i.py",
        "train_c2i.py",
        "sample_c2i_ddp.py",
        "images_to_npz.py",
    ]
    assert list(steps) == [*names, "evaluator.py"]
    assert all(line.startswith(f"{python} ") for line in steps.values())
    assert steps["random_weights.py"].endswith("--gpt-model GPT-L")
    assert "--gpt-model GPT-L " in steps["train_c2i.py"] and steps["train_c2i.py"].endswith(
        "--mixed-precision none"
    )
    assert "--gpt-ckpt rehearsal/weights/PAR-L-4x.pt " in steps["sample_c2i_ddp.py"]
    assert steps["sample_c2i_ddp.py"].endswith("--precision none --top-k 5")
    assert (tree / "rehearsal" / "images" / "ape" / "1.png").exists()


@pytest.mark.parametrize(
    "words, status", [("", 2), ("--help", 0), ("-h", 0), ("--gpt-model GPT-L", 2)]
)
def test_rehearsal_says_how_it_is_used(bash, tree, words, status):
    done = bash(f"bash scripts/rehearsal.sh {words}")
    text = done.stdout if status == 0 else done.stderr
    assert done.returncode == status and text.startswith("usage: bash scripts/rehearsal.sh FOLDER")
    assert not (tree / ".venv").exists()
