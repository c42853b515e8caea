"""The numbers: against the TensorFlow evaluator's, closed forms, and slow versions written
another way.
"""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from evaluations.c2i import metrics


def features(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Non-negative float32 features like those behind a ReLU."""
    return np.abs(np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32))


def covariance(width: int, seed: int) -> np.ndarray:
    """A covariance of full rank."""
    root = np.random.default_rng(seed).standard_normal((width, 2 * width))
    return root @ root.T / width


# mean, covariance and Frechet distance


def test_statistics_are_those_of_the_published_evaluator(golden):
    z = golden("evaluator_fid_adm.npz")
    for name in "XY":
        mu, sigma = metrics.mean_and_covariance(z[name])
        assert mu.dtype == np.float32
        assert sigma.dtype == np.float64
        np.testing.assert_allclose(mu, z[f"mu_{name}"], rtol=1e-6)
        np.testing.assert_allclose(sigma, z[f"sigma_{name}"], rtol=1e-10, atol=1e-13)


def test_frechet_distance_is_that_of_the_published_evaluator(golden):
    z = golden("evaluator_fid_adm.npz")
    x, y = (z["mu_X"], z["sigma_X"]), (z["mu_Y"], z["sigma_Y"])
    assert metrics.frechet_distance(*x, *y) == pytest.approx(float(z["FID_XY"]), rel=1e-8)
    assert metrics.frechet_distance(*y, *x) == pytest.approx(float(z["FID_YX"]), rel=1e-8)
    assert metrics.frechet_distance(*x, *x) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_few_samples_is_exact(golden):
    """For singular covariances the published root is off in the 8th digit; ours is not."""
    z = golden("evaluator_fid_adm.npz")
    x, y = z["X"][:40], z["Y"][:30]
    found = metrics.frechet_distance(
        *metrics.mean_and_covariance(x), *metrics.mean_and_covariance(y)
    )
    assert found == pytest.approx(float(z["FID_rank_deficient_X40_Y30"]), rel=1e-7)

    mu_x, mu_y = x.mean(0), y.mean(0)
    cx = (x - x.mean(0, dtype=np.float64)) / np.sqrt(39)
    cy = (y - y.mean(0, dtype=np.float64)) / np.sqrt(29)
    # without any covariance: singular values of the data itself
    cross = scipy.linalg.svdvals(cx @ cy.T).sum()
    expected = (
        np.square(mu_x - mu_y, dtype=np.float64).sum() + (cx**2).sum() + (cy**2).sum() - 2 * cross
    )
    assert found == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_agrees_with_the_matrix_square_root():
    s1, s2 = covariance(24, 1), covariance(24, 2)
    mu1, mu2 = np.random.default_rng(3).standard_normal((2, 24))
    root = scipy.linalg.sqrtm(s1 @ s2).real
    expected = np.square(mu1 - mu2).sum() + np.trace(s1 + s2 - 2 * root)
    assert metrics.frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_gaussians_with_known_answer():
    """Commuting covariances: |mu1 - mu2|^2 + sum (sqrt(a) - sqrt(b))^2 over their eigenvalues."""
    a, b = np.array([4.0, 9.0, 0.0, 1.0]), np.array([1.0, 0.0, 0.0, 16.0])
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0]
    mu = np.array([1.0, 2.0, 0.0, -2.0])
    found = metrics.frechet_distance(mu, turn * a @ turn.T, np.zeros(4), turn * b @ turn.T)
    assert found == pytest.approx(9 + 1 + 9 + 0 + 9, rel=1e-12)


def test_small_variances_count():
    s = np.diag([1.0, 1e-8])
    assert metrics.frechet_distance(np.zeros(2), s, np.zeros(2), s) == pytest.approx(0, abs=1e-14)


def test_frechet_distance_of_a_point_to_a_gaussian():
    assert metrics.frechet_distance(
        np.ones(2), np.zeros((2, 2)), np.zeros(2), np.eye(2)
    ) == pytest.approx(4)


def test_statistics_of_different_sizes_are_an_error():
    with pytest.raises(ValueError, match="different sizes"):
        metrics.frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match="at least 2 rows"):
        metrics.mean_and_covariance(features(1, 3))
    with pytest.raises(ValueError, match="not finite"):
        metrics.mean_and_covariance(np.full((3, 3), np.nan, np.float32))


# Inception Score and class accuracy


def test_inception_score_is_that_of_the_published_evaluator(golden):
    z = golden("evaluator_inception_score_tf.npz")
    weights = (np.random.RandomState(7).standard_normal((2048, 1008)) * 0.25).astype(np.float32)
    logits = torch.from_numpy(z["features_f16"]).float() @ torch.from_numpy(weights)
    probabilities = logits.softmax(dim=1).numpy()
    np.testing.assert_allclose(probabilities[:8], z["probs_first8"], rtol=1e-4)
    assert metrics.inception_score(probabilities) == pytest.approx(
        float(z["IS_split5000"]), rel=1e-6
    )
    assert metrics.inception_score(probabilities, 100) == pytest.approx(
        float(z["IS_split100"]), rel=1e-6
    )


def test_inception_score_of_sure_and_even_classes_is_their_number():
    assert metrics.inception_score(np.eye(7, dtype=np.float32)[np.arange(70) % 7]) == pytest.approx(
        7
    )


def test_inception_score_of_unsure_predictions_is_one():
    assert metrics.inception_score(np.full((10, 4), 0.25, np.float32)) == pytest.approx(1)


def test_a_short_last_split_counts_like_the_others():
    """Splits are runs in file order: here scores of 3, 3 and, from 2 rows, 2."""
    one_hot = np.eye(3, dtype=np.float32)[[0, 1, 2, 2, 1, 0, 0, 1]]
    assert metrics.inception_score(one_hot, split_size=3) == pytest.approx((3 + 3 + 2) / 3)


def test_class_accuracy_counts_likeliest_classes():
    probabilities = np.array([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1], [0.2, 0.8]], np.float32)
    assert metrics.class_accuracy(probabilities, np.array([0, 1, 1, 1])) == 0.75
    with pytest.raises(ValueError, match="0..1"):
        metrics.class_accuracy(probabilities, np.array([0, 1, 1, 2]))
    with pytest.raises(ValueError, match="4 integers"):
        metrics.class_accuracy(probabilities, np.array([0, 1, 1]))


# Precision and Recall


def scaled_golden(golden, case: str) -> tuple[np.ndarray, np.ndarray, dict]:
    z = golden("evaluator_precision_recall_tf.npz")
    values = {k.removeprefix(f"{case}_"): z[k] for k in z.files if k.startswith(case)}
    u, v = (z[k].astype(np.float32) * np.float32(values["scale"]) for k in ("U_f16", "V_f16"))
    return u, v, values


def test_half_precision_distances_are_those_of_the_published_evaluator(golden):
    """Radii and figures are equal; a distance on a rounding edge may depend on the sum's order."""
    u, v, expected = scaled_golden(golden, "half")
    for x, radii in ((u, expected["radii_U"]), (v, expected["radii_V"])):
        assert np.array_equal(
            metrics.neighbour_radii(torch.from_numpy(x), 3, exact=False), radii[:, 0]
        )
    ((_, _, distance),) = metrics.distance_slabs(
        torch.from_numpy(u), torch.from_numpy(v), exact=False
    )
    assert (distance[:64].numpy() != expected["D_UV"]).mean() < 1e-3
    result = metrics.precision_recall(u, v)
    assert [result.precision, result.recall] == expected["PR"].tolist()
    assert (result.float32_blocks, result.blocks) == (0, 3)


def test_a_block_that_overflows_half_precision_is_float32(golden):
    u, v, expected = scaled_golden(golden, "overflow_fp32")
    for x, radii in ((u, expected["radii_U"]), (v, expected["radii_V"])):
        found = metrics.neighbour_radii(torch.from_numpy(x), 3, exact=False)
        np.testing.assert_allclose(found, radii[:, 0], rtol=1e-5)
    ((_, _, distance),) = metrics.distance_slabs(
        torch.from_numpy(u), torch.from_numpy(v), exact=False
    )
    np.testing.assert_allclose(distance[:64], expected["D_UV"], rtol=1e-5)
    result = metrics.precision_recall(u, v)
    assert [result.precision, result.recall] == expected["PR"].tolist()
    assert (result.float32_blocks, result.blocks) == (3, 3)


def test_exact_distances_are_another_choice(golden):
    u, _, expected = scaled_golden(golden, "half")
    exact = metrics.neighbour_radii(torch.from_numpy(u), 3, exact=True).numpy()
    assert (exact != expected["radii_U"][:, 0]).mean() > 0.9
    np.testing.assert_allclose(exact, expected["radii_U"][:, 0], rtol=1e-2)


def slow_precision_recall(
    reference: np.ndarray, samples: np.ndarray, k: int
) -> tuple[float, float]:
    """The definition, one pair at a time, in float64."""

    def radius(x: np.ndarray, i: int) -> float:
        others = [((x[i] - x[j]) ** 2).sum() for j in range(len(x)) if j != i]
        return sorted(others)[k - 1]

    def covered(inner: np.ndarray, outer: np.ndarray) -> float:
        radii = [radius(outer, j) for j in range(len(outer))]
        return np.mean(
            [
                any(((x - y) ** 2).sum() <= r for y, r in zip(outer, radii, strict=True))
                for x in inner
            ]
        )

    reference, samples = reference.astype(np.float64), samples.astype(np.float64)
    return covered(samples, reference), covered(reference, samples)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_follow_their_definition(k):
    reference, samples = features(40, 3, seed=1), features(30, 3, seed=2) * 1.5
    result = metrics.precision_recall(reference, samples, k, exact=True)
    assert (result.precision, result.recall) == slow_precision_recall(reference, samples, k)
    assert 0 < result.precision < 1
    assert result.precision != result.recall


@pytest.mark.parametrize("exact", [False, True])
def test_a_set_covers_itself_and_nothing_far_away(exact):
    x = features(20, 64)
    assert metrics.precision_recall(x, x, exact=exact)[:2] == (1, 1)
    assert metrics.precision_recall(x, x + 50, exact=exact)[:2] == (0, 0)


def test_the_edge_of_a_neighbourhood_belongs_to_it():
    """Squared radii of 0, 10, 20, 30 are 100: 20 is just reached from 10, and 10 from 20."""
    reference, samples = np.array([[0], [10]], np.float32), np.array([[20], [30]], np.float32)
    assert metrics.precision_recall(reference, samples, k=1)[:2] == (0.5, 0.5)


@pytest.mark.parametrize("exact", [False, True])
def test_blocks_change_nothing(monkeypatch, exact):
    reference, samples = features(50, 16, seed=1), features(41, 16, seed=2)
    whole = metrics.precision_recall(reference, samples, exact=exact)
    monkeypatch.setattr(metrics, "DISTANCE_BLOCK", 7)
    monkeypatch.setattr(metrics, "DISTANCE_ROWS", 3)
    parts = metrics.precision_recall(reference, samples, exact=exact)
    assert parts[:2] == whole[:2]
    assert parts.blocks == 8 * 8 + 6 * 6 + 8 * 6


def test_only_the_block_with_the_overflow_is_float32(monkeypatch):
    x = torch.from_numpy(features(20, 32))
    x[3] *= 1000
    monkeypatch.setattr(metrics, "DISTANCE_BLOCK", 10)
    half = {(r.start, c.start): d for r, c, d in metrics.distance_slabs(x, x, exact=False)}
    exact = {(r.start, c.start): d for r, c, d in metrics.distance_slabs(x, x, exact=True)}
    assert all(torch.equal(half[k], exact[k]) for k in [(0, 0), (0, 10), (10, 0)])
    assert not torch.equal(half[10, 10], exact[10, 10])


@pytest.mark.parametrize("width", [1, 5, 31, 64, 100, 1600, 1601, 3000])
def test_half_precision_norms_of_any_width(width):
    x = torch.from_numpy(features(8, width)).half() / 2
    found = metrics._half_squared_norms(x)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), x.double().square().sum(1), rtol=5e-3, atol=1e-3)


def test_sets_too_small_for_neighbours_are_an_error():
    with pytest.raises(ValueError, match="sample features.*at least 4 rows"):
        metrics.precision_recall(features(9, 2), features(3, 2))
