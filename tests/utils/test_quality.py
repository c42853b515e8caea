"""PSNR and SSIM against closed forms and a slow version."""

import math

import numpy as np
import pytest

from utils.quality import psnr, ssim


def test_psnr_and_ssim_closed_forms():
    black, grey = np.zeros((2, 16, 16, 3), np.uint8), np.full((2, 16, 16, 3), 51, np.uint8)
    assert psnr(black, grey) == pytest.approx([20 * math.log10(5)] * 2)
    assert psnr(grey, grey) == pytest.approx([100] * 2)  # as in the evaluator
    assert ssim(grey, grey) == pytest.approx([1, 1])
    c1 = (0.01 * 255) ** 2  # flat images: variances and covariance are 0, means 0 and 51
    assert ssim(black, grey) == pytest.approx([c1 / (51**2 + c1)] * 2, rel=1e-3)


def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, equation 13, around every pixel of a colour (H, W), mirrored borders."""
    x = np.arange(11) - 5
    window = np.exp(-(x[:, None] ** 2 + x[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    a, b = np.pad(a, 5, "reflect"), np.pad(b, 5, "reflect")
    c1, c2, values = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            p, q = (m[i : i + 11, j : j + 11].astype(float) for m in (a, b))
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            cov = (window * (p - mp) * (q - mq)).sum()
            values.append(
                (2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2))
            )
    return float(np.mean(values))


def test_ssim_against_a_slow_version():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (1, 18, 18, 3), dtype=np.uint8)
    b = (a * 0.7 + 0.3 * rng.integers(0, 256, a.shape)).astype(np.uint8)
    expected = np.mean([slow_ssim(a[0, ..., c], b[0, ..., c]) for c in range(3)])
    assert ssim(a, b) == pytest.approx([expected], rel=1e-3)
