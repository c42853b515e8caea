"""Wrong options and files of each command: one line before any work."""

import sys

import pytest

from autoregressive.sample import sample_c2i_ddp
from autoregressive.train import extract_codes_c2i, train_c2i
from tests.helpers import EXTRACT, SAMPLE, TRAIN, TRAIN_OPTIONS
from utils.options import run_main

MISTAKES = [
    (TRAIN, ["--spe-token-num", "5"], "--spe-token-num 5 contradicts --ar-token-num 4"),
    (
        TRAIN,
        ["--ar-token-num", "5", "--spe-token-num", "4"],
        "--ar-token-num 5: n = 5 does not cut a 8x8 grid",
    ),
    (TRAIN, ["--image-size", "384"], "--image-size 384 contradicts --code-path"),
    (TRAIN, ["--vocab-size", "100"], "--vocab-size 100 contradicts"),
    (TRAIN, ["--code-path", "nowhere"], "--code-path: nowhere does not exist in"),
    (
        TRAIN,
        ["--global-batch-size", "9", "--gradient-accumulation-steps", "2"],
        "--global-batch-size 9 does not split",
    ),
    (TRAIN, ["--gpt-ckpt", "nowhere.pt"], "--gpt-ckpt: nowhere.pt does not exist"),
    (TRAIN, ["--gpt-ckpt", "{work}/vq.pt"], "holds no GPT"),
    (EXTRACT, ["--image-size", "30"], "--image-size 30 is not a multiple of 4"),
    (EXTRACT, ["--vq-model", "VQ-16"], "--vq-model VQ-16 contradicts --vq-ckpt"),
    (EXTRACT, ["--data-path", "nowhere"], "--data-path: nowhere does not exist"),
    (EXTRACT, ["--crop-range", "0.9"], "--crop-range 0.9 must be at least 1"),
    (EXTRACT, ["--code-path", "{work}/codes"], "already holds codes made with another"),
    (SAMPLE, ["--gpt-model", "GPT-B"], "--gpt-model GPT-B contradicts"),
    (SAMPLE, ["--ar-token-num", "16", "--spe-token-num", "15"], "--ar-token-num 16 contradicts"),
    (SAMPLE, ["--image-size", "64"], "contradicts --gpt-ckpt"),
    (SAMPLE, ["--gpt-ckpt", "{work}/vq.pt"], "holds no GPT"),
    (SAMPLE, ["--vq-ckpt", "{trained}"], "holds no tokenizer"),
    (SAMPLE, ["--vq-ckpt", "nowhere.pt"], "--vq-ckpt: nowhere.pt does not exist in"),
    (SAMPLE, ["--top-p", "0"], "--top-p 0.0 must be in (0, 1]"),
    (SAMPLE, ["--temperature", "nan"], "must be finite"),
    (SAMPLE, ["--sample-dir", "{work}/vq.pt"], "--sample-dir: cannot write in"),
    (
        TRAIN,
        ["--cloud-save-path", "{work}/vq.pt"],
        "--cloud-save-path or --results-dir: cannot write in",
    ),
    (EXTRACT, ["--code-path", "{work}/vq.pt"], "--code-path: cannot write in"),
]


@pytest.mark.parametrize(
    "script, options, message", MISTAKES, ids=[" ".join([s[1], *o]) for s, o, _ in MISTAKES]
)
def test_a_mistake_is_one_line_and_writes_nothing(
    work, trained, tmp_path, monkeypatch, capsys, script, options, message
):
    """In this process, as starting each takes minutes; other tests show that .sh files get here."""
    module, base = {
        TRAIN: (
            train_c2i,
            [
                "--cloud-save-path",
                tmp_path / "out",
                "--code-path",
                work / "codes",
                "--no-local-save",
            ],
        ),
        EXTRACT: (
            extract_codes_c2i,
            [
                "--vq-ckpt",
                work / "vq.pt",
                "--data-path",
                work / "images",
                "--code-path",
                tmp_path / "out",
            ],
        ),
        SAMPLE: (
            sample_c2i_ddp,
            ["--vq-ckpt", work / "vq.pt", "--gpt-ckpt", trained, "--sample-dir", tmp_path / "out"],
        ),
    }[script]
    base = [*base, "--gpt-model", "GPT-T", *TRAIN_OPTIONS[2:6]] if script == TRAIN else base
    options = [o.format(work=work, trained=trained) for o in options]
    monkeypatch.setattr(sys, "argv", [str(word) for word in (script[1], *base, *options)])
    with pytest.raises(SystemExit) as stop:
        run_main(module.main)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "out").exists()
