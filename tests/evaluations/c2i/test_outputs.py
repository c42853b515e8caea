"""Where the evaluator writes: never over what it has not written."""

from __future__ import annotations

import pytest


def test_a_text_that_the_published_evaluator_wrote_is_kept(sets, evaluate):
    (sets / "sam.txt").write_text("FID: 2.29")
    assert "sam.txt was made otherwise and is kept" in evaluate(sets).out
    assert (sets / "sam.txt").read_text() == "FID: 2.29"
    (json_path,) = sets.glob("sam.metrics.*.json")
    assert len(list(sets.glob("sam.*.txt"))) == 1 and json_path.exists()


def test_output_spares_the_text_of_something_else(sets, evaluate):
    (sets / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="--output notes.json: notes.txt is of something else"):
        evaluate(sets, "--output", "notes.json")
    assert (sets / "notes.txt").read_text() == "mine" and not (sets / "notes.json").exists()


@pytest.mark.parametrize("name", ["sam.json", "ref.json"])
def test_output_spares_what_the_sampler_wrote_of_its_options(sets, evaluate, name):
    (sets / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{name} would be written over"):
        evaluate(sets, "--output", name)
    assert (sets / name).read_text() == "{}"
