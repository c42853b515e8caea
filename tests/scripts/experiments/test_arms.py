"""What experiments conclude from: losses of held-out images, and paired differences."""

import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from autoregressive.models.gpt import GPT
from dataset.codes import open_codes
from scripts.diagnosis.models import fill_from_names
from scripts.experiments import e7_sampling
from scripts.experiments.arms import Arm, folder_of, measure_losses, paired_difference, run_arms
from scripts.experiments.data import Data
from tests.helpers import make_plan, small_config, write_all


def test_losses_are_those_of_the_model_at_the_cells_of_its_order(tmp_path):
    gpt = fill_from_names(
        GPT(small_config(vocab_size=100, grid_height=2, grid_width=2, ar_token_num=2))
    )
    content = {"model": gpt.state_dict(), "config": asdict(gpt.config), "gpt_model": "GPT-S"}
    torch.save(content, tmp_path / "gpt.pt")
    plan = make_plan()
    write_all(tmp_path / "codes", plan)
    codes = open_codes(tmp_path / "codes")
    measure_losses(tmp_path / "gpt.pt", tmp_path / "codes", 5, tmp_path / "losses.npz")
    file = np.load(tmp_path / "losses.npz")
    chosen = np.linspace(0, len(codes) - 1, 5).astype(int)
    x, y = (torch.from_numpy(a) for a in codes.batch(chosen, np.zeros(5, dtype=int)))
    with torch.no_grad():
        log_p = gpt.eval().logits(x, y).log_softmax(-1)  # (5, T, V) in region order
    for i in range(5):
        for token, cell in enumerate(file["raster"]):
            expected = -log_p[i, token, x[i, cell]].item()
            assert file["losses"][i, token] == pytest.approx(expected, abs=1e-4)
    for step, (_, _, first, end) in enumerate(gpt.order.steps):
        assert (file["step"][first:end] == step).all()


def write_losses(path: Path, values: np.ndarray) -> dict[str, str]:
    np.savez(path, losses=values)
    return {"losses": str(path)}


def test_paired_differences_have_the_interval_of_a_mean(tmp_path):
    """Images differ much, the arms little: unpaired, nothing would be seen."""
    rng = np.random.default_rng(0)
    images = rng.normal(80.0, 20.0, (1000, 1))
    gap = rng.normal(0.5, 2.0, (1000, 1))
    base = [write_losses(tmp_path / f"a{i}.npz", images) for i in range(2)]
    arm = [write_losses(tmp_path / f"b{i}.npz", images + gap + i) for i in range(2)]
    found = paired_difference(arm, base)
    mean, error = gap.mean() + 0.5, gap.std() / 1000**0.5
    assert found["mean"] == pytest.approx(mean)
    assert found["low"] == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert found["high"] == pytest.approx(mean + 1.96 * error, abs=0.2 * error)
    assert found["seeds"] == pytest.approx([gap.mean(), gap.mean() + 1])


def test_what_is_trained_alike_is_trained_once():
    args = Namespace(epochs=6)
    data = Data(*map(Path, ("t", "d/codes", "d/held", "d/r.npz", "d/c.pt")))
    folders = {
        folder_of(args, data, arm, seed)
        for arm in (Arm(4), Arm(1), Arm(4, ("--order", "raster")), Arm(4, gpt_model="GPT-S"))
        for seed in (0, 1)
    }
    assert len(folders) == 8
    assert folder_of(args, data, Arm(4), 0) in folders
    assert folder_of(Namespace(epochs=7), data, Arm(4), 0) not in folders


def test_unknown_arms_are_named():
    with pytest.raises(ValueError, match="--arms: there is no z; there are a, b"):
        run_arms(Namespace(arms=["z"]), {"a": Arm(1), "b": Arm(4)})


def test_an_unknown_arm_is_named_before_anything_is_made(tmp_path, monkeypatch):
    """e7, which runs its arms itself, made data for minutes and ended in a KeyError."""
    words = ["e7_sampling.py", "--arms", "n = 5", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(ValueError, match="--arms: there is no n = 5; there are n = 1"):
        e7_sampling.main()
    assert not (tmp_path / "out").exists()
