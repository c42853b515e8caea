"""The commands of own_images.sh."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
import sys

import pytest

from scripts.own_images.commands import commands
from scripts.own_images.explain import describe
from tests.helpers import ROOT
from tests.scripts.own_images.helpers import found, plan_of


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("speed", [1, 3000])
def test_commands_are_accepted_by_their_scripts(flip, speed, monkeypatch):
    """Each is parsed by the script's own parser."""
    plan = plan_of(found(20_000 if speed > 1 else 500, side=512), speed=speed, flip=flip)
    for title, made, line in commands(plan):
        words = shlex.split(line)
        script = next(w for w in words if w.endswith((".sh", ".py")))
        if script.endswith(".sh"):
            script = re.search(r"launch\.sh\" (\S+\.py)", (ROOT / script).read_text())[1]
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        assert title and made.startswith("/data/out")
        if hasattr(module, "parse_args"):
            monkeypatch.setattr(sys, "argv", words[1:])
            description = inspect.signature(module.parse_args).parameters
            args = vars(module.parse_args(*[module.__doc__ or ""] * len(description)))
            if "no_flip" in args:
                assert args["no_flip"] is not flip
    assert describe(plan)
