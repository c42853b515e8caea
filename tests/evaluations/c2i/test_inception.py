"""The 2015 Inception against TensorFlow's outputs, from weights that anyone can make again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from evaluations.c2i import inception
from tests.helpers import recipe_state


def assert_close(found: Tensor, expected: np.ndarray, relative: float) -> None:
    """Equal to ``relative`` of the largest expected value."""
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert np.abs(found.numpy() - expected).max() <= relative * np.abs(expected).max()


@pytest.mark.parametrize(
    "size", ["1x1", "8x8", "32x32", "64x64", "200x333", "256x256", "299x299", "512x512"]
)
def test_resize_is_bit_for_bit_that_of_tf1(golden, size):
    z = golden("evaluator_resize_tf1.npz")
    out = inception.resize_tf1(torch.from_numpy(z[f"in_{size}"]), 299).numpy()
    assert np.array_equal(out[:, ::5, ::5], z[f"out5_{size}"])
    assert np.array_equal(np.stack([out[:, -1], out[:, :, -1]]), z[f"lastrowcol_{size}"])
    np.testing.assert_allclose(
        out.sum(axis=(1, 2), dtype=np.float64), z[f"sum64_{size}"], rtol=1e-14
    )


def test_resize_takes_floats_as_they_are():
    images = torch.rand(1, 7, 9, 3) * 255
    assert torch.equal(inception.resize_tf1(images, 7)[:, :, 0], images[:, :, 0])


@pytest.mark.parametrize("case", ["A", "B"])
def test_features_are_those_of_tensorflow(golden, case):
    z = golden("evaluator_inception_random_tf.npz")
    network = inception.build_inception(recipe_state(use_gamma=case == "A"), "recipe")
    for name in ("im64", "im256", "im512"):
        with torch.inference_mode():
            pool, spatial, probabilities = network(torch.from_numpy(z[name]))
        assert_close(pool, z[f"{case}_{name}_pool"], 1e-5)
        assert_close(spatial, z[f"{case}_{name}_spatial"], 2e-5)
        if f"{case}_{name}_softmax" in z:
            np.testing.assert_allclose(
                probabilities.numpy(), z[f"{case}_{name}_softmax"], rtol=1e-4
            )


def test_every_convolution_of_the_graph_has_its_own_scope():
    modules = {
        k.removesuffix(".conv.weight")
        for k in inception.Inception2015().state_dict()
        if ".conv." in k
    }
    assert modules == set(inception.TENSORFLOW_SCOPES)
    assert len(set(inception.TENSORFLOW_SCOPES.values())) == len(modules) == 94


def test_a_weights_file_in_the_old_format_without_counters_loads(tmp_path):
    """The published file of 2019 is in torch's format before zip, without num_batches_tracked."""
    state = recipe_state()
    assert not any(k.endswith("num_batches_tracked") for k in state)
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    network = inception.load_inception(tmp_path / "old.pth")
    assert torch.equal(network.fc.weight, state["fc.weight"])


def test_a_file_of_another_network_is_refused(tmp_path):
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not fit the Inception network of 2015"):
        inception.load_inception(tmp_path / "other.pth")


def test_missing_weights_are_described(tmp_path):
    published = inception.PUBLISHED_WEIGHTS[1]
    with pytest.raises(ValueError, match="no Inception weights") as missing:
        inception.find_weights(None, tmp_path, allow_unknown=False)
    with pytest.raises(ValueError, match="does not exist") as elsewhere:
        inception.find_weights(tmp_path / "x.pth", tmp_path, allow_unknown=True)
    for message in (str(missing.value), str(elsewhere.value)):
        assert "\n" not in message
        for part in (published.name, "95,628,359", published.sha256, "pytorch-fid", str(tmp_path)):
            assert part in message


def test_weights_of_unknown_hash_are_refused_unless_allowed(tmp_path):
    unknown = tmp_path / inception.PUBLISHED_WEIGHTS[0].name
    unknown.write_bytes(b"something else")
    with pytest.raises(ValueError, match="not a published file.*--allow-unknown-weights"):
        inception.find_weights(None, tmp_path, allow_unknown=False)
    assert inception.find_weights(None, tmp_path, allow_unknown=True) == unknown
    assert inception.find_weights(unknown, tmp_path / "elsewhere", allow_unknown=True) == unknown


def test_weights_of_published_hash_are_found_in_the_folder(tmp_path, monkeypatch):
    # of the three letters below
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    monkeypatch.setattr(
        inception, "PUBLISHED_WEIGHTS", (inception.WeightsFile("w.pth", 3, sha256, "nowhere"),)
    )
    (tmp_path / "w.pth").write_bytes(b"abc")
    assert inception.find_weights(None, tmp_path, allow_unknown=False) == tmp_path / "w.pth"


def test_a_file_of_another_size_is_refused_without_reading_it(tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "sha256_file", lambda _: pytest.fail("hashed"))
    (tmp_path / "w.pth").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"w.pth \(3 bytes\) is not a published file by its size"):
        inception.find_weights(tmp_path / "w.pth", tmp_path, allow_unknown=False)


def test_weights_are_fetched_once_and_checked(tmp_path, monkeypatch):
    """From a file:// address; a file of another hash does not get the name."""
    source = tmp_path / "home.pth"
    source.write_bytes(b"abc")
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    published = inception.WeightsFile("w.pth", 3, sha256, source.as_uri())
    monkeypatch.setattr(inception, "DOWNLOADED", published)
    monkeypatch.setattr(inception, "PUBLISHED_WEIGHTS", (published,))
    inception.download_weights(tmp_path / "models")
    assert (
        inception.find_weights(None, tmp_path / "models", allow_unknown=False).read_bytes()
        == b"abc"
    )
    source.unlink()
    inception.download_weights(tmp_path / "models")  # nothing is fetched again
    source.write_bytes(b"abd")
    with pytest.raises(ValueError, match="--download: file.*cannot be fetched"):
        inception.download_weights(tmp_path / "others")
    assert not list((tmp_path / "others").glob("*"))
