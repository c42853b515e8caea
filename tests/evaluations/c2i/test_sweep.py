"""The sweep over guidance scales, or any other option."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluations.c2i import evaluator, sweep


@pytest.fixture
def swept(sets, monkeypatch):
    """``swept(*options)``: a sweep whose sampler makes noise of a scale's strength, in-process."""

    def call(words, what):
        words = [str(w) for w in words]
        if what == "evaluation":
            monkeypatch.setattr(sys, "argv", words[2:])
            evaluator.main()
            return
        option = next(w for w in words if w in ("--cfg-scale", "--temperature-end", "--noise"))
        value = words[words.index(option) + 1]
        scale = {"uniform": 2.0, "gumbel": 1.0}.get(value) or float(value)
        folder = Path(words[words.index("--sample-dir") + 1])
        assert words[2:4] == ["--gpt-ckpt", "my gpt.pt"]
        folder.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(5).integers(0, int(100 * scale), (25, 8, 8, 3))
        np.savez(folder / f"samples-{scale}.npz", arr_0=noise.astype(np.uint8))

    def run_sweep(*options):
        monkeypatch.setattr(sweep, "call", call)
        words = ["sweep.py", str(sets / "ref.npz"), "--sample", "--gpt-ckpt 'my gpt.pt'", *options]
        words += [
            "--evaluate",
            f"--feature-network {sets / 'net.pt'} --device cpu",
            "--output",
            str(sets / "out"),
        ]
        monkeypatch.setattr(sys, "argv", words)
        sweep.main()

    return run_sweep


def test_a_sweep_names_the_best_scale(sets, swept, capsys):
    """The reference is noise up to 255: 2.55 comes closest."""
    swept("--cfg-scales", "2.55", "1", "1.7")
    assert "best Frechet distance" in capsys.readouterr().out.splitlines()[-1]
    written = json.loads((sets / "out" / "sweep.json").read_text())
    assert (written["option"], written["values"]) == ("cfg-scale", ["1.0", "1.7", "2.55"])
    fids = [m["frechet_distance"] for m in written["metrics"]]
    assert fids == sorted(fids, reverse=True)
    assert len((sets / "out" / "sweep.md").read_text().splitlines()) == 5
    picture = np.asarray(Image.open(sets / "out" / "sweep.png").convert("RGB"))
    assert picture.shape == (600, 900, 3)
    assert ((picture == (31, 119, 180)).all(-1)).sum() > 300  # a line in the first colour


def test_any_option_can_be_swept(sets, swept, capsys):
    swept("--vary", "temperature-end", "2", "10", "1.5", "2")
    assert "at --temperature-end 10;" in capsys.readouterr().out.splitlines()[-1]
    written = json.loads((sets / "out" / "sweep.json").read_text())
    assert written["values"] == ["1.5", "2", "10"]  # in numerical order, as written
    swept("--vary", "noise", "uniform", "gumbel")
    assert "at --noise uniform;" in capsys.readouterr().out.splitlines()[-1]
    with pytest.raises(ValueError, match="--vary noise: expected an option's name, then values"):
        swept("--vary", "noise")


def test_a_failed_step_ends_the_sweep(sets):
    with pytest.raises(ValueError, match="the sampling failed with status 3, see above"):
        sweep.call([sys.executable, "-c", "raise SystemExit(3)"], "sampling")
