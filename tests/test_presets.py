"""Released models by name, their download, and the hub's form, against a server that speaks its
protocol.
"""

import fcntl
import hashlib
import json
import re
import sys
import threading
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from autoregressive.models.gpt import GPT, GPT_models, GPTConfig
from autoregressive.models.load import load_gpt
from autoregressive.sample import sample_c2i, sample_c2i_ddp
from autoregressive.sample.options import add_model_options, add_sampling_options, parse_sampler
from evaluations.c2i.report import compare_with_preset
from scripts import export_checkpoint as export_script
from tests.helpers import quietly, same_tensors, small_config
from tokenizer.vq_model import VQ_models, VQModel, make_vq_config
from utils import presets
from utils.checkpoints.folder import save_sharded
from utils.checkpoints.weights_file import export_to_hub_form, load_checkpoint, save_checkpoint
from utils.hub import fetch_released, weights_path
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


def test_published_options_name_options_of_both_samplers():
    """A preset's option that a sampler lacks would silently do nothing."""
    for module in (sample_c2i, sample_c2i_ddp):
        text = (
            Path(module.__file__).read_text()
            + Path(module.__file__).with_name("options.py").read_text()
        )
        text += Path(presets.__file__).parents[1].joinpath("tokenizer/load.py").read_text()
        missing = {
            name
            for name in PRESETS["PAR-XL-4x"].options()
            if f'"--{name.replace("_", "-")}"' not in text
        }
        assert missing == ({"image_size_eval"} if module is sample_c2i else set())


def result_of(metrics, **options):
    made_with = PRESETS["PAR-3B-16x"].options() | {"class_protocol": "random", "precision": "bf16"}
    return {"metrics": metrics, "sample_images": 50_000, "made_with": made_with | options}


def test_expected_beside_measured():
    reference = Path("VIRTUAL_imagenet256_labeled.npz")
    good = compare_with_preset(result_of({"fid": 2.9, "inception_score": 261.0}), reference)
    assert len(good) == 3 and "FID: 2.88 published, 2.9 measured, within" in good[1]
    bad = compare_with_preset(result_of({"fid": 3.5}, cfg_scale=4.0, precision="none"), reference)
    assert "outside of the expected spread of 0.1" in bad[1]
    assert bad[2] == (
        "  not as published: cfg_scale 4.0 instead of 1.5; precision none instead of bf16"
    )
    few = result_of({"fid": 9.0}) | {"sample_images": 1000}
    assert "1,000 images instead of 50,000; the reference is own.npz" in "\n".join(
        compare_with_preset(few, Path("own.npz"))
    )
    puzzling = compare_with_preset(result_of({"fid": 9.0}), reference)
    assert "--self-check" in puzzling[-1]
    assert compare_with_preset({"metrics": {}, "made_with": None}, reference) == []


