"""The project's metadata agree with one another."""

import sys

import pytest

from scripts.requirements import wanted
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
