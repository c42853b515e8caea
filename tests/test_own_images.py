"""scripts/own_images.sh: choices, split, warnings, commands, mistakes, and the whole once."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.own_images import images as folders
from scripts.own_images import plan as planner
from scripts.own_images.choices import (
    GPTS,
    MARGIN,
    Options,
    Plan,
    Tokenizer,
    choose,
    load_plan,
)
from scripts.own_images.commands import commands
from scripts.own_images.explain import describe, warnings
from scripts.own_images.images import Images, divide, held_out, list_classes, look, split
from tests.helpers import ROOT, run_command
from utils.files import write_json
from utils.options import run_main

SCRIPT = ("bash", "scripts/own_images.sh")


class FakeMachine:
    """Costs in proportion to pixels, codes and parameters; ``speed`` 1 is about two old cores."""

    cores, vq_batch, gpt_batch, perceptual = 2, 8, 16, False

    def __init__(self, speed: float = 1.0) -> None:
        self.speed = speed

    def overhead(self) -> float:
        return 60.0

    def train_tokenizer(self, vq: Tokenizer, size: int) -> float:
        return (0.017 if vq.name == "VQ-4" else 0.3) * (size / 32) ** 2 / self.speed

    def code(self, vq: Tokenizer, size: int) -> tuple[float, float]:
        return self.train_tokenizer(vq, size) / 10, self.train_tokenizer(vq, size) / 8

    def train_gpt(self, name: str, grid: int, codebook: int, n: int, dropout: float) -> float:
        return 0.008 * 4.0 ** list(GPTS).index(name) * (grid / 8) ** 2 / self.speed

    def train_classifier(self, size: int) -> float:
        return 0.001 * (size / 32) ** 2 / self.speed

    def inception(self, size: int) -> float:
        return 0.05 / self.speed


def found(per_class: int = 500, classes: int = 10, side: int = 32, unreadable: int = 0) -> Images:
    counts = {f"class {i:02d}": per_class for i in range(classes)}
    broken = [f"class 00/{i}.jpg" for i in range(unreadable)]
    return Images(counts, [side] * 11, 1e-4, broken)


def plan_of(
    images: Images, budget: float = 20, speed: float = 1.0, file: Tokenizer | None = None, **changes
) -> Plan:
    options = Options("/data/x", "/data/out", None, budget, None, False, True, 0)
    options = replace(options, **changes)
    return choose(options, images, FakeMachine(speed), file, inception=False)


@pytest.fixture
def folder(tmp_path) -> Path:
    """24 images of three classes, some in sub-folders; an unreadable one, an empty class."""
    rng = np.random.default_rng(0)
    for label in ("ape", "bee", "cat"):
        (tmp_path / "images" / label / "more").mkdir(parents=True)
        for i in range(8):
            pixels = np.full((40 + i, 36, 3), rng.integers(0, 256, 3), np.uint8)
            name = f"more/{i}.png" if i == 7 else f"{i}.png"
            Image.fromarray(pixels).save(tmp_path / "images" / label / name)
    (tmp_path / "images" / "cat" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "images" / "empty").mkdir()
    return tmp_path / "images"


@pytest.mark.parametrize("speed", [0.5, 1, 10, 1000])
@pytest.mark.parametrize("budget", [5, 20, 120])
@pytest.mark.parametrize("per_class", [8, 30, 500, 100_000])
def test_a_plan_fits_the_budget(tmp_path, speed, budget, per_class):
    """Except where one epoch, the least, takes longer, and then it says so."""
    plan = plan_of(found(per_class, side=256), budget, speed)
    expected = sum(plan.seconds.values())
    assert expected <= 60 * budget * MARGIN + 1 or min(plan.tokenizer_epochs, plan.gpt_epochs) == 1
    assert expected <= 1.15 * 60 * budget
    assert plan.tokenizer_batch <= plan.used and plan.gpt_batch <= plan.used
    write_json(tmp_path / "plan.json", asdict(plan))
    assert load_plan(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("speed", [1, 30, 1000, 30_000])
def test_more_minutes_or_images_never_make_anything_smaller(speed):
    def sizes(plan: Plan) -> tuple[int, int]:
        return plan.size, list(GPTS).index(plan.gpt)

    longer = [sizes(plan_of(found(side=512), budget, speed)) for budget in (1, 5, 20, 60, 600)]
    assert [size for size, _ in longer] == sorted(size for size, _ in longer)
    at_32 = [
        plan_of(found(n, side=512), 20, speed, size=32) for n in (8, 30, 100, 500, 2_000, 20_000)
    ]
    gpts, codebooks = [sizes(p)[1] for p in at_32], [p.tokenizer.codebook for p in at_32]
    assert gpts == sorted(gpts) and codebooks == sorted(codebooks)
    assert codebooks[0] == 256 and codebooks[-1] == 512


def test_a_fast_machine_and_large_images_get_larger_models():
    slow, fast = plan_of(found(side=512), 20, 1), plan_of(found(20_000, side=512), 60, 3000)
    assert (slow.size, slow.gpt, slow.tokenizer.name) == (32, "GPT-T", "VQ-4")
    assert fast.size >= 128 and fast.gpt != "GPT-T" and fast.tokenizer.name == "VQ-16"
    assert plan_of(found(side=32), 600, 3000).size == 32  # never above the images


def test_a_given_tokenizer_is_used_as_it_is_or_finetuned():
    file = Tokenizer("/t/vq_ds16_c2i.pt", "VQ-16", 16, 16384)
    given = {"tokenizer": "/t/vq_ds16_c2i.pt", "file": file}
    used, tuned = (
        plan_of(found(side=300), speed=50, finetune=finetune, **given) for finetune in (False, True)
    )
    assert used.tokenizer_epochs == 0 and used.seconds["tokenizer"] == 0
    assert tuned.tokenizer_epochs > 0 and tuned.tokenizer == used.tokenizer == file
    assert any("softer" in line for line in warnings(tuned))
    words = commands(tuned)[0].line
    assert "--finetune" in words and "--codebook-init" not in words
    assert "train_vq.sh" not in "".join(c.line for c in commands(used))
    # not asked for: taken only where the budget is enough at 128 pixels
    assert plan_of(found(side=300), speed=50, file=file).tokenizer == file
    assert plan_of(found(side=300), speed=0.2, file=file).tokenizer.path is None


@pytest.mark.parametrize("size", [30, 4, 12])
def test_a_size_that_does_not_divide_is_refused(size):
    with pytest.raises(ValueError, match=f"--size {size} must be a multiple of 8 and at least 16"):
        plan_of(found(), size=size)


def test_warnings_name_what_goes_wrong():
    text = "\n".join(warnings(plan_of(found(30, side=20, unreadable=2), 2)))
    for part in (
        "2 unreadable files",
        "fewer than 100 images",
        "sorted names",
        "mirrored",
        "enlarged",
    ):
        assert part in text
    assert "2 minutes are too few for anything to be learned" in text
    assert "the metrics are rough" in "\n".join(warnings(plan_of(found(30, classes=2))))
    assert "shortest possible run" in "\n".join(warnings(plan_of(found(30), 0.5)))
    fine = "\n".join(warnings(plan_of(found(), 20, flip=False)))
    assert not re.search("mirrored|too few for|enlarged|unreadable|fewer|rough", fine)
    numbered = replace(found(), counts={str(i): 500 for i in sorted(range(11), key=str)})
    assert "sorted as text" in "\n".join(warnings(plan_of(numbered)))
    many = plan_of(found(100_000))
    assert any("has no room for more" in line for line in warnings(many))
    slow = replace(found(), seconds=0.5)
    assert any("reading the files takes" in line for line in warnings(plan_of(slow)))


def test_held_out_parts():
    assert set(held_out(found(500).counts).values()) == {50}
    assert held_out({"a": 10}) == {"a": 4} and held_out({"a": 4, "b": 1000}) == {"a": 1, "b": 50}
    assert sum(held_out(found(10_000, 100).counts).values()) == 1000
    with pytest.raises(ValueError, match="class b has 3 readable images; at least 4"):
        held_out({"a": 100, "b": 3})
    with pytest.raises(ValueError, match="6 images are too few"):
        held_out({"a": 6})


def test_the_split_is_disjoint_deterministic_and_stable():
    names = [f"a/{i}.png" for i in range(50)]
    parts = divide(names, 5, 1000, seed=0)
    assert sorted(sum(parts.values(), [])) == sorted(names)
    assert parts == divide(names[::-1], 5, 1000, seed=0) != divide(names, 5, 1000, seed=1)
    assert len(divide(names, 5, 7, seed=0)["train"]) == 7


@pytest.mark.parametrize("links", [True, False])
def test_split_links_or_copies(folder, tmp_path, monkeypatch, links):
    if not links:
        for name in ("symlink", "link"):
            monkeypatch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError("no links")))
    found = look(folder)
    assert found.counts == {"ape": 8, "bee": 8, "cat": 8} and found.unreadable == ["cat/broken.jpg"]
    assert (found.sides[0], found.sides[-1]) == (36, 36)
    split(folder, tmp_path / "split", found, 3, seed=0)
    files = list((tmp_path / "split").rglob("*.png"))
    assert len(files) == 3 * (2 + 2 + 3) and all(p.is_symlink() == links for p in files)
    assert {p.relative_to(tmp_path / "split").parts[0] for p in files} == set(folders.PARTS)
    for path in files:
        source = folder / path.relative_to(
            tmp_path / "split" / path.relative_to(tmp_path / "split").parts[0]
        )
        assert path.read_bytes() == source.read_bytes()
    originals = [path.relative_to(tmp_path / "split").parts[1:] for path in files]
    assert len(set(originals)) == len(originals)
    assert len(list_classes(folder)["cat"]) == 9
    assert not list(tmp_path.glob("*.tmp-*"))


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


@pytest.mark.slow
def test_the_whole_and_again(folder, tmp_path):
    """A dry run, a run, and a rerun that finds all done; other options are refused."""
    base = (*SCRIPT, folder, "--budget", 0.5, "--no-flip", "--output", tmp_path / "out")
    dry = run_command(*base, "--dry-run").stdout
    assert "+ bash scripts/tokenizer/train_vq.sh" in dry and not (tmp_path / "out").exists()
    done = run_command(*base).stdout
    for part in (
        "+ bash scripts/autoregressive/train_c2i.sh",
        "=== done in",
        "Frechet distance *",
        "next steps",
    ):
        assert part in done
    assert "1 unreadable files" in done
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        assert picture.size == (12 * 34 + 2, 3 * (16 + 34 + 2))
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    again = run_command(*base).stdout
    assert again.count("is there already") == 9 and "\n+ " not in again
    assert again.split("\npictures\n")[1] == done.split("\npictures\n")[1]
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    (tmp_path / "out" / "samples.png").unlink()
    assert run_command(*base).stdout.count("\n+ ") == 1
    other = run_command(*base[:-2], "--seed", 1, *base[-2:], check=False)
    assert other.returncode == 2 and "made with another seed (0 there, 1 now)" in other.stderr
