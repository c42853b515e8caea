"""Sizes, models and epochs follow from images, machine and budget."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from scripts.own_images.choices import GPTS, MARGIN, Plan, Tokenizer, load_plan
from scripts.own_images.commands import commands
from scripts.own_images.explain import warnings
from tests.scripts.own_images.helpers import found, plan_of
from utils.files import write_json


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


@pytest.mark.parametrize(
    "change",
    [
        {"classifier_epochs": "1; touch hacked"},
        {"gpt": "GPT-S; touch hacked"},
        {"size": True},
        {"seconds": {"GPT": "1"}},
        {"tokenizer": {"path": None, "name": "x; y", "downsample": 4, "codebook": 9}},
        {"tokenizer": [1]},
        {"images": None},
        {"more": 1},
    ],
    ids=str,
)
def test_a_plan_that_would_put_other_words_into_commands_is_refused(tmp_path, change):
    """Commands are run by a shell: the first of these ran."""
    path = tmp_path / "plan.json"
    write_json(path, asdict(plan_of(found())) | change)
    with pytest.raises(ValueError, match=r"plan\.json is damaged or of another version"):
        load_plan(path)


def test_a_plan_that_is_no_plan_is_refused(tmp_path):
    for text in ("[]", "", "[" * 100_000):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(ValueError, match=r"plan\.json is damaged or of another version"):
            load_plan(tmp_path / "plan.json")
