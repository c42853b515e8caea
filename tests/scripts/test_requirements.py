"""The project's metadata agree with one another."""

import re
import subprocess
import sys

import pytest

from scripts.requirements import NEWEST_PYTHON, numbers, wanted
from tests.helpers import ROOT


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_pyproject_names_the_requirements(monkeypatch):
    import tomllib

    monkeypatch.chdir(ROOT)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == list(wanted("requirements.txt"))
    extras = project["optional-dependencies"]
    everything = [*project["dependencies"], *extras["dev"], *extras["quickstart"]]
    assert everything == list(wanted("requirements-dev.txt"))


def test_versions_tried_begin_at_the_floors(monkeypatch):
    monkeypatch.chdir(ROOT)
    floors = dict(line.split(">=") for line in wanted("requirements.txt"))
    oldest, newest = (
        dict(line.split("==") for line in wanted(f"requirements-{which}.txt"))
        for which in ("oldest", "newest")
    )
    assert floors.keys() == oldest.keys() == newest.keys()
    for name, floor in floors.items():
        assert numbers(oldest[name])[: len(numbers(floor))] == numbers(floor)
        assert numbers(newest[name]) > numbers(floor)
    script = (ROOT / "scripts" / "test_versions.sh").read_text()
    pythons = [tuple(map(int, v)) for v in re.findall(r"version=(\d+)\.(\d+)", script)]
    assert pythons == [(3, 10), NEWEST_PYTHON]


@pytest.mark.parametrize("words, message", [(["oldest"], "no python3.10"), ([], "usage: ")])
def test_what_test_versions_lacks_is_one_line(tmp_path, words, message):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "test_versions.sh"), *words],
        env={"PATH": str(tools), "HOME": str(tmp_path), "VERSIONS": str(tmp_path / "made")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
    assert not (tmp_path / "made").exists()
