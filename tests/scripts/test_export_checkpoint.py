"""Exports of a training checkpoint."""

from autoregressive.models.load import load_gpt
from scripts import export_checkpoint as export_script
from tests.helpers import gpt_checkpoint, quietly, same_tensors, weights


def test_exported_safetensors_loads_with_its_config(trained, tmp_path, capfd, monkeypatch):
    folder, output = trained.parent / "0000015", tmp_path / "a.safetensors"
    options = ("--checkpoint", folder, "--output", output, "--ema")
    quietly(capfd, monkeypatch, *options, main=export_script.main)
    model, name, facts = load_gpt(output, (8, 8))
    assert (name, model.config.ar_token_num, facts["steps"]) == ("GPT-T", 4, 15)
    assert same_tensors(model.state_dict(), weights(trained.parents[2], 15, "ema"))


def test_the_export_command_writes_the_hub_form(tmp_path, capfd, monkeypatch):
    gpt_checkpoint(tmp_path / "0000007")
    command = ("--checkpoint", tmp_path / "0000007", "--hub", tmp_path / "hub")
    said = quietly(capfd, monkeypatch, *command, main=export_script.main)
    assert said == f"wrote {tmp_path / 'hub'}\n" and (tmp_path / "hub/config.json").is_file()
    said = quietly(capfd, monkeypatch, *command, "--ema", main=export_script.main)
    assert said.startswith("error: --ema:") and "holds no moving average" in said
