"""Requests of the demo page, with the small models of the repository."""

import base64
import io
import shlex

import numpy as np
import pytest
from PIL import Image

from autoregressive.sample import edit_c2i, sample_c2i
from autoregressive.sample.page.jobs import Job
from autoregressive.sample.page.studio import Studio, load_model
from tests.helpers import quietly
from utils.distributed import init_distributed
from utils.images import encode_png


@pytest.fixture(scope="module")
def studio() -> Studio:
    world = init_distributed()
    first = load_model("digits-4x", ["--model", "digits-4x"], world)
    return Studio([first, load_model("digits-1x", ["--model", "digits-1x"], world, first.way)])


def run(work) -> tuple[Job, list[dict]]:
    job = Job(work)
    job.run()
    assert job.events[-1] == {"event": "finished"}, job.events[-1]
    return job, job.events


def url(pixels: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_png(pixels)).decode()


def run_command_of(event: dict, main, folder, capfd, monkeypatch) -> None:
    """Run the command line that an answer names, with its files in ``folder``."""
    words = shlex.split(event["command"])[2:]
    words = [str(folder / w) if w.endswith(".png") else w for w in words]
    quietly(capfd, monkeypatch, *words, main=main)


@pytest.mark.parametrize("jacobi", [False, True])
def test_images_fill_in_and_are_those_of_the_command(studio, jacobi, tmp_path, capfd, monkeypatch):
    body = {"models": ["digits-4x", "digits-1x"], "class": 7, "images": 2, "seed": 5}
    job, events = run(studio.generate(body | {"jacobi": jacobi}))
    for place, (name, steps) in enumerate((("digits-4x", 19), ("digits-1x", 64))):
        mine = [e for e in events if e.get("place") == place]
        start, *told, done = mine
        assert (start["name"], start["steps"], start["count"]) == (name, steps, 2)
        decoded = [e["decoded"] for e in told]
        assert decoded == sorted(set(decoded)) and decoded[-1] == 64
        assert (done["calls"] < steps) == jacobi
        assert len(told) <= done["calls"] if jacobi else len(told) == min(48, steps)
        strip = Image.open(io.BytesIO(base64.b64decode(told[0]["strip"].partition(",")[2])))
        assert strip.size == (2 * 32, 32)
        assert np.array(done["entropy"]).shape == np.array(done["probability"]).shape == (2, 64)
        assert np.min(done["entropy"]) >= 0 and np.max(done["entropy"]) <= 7.001
        assert np.min(done["probability"]) > 0 and np.max(done["probability"]) <= 1
        run_command_of(done, sample_c2i.main, tmp_path, capfd, monkeypatch)
        for file in done["files"]:
            assert (tmp_path / file).read_bytes() == job.files[file][1], file


def test_an_edit_is_that_of_the_command(studio, tmp_path, capfd, monkeypatch):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[8:56, 24:40] = 255
    mask = np.zeros((64, 64, 3), np.uint8)
    mask[:, 32:] = 255
    body = {"model": "digits-4x", "class": 1, "image": url(pixels), "mask": url(mask)}
    job, events = run(studio.edit(body | {"candidates": 3}))
    done = events[-2]
    assert done["event"] == "done" and len(done["images"]) == 4 and len(done["likelihoods"]) == 3
    for name in ("image.png", "mask.png"):
        (tmp_path / name).write_bytes(job.files[name][1])
    run_command_of(done, edit_c2i.main, tmp_path, capfd, monkeypatch)
    for name in ("edit.png", "edit.gif"):
        assert (tmp_path / name).read_bytes() == job.files[name][1], name


PICTURE = url(np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize(
    "body, message",
    [
        ({"models": []}, "models: expected one name or two"),
        ({"models": ["digits-4x"] * 3}, "models: expected one name or two"),
        ({"models": ["../x"]}, "model: expected one of digits-4x, digits-1x"),
        ({"models": [["x"]]}, "model: expected one of digits-4x, digits-1x"),
        ({"images": 17}, "images: expected a number from 1 to 16"),
        ({"images": 1.5}, "images: expected a whole number"),
        ({"class": 10}, "class: expected a number from 0 to 9"),
        ({"seed": True}, "seed: expected a number"),
        ({"cfg_scale": float("nan")}, "cfg_scale: expected a number from 1 to 20"),
        ({"top_p": "0.5"}, "top_p: expected a number"),
    ],
)
def test_requests_are_bounded(studio, body, message):
    with pytest.raises(ValueError, match=message):
        studio.generate({"models": ["digits-4x"], **body})


@pytest.mark.parametrize(
    "body, message",
    [
        ({"image": "data:image/png;base64,AAAA"}, "image: not a picture that can be read"),
        ({"image": "x"}, "image: not a picture that can be read"),
        ({"image": "data:image/png;base64,JSFQUy1BZG9iZS0zLjAgRVBTRi0zLjAK"}, "not a picture"),
        ({"mask": url(np.zeros((9, 8, 3), np.uint8))}, r"mask: its size \(8, 9\) is not"),
        ({"candidates": 9}, "candidates: expected a number from 1 to 8"),
        ({"image": url(np.zeros((4, 1025, 3), np.uint8))}, "at most 1024 pixels a side"),
    ],
)
def test_edits_are_bounded(studio, body, message):
    with pytest.raises(ValueError, match=message):
        studio.edit({"model": "digits-4x", "image": PICTURE, "mask": PICTURE, **body})


def test_what_cannot_be_drawn_again_is_said_by_the_job(studio):
    damaged = PICTURE[:-40] + PICTURE[-40:].replace("A", "B")
    for image, message in ((PICTURE, "mask: nothing is painted"), (damaged, "not a picture")):
        job = Job(studio.edit({"model": "digits-4x", "image": image, "mask": PICTURE}))
        job.run()
        assert job.events[-1]["event"] == "error" and message in job.events[-1]["message"]
