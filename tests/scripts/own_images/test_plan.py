"""Mistakes in the options of own_images.sh."""

from __future__ import annotations

import re
import shlex
import sys

import pytest

from scripts.own_images import plan as planner
from utils.options import run_main

MISTAKES = {
    "nowhere": "FOLDER: nowhere does not exist",
    "flat": "has no class folders",
    "one": "class a has 1 readable images; at least 4",
    "broken": "none of the 3 image files",
    "folder --output folder/out": "is inside FOLDER",
    "folder --output .": "holds other files",
    "folder --budget 0": "--budget 0 must be",
    "folder --finetune": "--finetune needs --tokenizer",
    "folder --tokenizer none.pt": "--tokenizer: .*none.pt does not exist",
    "folder --size 30": "--size 30 must be a multiple of 8",
}


@pytest.mark.parametrize("words", MISTAKES, ids=str)
def test_a_mistake_is_one_line(folder, tmp_path, monkeypatch, capsys, words):
    folder.rename(tmp_path / "folder")
    image = next((tmp_path / "folder" / "ape").glob("*.png")).read_bytes()
    for name, content in (("flat/1.png", image), ("one/a/1.png", image)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "broken" / "a").mkdir(parents=True)
    for i in range(3):
        (tmp_path / "broken" / "a" / f"{i}.png").write_bytes(image[:50])
    if "--output" not in words:
        words += " --output out"
    monkeypatch.setattr(
        sys, "argv", ["plan.py", *shlex.split(words), "--relative-to", str(tmp_path)]
    )
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run_main(planner.main)
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line and "images/s" not in line
    ]
    lines = [line for line in lines if "measuring this machine" not in line]
    assert stop.value.code == 2 and len(lines) == 1
    assert lines[0].startswith("error: ")
    assert re.search(
        MISTAKES[words.removesuffix(" --output out")].replace("nowhere does", ".*nowhere does"),
        lines[0],
    )
    assert sorted(tmp_path.rglob("*")) == before
