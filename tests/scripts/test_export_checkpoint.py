"""Exports of a training checkpoint."""

import os
import signal

import pytest

from autoregressive.models.load import load_gpt
from scripts import export_checkpoint as export_script
from tests.helpers import gpt_checkpoint, hold_in_fork, quietly, same_tensors, weights


def test_exported_safetensors_loads_with_its_config(trained, tmp_path, capfd, monkeypatch):
    folder, output = trained.parent / "0000015", tmp_path / "a.safetensors"
    options = ("--checkpoint", folder, "--output", output, "--ema")
    quietly(capfd, monkeypatch, *options, main=export_script.main)
    model, name, facts = load_gpt(output, (8, 8))
    assert (name, model.config.ar_token_num, facts["steps"]) == ("GPT-T", 4, 15)
    assert same_tensors(model.state_dict(), weights(trained.parents[2], 15, "ema"))


@pytest.mark.parametrize("option", ["--output", "--hub"])
def test_a_second_export_is_told_who_holds_the_file(tmp_path, capfd, monkeypatch, option):
    gpt_checkpoint(tmp_path / "0000007")
    command = ("--checkpoint", tmp_path / "0000007", option, tmp_path / "new" / "a.pt")
    (tmp_path / "new").mkdir()
    pid = hold_in_fork(tmp_path / "new" / "a.pt.lock")
    said = quietly(capfd, monkeypatch, *command, main=export_script.main)
    assert said.startswith(f"error: {tmp_path}/new/a.pt is in use by another run: process {pid} on")
    assert not (tmp_path / "new" / "a.pt").exists()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert quietly(capfd, monkeypatch, *command, main=export_script.main).startswith("wrote")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.pt"]


def test_the_export_command_writes_the_hub_form(tmp_path, capfd, monkeypatch):
    gpt_checkpoint(tmp_path / "0000007")
    command = ("--checkpoint", tmp_path / "0000007", "--hub", tmp_path / "hub")
    said = quietly(capfd, monkeypatch, *command, main=export_script.main)
    assert said == f"wrote {tmp_path / 'hub'}\n" and (tmp_path / "hub/config.json").is_file()
    (tmp_path / "hub" / "README.md").write_text("filled in by its owner")
    quietly(capfd, monkeypatch, *command, main=export_script.main)
    assert (tmp_path / "hub" / "README.md").read_text() == "filled in by its owner"
    said = quietly(capfd, monkeypatch, *command, "--ema", main=export_script.main)
    assert said.startswith("error: --ema:") and "holds no moving average" in said
