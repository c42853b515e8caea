"""The evaluator's self-check."""

from __future__ import annotations

import sys

import pytest
import torch

from evaluations.c2i import evaluator, self_check
from tests.helpers import recipe_state


def test_self_check_passes_and_notices_a_change(tmp_path, monkeypatch, capsys):
    torch.save(recipe_state(), tmp_path / "recipe.pth")
    monkeypatch.setattr(sys, "argv", ["evaluator.py", "--self-check", "--allow-unknown-weights"])
    sys.argv += ["--inception-weights", str(tmp_path / "recipe.pth")]
    evaluator.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all(" ok " in line for line in lines)
    resize = self_check.inception.resize_tf1
    monkeypatch.setattr(
        self_check.inception, "resize_tf1", lambda *a: resize(*a).nextafter(torch.tensor(1e9))
    )
    monkeypatch.setattr(self_check, "check_network", lambda: "")
    with pytest.raises(ValueError, match="failed: weights, resize$"):
        self_check.self_check(None, tmp_path, True)


def test_openai_samples_are_compared_with_their_published_figures():
    measured = dict(inception_score=215.8, fid=3.9, sfid=6.1, precision=0.8, recall=0.5)
    table = self_check.compare_with_published("admnet_guided_upsampled_imagenet256.npz", measured)
    assert "fid                 3.942557    3.900000 -1.08e-02" in table
    del measured["sfid"]
    assert "nan" in self_check.compare_with_published(
        "admnet_guided_upsampled_imagenet256.npz", measured
    )
    assert self_check.compare_with_published("samples.npz", measured) is None
