"""The small classifier as a feature network."""

from __future__ import annotations

import pytest
import torch

from evaluations.c2i.classifier import (
    ClassifierConfig,
    SmallClassifier,
    load_classifier,
    save_classifier,
)


def test_is_a_feature_network(tmp_path):
    network = SmallClassifier(ClassifierConfig(image_size=16, num_classes=5)).eval()
    images = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    pool, spatial, probabilities = network(images)
    assert pool.shape == (3, 64)
    assert spatial is None
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(3))
    assert torch.equal(network(images.float()).pool, pool)
    with pytest.raises(ValueError, match="trained on 16x16x3 images, these are 8x8x3"):
        network(images[:, :8, :8])

    save_classifier(tmp_path / "c.pt", network, list("abcde"))
    loaded, content = load_classifier(tmp_path / "c.pt", "--feature-network")
    assert torch.equal(loaded(images).pool, pool)
    assert content["config"] == {"image_size": 16, "num_classes": 5, "width": 64}


def test_a_changed_byte_in_its_file_is_found(tmp_path):
    """It gave other numbers without a word."""
    path = tmp_path / "c.pt"
    network = SmallClassifier(ClassifierConfig(image_size=16, num_classes=5))
    save_classifier(path, network, list("abcde"))
    content = bytearray(path.read_bytes())
    content[content.index(network.head.weight.detach().numpy().tobytes()) + 3] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(ValueError, match="--feature-network: .*c.pt is not .*bytes have changed"):
        load_classifier(path, "--feature-network")
