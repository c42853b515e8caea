"""Released models by name."""

import json
import sys
from argparse import ArgumentParser

import numpy as np
import pytest

from autoregressive.models.config import GPT_models, GPTConfig
from autoregressive.models.gpt import GPT
from autoregressive.sample import sample_c2i, sample_c2i_ddp
from autoregressive.sample.options import add_model_options, add_sampling_options, parse_sampler
from tests.helpers import quietly
from tokenizer.vq_model import VQ_models, VQModel, make_vq_config
from utils import presets
from utils.checkpoints.weights_file import save_checkpoint
from utils.presets import PRESETS, preset_of


def parse(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, options)])
    parser = ArgumentParser(allow_abbrev=False)
    add_model_options(parser)
    add_sampling_options(parser, cfg_scale=4.0, top_k=2000, compiled=False)
    return parse_sampler(parser)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_in_the_published_options(monkeypatch, capsys, name):
    args, preset = parse(monkeypatch, "--model", name), PRESETS[name]
    assert (args.gpt_model, args.ar_token_num) == (preset.gpt_model, preset.n)
    assert (args.cfg_scale, args.top_k, args.image_size) == (preset.cfg_scale, 0, preset.image_size)
    assert args.gpt_ckpt.endswith(f"pretrained_models/{preset.file}")
    assert args.vq_ckpt.endswith("pretrained_models/vq_ds16_c2i.pt")
    assert preset.gpt_model in GPT_models and not hasattr(args, "image_size_eval")
    assert preset_of(vars(args)) == name and capsys.readouterr().err == ""


def test_what_is_written_by_hand_wins_and_is_said(monkeypatch, capsys):
    args = parse(monkeypatch, "--model", "PAR-3B-4x", "--cfg-scale", 4, "--top-k", 2000)
    assert (args.cfg_scale, args.top_k, args.temperature) == (4.0, 2000, 1.0)
    said = capsys.readouterr().err
    assert said == "--model PAR-3B-4x, but not as published: cfg_scale 4.0, top_k 2000\n"


def test_a_model_that_is_not_there_is_named_with_all_that_are(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parse(monkeypatch, "--model", "PAR-7B")
    assert "PAR-3B-16x" in capsys.readouterr().err


def test_a_preset_is_known_by_its_option_or_its_file():
    assert preset_of({"model": None, "gpt_ckpt": "/x/PAR-3B-16x.pt"}) == "PAR-3B-16x"
    assert preset_of({"gpt_ckpt": "mine.pt"}) is None and preset_of({}) is None


def test_published_options_name_options_of_both_samplers(monkeypatch):
    """A preset's option that a sampler lacks would silently do nothing."""
    monkeypatch.setattr(sys, "argv", ["x.py", "--model", "PAR-XL-4x"])
    for module, missing in ((sample_c2i, {"image_size_eval"}), (sample_c2i_ddp, set())):
        known = vars(module.parse_args("")).keys()
        assert PRESETS["PAR-XL-4x"].options().keys() - known == missing


@pytest.mark.slow
def test_each_preset_samples_by_its_name_alone(tmp_path, capfd, monkeypatch):
    """Files in the released form under the released names, with small layers and random weights."""
    monkeypatch.setattr(presets, "PRETRAINED_MODELS", tmp_path)
    monkeypatch.setitem(VQ_models["VQ-16"], "ch", 32)
    for layers, name in enumerate(("GPT-B", "GPT-L", "GPT-XL", "GPT-XXL", "GPT-3B"), 1):
        monkeypatch.setitem(GPT_models, name, dict(n_layer=layers, dim=64, n_head=2))
    vq = VQModel(make_vq_config("VQ-16"))
    vq.init_weights()
    save_checkpoint({"model": vq.state_dict()}, tmp_path / "vq_ds16_c2i.pt")
    for name, preset in PRESETS.items():
        grid = preset.image_size // 16
        size = GPT_models[preset.gpt_model]
        gpt = GPT(GPTConfig(**size, ar_token_num=preset.n, grid_height=grid, grid_width=grid))
        gpt.init_weights()
        save_checkpoint({"model": gpt.state_dict()}, tmp_path / preset.file)

        options = ("--model", name, "--num-fid-samples", 1, "--sample-dir", tmp_path / name)
        said = quietly(capfd, monkeypatch, *options, "--no-compile", main=sample_c2i_ddp.main)
        (record,) = (tmp_path / name).glob("*.json")
        options = json.loads(record.read_text())["options"]
        assert preset_of(options) == name, said
        assert (options["ar_token_num"], options["cfg_scale"]) == (preset.n, preset.cfg_scale)
        with np.load(record.with_suffix(".npz")) as samples:
            assert samples["arr_0"].shape == (1, 256, 256, 3)
