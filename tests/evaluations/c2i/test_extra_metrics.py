"""Figures beside the published five: closed forms and slow versions."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torchmetrics.image import kid

from evaluations.c2i import extra_metrics
from evaluations.c2i.metrics import frechet_distance, frechet_distance_of_few, mean_and_covariance
from utils.distributed import World

ALONE = World(0, 1, torch.device("cpu"))


def features(count: int, width: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((count, width)) + shift).astype(np.float32)


def slow_kid(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD by loops over pairs."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a.astype(np.float64) @ b) / len(a) + 1) ** 3

    m, n = len(x), len(y)
    within = sum(kernel(x[i], x[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    within += sum(kernel(y[i], y[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    return within - 2 * sum(kernel(a, b) for a in x for b in y) / (m * n)


def test_kid_of_whole_sets_is_the_unbiased_mmd():
    """With as many rows as a subset has, each of the subsets is the whole set in another order."""
    x, y = features(30, 8, 0), features(30, 8, 1, shift=0.5)
    mean, deviation = extra_metrics.kernel_distance(x, y)
    assert mean == pytest.approx(slow_kid(x, y), rel=1e-4)
    assert deviation < 1e-4 * mean


def test_kid_draws_a_hundred_subsets_of_a_thousand(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        kid, "poly_mmd", lambda x, y: drawn.append((len(x), len(y))) or torch.zeros(())
    )
    extra_metrics.kernel_distance(features(1500, 4, 0), features(1200, 4, 1))
    assert drawn == [(1000, 1000)] * 100


def test_kid_takes_subsets_of_a_thousand(monkeypatch):
    monkeypatch.setattr(extra_metrics, "KID_SUBSETS", 10)
    x, y = features(1500, 4, 0), features(1200, 4, 1)
    mean, deviation = extra_metrics.kernel_distance(x, y)
    assert deviation > 0
    # unbiased: 0 for the same distribution
    assert abs(mean) < 0.02 < extra_metrics.kernel_distance(x, y + 0.5)[0]


def test_frechet_of_few_is_that_of_the_statistics():
    x, y = features(12, 40, 0), features(9, 40, 1, shift=0.3)
    expected = frechet_distance(*mean_and_covariance(x), *mean_and_covariance(y))
    assert frechet_distance_of_few(x, y) == pytest.approx(expected, rel=1e-6)


def test_classes_are_compared_with_themselves():
    x, y = features(30, 6, 0), features(20, 6, 1)
    labels_x, labels_y = np.arange(30) % 3, np.arange(20) % 5
    found = extra_metrics.class_frechet(x, labels_x, y, labels_y)
    assert list(found) == [0, 1, 2]
    one = frechet_distance(
        *mean_and_covariance(x[labels_x == 1]), *mean_and_covariance(y[labels_y == 1])
    )
    assert found[1] == pytest.approx(one, rel=1e-6)
    assert extra_metrics.class_frechet(x, labels_x, y, labels_y + 10) == {}


def test_bootstrap_interval_is_as_wide_as_independent_sets_spread():
    """Around the distance of its set, also where many features bias FID for few images."""
    reference = np.zeros(20), np.eye(20)
    sets = [features(400, 20, seed, shift=0.1) for seed in range(60)]
    distances = [frechet_distance(*mean_and_covariance(x), *reference) for x in sets]
    low, high = extra_metrics.frechet_interval(reference, sets[0], distances[0], 200, ALONE)
    assert low < distances[0] < high
    assert high - low == pytest.approx(3.92 * np.std(distances), rel=0.3)


def test_psnr_and_ssim_of_pairs():
    """Equal images: 100 dB and 1; a constant offset of d grey levels: 20 log10(255 / d)."""
    x = torch.randint(20, 200, (4, 16, 16, 3), dtype=torch.uint8)
    assert extra_metrics.paired_quality([(x, x)]) == pytest.approx((100, 1))
    psnr, ssim = extra_metrics.paired_quality([(x[:3], x[:3] + 10), (x[3:], x[3:] + 5)])
    assert psnr == pytest.approx((3 * 20 * np.log10(25.5) + 20 * np.log10(51)) / 4, rel=1e-6)
    assert 0.9 < ssim < 1


def test_dino_features_are_class_tokens_of_a_file(tmp_path):
    """With a small network of the same kind; greyness unlike ImageNet's mean must show."""
    torch.manual_seed(0)
    name = "test_vit"
    if name not in timm.list_models():
        pytest.skip("this timm has no small network of the kind")
    network = timm.create_model(name, num_classes=0, dynamic_img_size=True).eval()
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    model = extra_metrics.load_dinov2(tmp_path / "vit.pth", name)
    images = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(v) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.inference_mode():
        expected = network.forward_features(((images / 255 - mean) / std).permute(0, 3, 1, 2))[:, 0]
        assert torch.allclose(model(images).pool, expected, atol=1e-5)
        assert model(images[:, ::4, ::4]).pool.shape == expected.shape
    torch.save({"blocks": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth does not fit timm's test_vit"):
        extra_metrics.load_dinov2(tmp_path / "other.pth", name)
