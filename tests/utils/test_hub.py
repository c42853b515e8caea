"""Downloads and the hub's form, against a server that speaks its protocol."""

import fcntl
import hashlib
import json
import re
import threading
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from huggingface_hub import constants

from autoregressive.models.load import load_gpt
from tests.helpers import gpt_checkpoint, same_tensors
from utils.checkpoints.weights_file import export_to_hub_form
from utils.hub import fetch_released, weights_path


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