class Hub(BaseHTTPRequestHandler):
    """The part of huggingface.co's protocol that downloads use."""

    files: dict[str, bytes]
    cut: bool  # close the connection in the middle of the next body
    ranges: list[str | None]  # of each GET

    def do_HEAD(self):  # noqa: N802 - http.server's name
        self.answer(send=False)

    def do_GET(self):  # noqa: N802
        self.answer(send=True)

    def answer(self, send: bool) -> None:
        body = self.files.get(re.sub("/resolve/[^/]+/", "/", self.path).lstrip("/"))
        wanted = self.headers.get("Range")
        start = int(re.match(r"bytes=(\d+)-", wanted).group(1)) if wanted else 0
        if body is None:
            return self.head(404, 0, {"X-Error-Code": "EntryNotFound"})
        if start >= len(body):
            return self.head(416, 0, {"Content-Range": f"bytes */{len(body)}"})
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": "0" * 40}
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.head(206 if wanted else 200, len(body) - start, headers)
        if send:
            self.ranges.append(wanted)
            end = len(body) // 2 if self.cut else len(body)
            type(self).cut = False
            self.wfile.write(body[start:end])
        return None

    def head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server on this machine in place of huggingface.co; its class holds files and switches."""
    handler = type("LocalHub", (Hub,), {"files": {}, "cut": False, "ranges": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield handler
    server.shutdown()
    server.server_close()


def test_a_missing_released_file_is_said_or_fetched(hub, tmp_path):
    body = np.random.default_rng(0).bytes(5 << 20)
    hub.files["Epiphqny/PAR/PAR-3B-4x.pt"] = body
    path = tmp_path / "weights" / "PAR-3B-4x.pt"
    part = path.with_name("PAR-3B-4x.pt.part")
    with pytest.raises(ValueError, match="--download fetches it from http.*/Epiphqny/PAR/resolve/"):
        fetch_released(path, "--gpt-ckpt", allowed=False)
    assert hub.ranges == []  # nothing is fetched by itself

    hub.cut = True
    with pytest.raises(ValueError, match="lost after 2,621,440 of 5,242,880 bytes; the same"):
        fetch_released(path, "--gpt-ckpt", allowed=True)
    assert not path.exists() and part.stat().st_size == len(body) // 2
    fetch_released(path, "--gpt-ckpt", allowed=True)
    assert path.read_bytes() == body and not part.exists()
    assert hub.ranges == [None, f"bytes={len(body) // 2}-"]  # went on where it was cut
    fetch_released(path, "--gpt-ckpt", allowed=True)
    assert len(hub.ranges) == 2  # what is there is not fetched again

    path.rename(part)  # ended between the last byte and the new name
    fetch_released(path, "--gpt-ckpt", allowed=True)
    assert path.read_bytes() == body and len(hub.ranges) == 2
    fetch_released(tmp_path / "mine.pt", "--gpt-ckpt", allowed=True)
    assert not (tmp_path / "mine.pt").exists()  # has no home


def test_a_download_that_fails_is_one_line(hub, tmp_path, monkeypatch):
    path = tmp_path / "vq_ds16_c2i.pt"
    with pytest.raises(ValueError, match="--vq-ckpt: http.* cannot be downloaded: HTTP Error 404"):
        fetch_released(path, "--vq-ckpt", allowed=True)
    hub.files["FoundationVision/LlamaGen/vq_ds16_c2i.pt"] = bytes(100)
    with open(f"{path}.part", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="Resource temporarily unavailable"):
            fetch_released(path, "--vq-ckpt", allowed=True)
    monkeypatch.setattr("utils.hub.shutil.disk_usage", lambda path: Namespace(free=99))
    with pytest.raises(ValueError, match="has too little space for 100 bytes"):
        fetch_released(path, "--vq-ckpt", allowed=True)
    assert not path.exists()


def gpt_checkpoint(folder: Path) -> GPT:
    """Write a training checkpoint of a small GPT, as a run does."""
    model = GPT(small_config(ar_token_num=4))
    model.init_weights()
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    save_sharded(folder, tensors, None).result()
    facts = {"gpt_model": "GPT-S", "config": asdict(model.config), "steps": 7, "classes": ["a|b"]}
    files = {p.name: p.stat().st_size for p in folder.iterdir()}
    (folder / "meta.json").write_text(json.dumps(facts | {"files": files, "scalars": {}}))
    return model


def test_the_hub_form_goes_there_and_back(hub, tmp_path):
    model = gpt_checkpoint(tmp_path / "0000007")
    export_to_hub_form(tmp_path / "0000007", tmp_path / "small-gpt")
    written = {p.name for p in (tmp_path / "small-gpt").iterdir()}
    assert written == {"config.json", "model.safetensors", "README.md"}
    card = (tmp_path / "small-gpt/README.md").read_text()
    assert "| n_layer | 2 |" in card and "hf:OWNER/small-gpt" in card and "--gpt-ckpt" in card
    config = json.loads((tmp_path / "small-gpt/config.json").read_text())
    assert config["steps"] == 7 and "files" not in config and "scalars" not in config

    for file in ("config.json", "model.safetensors"):
        hub.files[f"someone/small-gpt/{file}"] = (tmp_path / "small-gpt" / file).read_bytes()
    for path in (tmp_path / "small-gpt", "hf:someone/small-gpt"):
        loaded, name, _ = load_gpt(path, grid=None)
        assert name == "GPT-S" and loaded.config == model.config
        assert same_tensors(loaded.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="--gpt-ckpt: hf:someone/else cannot be"):
        load_gpt("hf:someone/else", grid=None)
    with pytest.raises(ValueError, match="hf:../x is not of the form hf:OWNER/NAME"):
        weights_path("hf:../x", "--gpt-ckpt")


def test_weights_of_other_programs_are_read_by_their_config(tmp_path):
    """Another program's model.safetensors has no facts in its header: those of config.json hold."""
    folder = tmp_path / "other"
    folder.mkdir()
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"steps": 3}))
    loaded = load_checkpoint(folder, "--gpt-ckpt")
    assert loaded["steps"] == 3 and torch.equal(loaded["model"]["w"], torch.ones(2))
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="--gpt-ckpt: .*other.* is not a readable checkpoint"):
        load_checkpoint(folder, "--gpt-ckpt")


def test_the_export_command_writes_the_hub_form(tmp_path, capfd, monkeypatch):
    gpt_checkpoint(tmp_path / "0000007")
    command = ("--checkpoint", tmp_path / "0000007", "--hub", tmp_path / "hub")
    said = quietly(capfd, monkeypatch, *command, main=export_script.main)
    assert said == f"wrote {tmp_path / 'hub'}\n" and (tmp_path / "hub/config.json").is_file()
    said = quietly(capfd, monkeypatch, *command, "--ema", main=export_script.main)
    assert said.startswith("error: --ema:") and "holds no moving average" in said


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
