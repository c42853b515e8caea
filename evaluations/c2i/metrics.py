"""FID, sFID, Inception Score, Precision and Recall: features -> statistics -> number.

Pure functions without files, networks or options. They follow the TensorFlow evaluator of ADM
(Dhariwal & Nichol 2021, arXiv 2105.05233), which the field's published ImageNet figures come from,
down to the dtype of each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from scipy import linalg
from scipy.special import rel_entr
from torch import Tensor

# Nearest-neighbour distances are computed in blocks of this many rows and columns: the overflow of
# one distance turns its whole block to float32, so this number is part of the metric.
DISTANCE_BLOCK = 10_000
# Rows of a block that are computed at once: bounds the memory, changes no result.
DISTANCE_ROWS = 1_000


class Statistics(NamedTuple):
    """Mean (D,) and covariance (D, D) of one set of features."""

    mu: np.ndarray
    sigma: np.ndarray


class PrecisionRecall(NamedTuple):
    """Two fractions in [0, 1], and how many of the distance blocks were computed in float32."""

    precision: float
    recall: float
    float32_blocks: int
    blocks: int


def mean_and_covariance(features: np.ndarray) -> Statistics:
    """mu = 1/N sum x,  Sigma = 1/(N-1) sum (x - mu)(x - mu)^T.

    ``features`` (N, D) float32, N >= 2, all finite. Returns float32 ``mu`` (D,) and float64
    ``sigma`` (D, D): the mean is computed in the dtype of the features, the covariance in float64.
    Raises ``ValueError`` for other input.
    """
    _require_features(features, "features", least=2)
    return Statistics(features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False)))


def frechet_distance(
    mu1: np.ndarray,
    sigma1: np.ndarray,
    mu2: np.ndarray,
    sigma2: np.ndarray,
    method: str = "symmetric",
) -> float:
    """|mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)).

    Heusel et al. 2017, arXiv 1706.08500, equation 6. With S1 = L L^T, the last trace is the sum of
    the square roots of the eigenvalues of L^T S2 L. These lose half their digits without full rank;
    then it is the sum of the singular values of A^T B with S1 = A A^T and S2 = B B^T. Both are
    symmetric in their arguments, unlike a matrix square root of S1 S2, which ``method`` "sqrtm"
    uses as the TensorFlow evaluator does. Means (D,), covariances (D, D), any float dtype. Raises
    ``ValueError`` if sizes differ.
    """
    size = np.size(mu1)
    if not (
        np.shape(mu1) == np.shape(mu2) == (size,)
        and np.shape(sigma1) == np.shape(sigma2) == (size, size)
    ):
        shapes = ", ".join(str(np.shape(x)) for x in (mu1, sigma1, mu2, sigma2))
        raise ValueError(
            f"statistics of different sizes cannot be compared: mu, sigma, mu, sigma are {shapes}"
        )
    difference = np.subtract(mu1, mu2).astype(np.float64)
    trace = _trace_by_sqrtm if method == "sqrtm" else _trace_of_root
    return float(
        difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * trace(sigma1, sigma2)
    )


def frechet_distance_of_few(first: np.ndarray, second: np.ndarray) -> float:
    """``frechet_distance`` of two sets of features (N, D) and (M, D); fast for N, M << D.

    With the centred features themselves as A and B, A^T B is only N x M.
    """
    centred = []
    for x in (first, second):
        _require_features(x, "features", least=2)
        x = x.astype(np.float64)
        # (N, D), covariance A A^T of A = its transpose
        centred.append((x - x.mean(axis=0)) / np.sqrt(len(x) - 1))
    difference = first.mean(axis=0, dtype=np.float64) - second.mean(axis=0, dtype=np.float64)
    cross = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    spread = sum(np.square(x).sum() for x in centred)
    return float(difference @ difference + spread - 2 * cross)


def _trace_of_root(sigma1: np.ndarray, sigma2: np.ndarray) -> float:
    """tr((S1 S2)^(1/2)) by torch's LAPACK: 2.3 s at D = 2048, numpy's takes 9 s (2 cores)."""
    first, second = (torch.from_numpy(np.array(s, np.float64)) for s in (sigma1, sigma2))
    lower, full = _cholesky(first)
    if full and _cholesky(second)[1]:
        return torch.linalg.eigvalsh(lower.T @ second @ lower).clamp(min=0).sqrt().sum().item()
    return torch.linalg.svdvals(_factor(first).T @ _factor(second)).sum().item()


def _cholesky(sigma: Tensor) -> tuple[Tensor, bool]:
    """Return the lower factor of a covariance (D, D), and whether its rank is clearly full."""
    lower, failed = torch.linalg.cholesky_ex(sigma)
    pivots = lower.diagonal().square()
    return lower, not failed.item() and (pivots.min() > 1e-12 * pivots.max()).item()


def _trace_by_sqrtm(sigma1: np.ndarray, sigma2: np.ndarray) -> float:
    """tr((S1 S2)^(1/2)) by Schur; if it fails, with 1e-6 added to the diagonals, as published."""
    root = linalg.sqrtm(np.dot(sigma1, sigma2))
    if not np.isfinite(root).all():
        offset = np.eye(len(sigma1)) * 1e-6
        root = linalg.sqrtm((sigma1 + offset) @ (sigma2 + offset))
    return float(np.trace(root).real)


def inception_score(probabilities: np.ndarray, split_size: int = 5000) -> float:
    """Mean over splits of exp(E_x KL(p(y|x) || p(y))) (Salimans et al. 2016, arXiv 1606.03498).

    ``probabilities`` (N, classes), rows that sum to 1, in file order; each split is
    ``split_size`` consecutive rows, and a shorter last split has the same weight. Raises
    ``ValueError`` for other input.
    """
    _require_features(probabilities, "probabilities", least=1)
    scores = []
    for start in range(0, len(probabilities), split_size):
        part = probabilities[start : start + split_size].astype(np.float64)
        scores.append(np.exp(rel_entr(part, part.mean(axis=0)).sum(axis=1).mean()))
    return float(np.mean(scores))


def class_accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the fraction of images whose most probable class is their label.

    ``probabilities`` (N, classes), ``labels`` (N,) integers in [0, classes). Raises ``ValueError``
    for other input.
    """
    _require_features(probabilities, "probabilities", least=1)
    require_labels(labels, *probabilities.shape)
    return float((probabilities.argmax(axis=1) == labels).mean())


def require_labels(labels: np.ndarray, count: int, classes: int) -> None:
    """Raise ``ValueError`` unless ``labels`` are ``count`` integers in [0, ``classes``)."""
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels are {labels.dtype} {labels.shape}, expected {count} integers, one per image"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels lie in {labels.min()}..{labels.max()}, the network knows 0..{classes - 1}"
        )


def precision_recall(
    reference: np.ndarray,
    samples: np.ndarray,
    k: int = 3,
    exact: bool = False,
    device: torch.device | str = "cpu",
) -> PrecisionRecall:
    """precision = |{s: |s - r|^2 <= radius(r) for some r}| / |S|; recall: sets exchanged.

    radius(r) is the squared distance from r to its k-th nearest neighbour in its own set
    (Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 1-2). ``reference`` (N, D) and ``samples`` (M,
    D) float32, N and M > k. Distances are float16 as in the TensorFlow evaluator, but float32 in a
    block with an overflow, or everywhere if ``exact``. Holds at most one block of 10,000 x 10,000
    at a time. Raises ``ValueError`` if a set is too small.
    """
    _require_features(reference, "reference features", least=k + 1)
    _require_features(samples, "sample features", least=k + 1)
    ref = torch.as_tensor(reference, dtype=torch.float32, device=device)  # (N, D)
    fake = torch.as_tensor(samples, dtype=torch.float32, device=device)  # (M, D)
    tally = _Tally()
    ref_radii = neighbour_radii(ref, k, exact, tally)  # (N,)
    fake_radii = neighbour_radii(fake, k, exact, tally)  # (M,)
    ref_found = torch.zeros(len(ref), dtype=torch.bool, device=device)
    fake_found = torch.zeros(len(fake), dtype=torch.bool, device=device)
    for rows, columns, distance in distance_slabs(ref, fake, exact, tally):  # (n, m)
        ref_found[rows] |= (distance <= fake_radii[columns]).any(dim=1)
        fake_found[columns] |= (distance <= ref_radii[rows, None]).any(dim=0)
    precision, recall = fake_found.sum().item() / len(fake), ref_found.sum().item() / len(ref)
    return PrecisionRecall(precision, recall, tally.float32_blocks, tally.blocks)


class _Tally:
    """Counts distance blocks, and those of them in float32."""

    def __init__(self) -> None:
        self.blocks = 0
        self.float32_blocks = 0


def neighbour_radii(features: Tensor, k: int, exact: bool, tally: _Tally | None = None) -> Tensor:
    """Return squared distances from rows (N, D) to their k-th nearest other row: (N,) float32.

    A row is its own nearest neighbour, so this is the (k + 1)-th smallest distance of the row.
    """
    nearest = torch.full((len(features), k + 1), torch.inf, device=features.device)
    for rows, _, distance in distance_slabs(features, features, exact, tally):
        smallest = distance.topk(min(k + 1, distance.shape[1]), dim=1, largest=False).values
        nearest[rows] = (
            torch.cat([nearest[rows], smallest], dim=1).topk(k + 1, dim=1, largest=False).values
        )
    return nearest.amax(dim=1)


def distance_slabs(
    u: Tensor, v: Tensor, exact: bool, tally: _Tally | None = None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield |u_i - v_j|^2 of rows (N, D) and (M, D) in parts: (rows, columns, float32 (n, m)).

    A block is computed in float32 if ``exact`` or if float16 overflows, else in float16.
    """
    tally = tally or _Tally()
    for rows in _slices(0, len(u), DISTANCE_BLOCK):
        for columns in _slices(0, len(v), DISTANCE_BLOCK):
            half = None if exact else _half_block(u[rows], v[columns])
            tally.blocks += 1
            tally.float32_blocks += half is None
            for slab in _slices(rows.start, rows.stop, DISTANCE_ROWS):
                if half is None:
                    distance = _distances(u[slab], v[columns])
                else:
                    distance = half[slab.start - rows.start : slab.stop - rows.start].float()
                yield slab, columns, distance


def _half_block(u: Tensor, v: Tensor) -> Tensor | None:
    """Return distances as float16 (n, m), or None if one of them is not finite."""
    u, v = u.half(), v.half()
    norm_u, norm_v = _half_squared_norms(u), _half_squared_norms(v)
    block = torch.empty(len(u), len(v), dtype=torch.float16, device=u.device)
    v = v.float().T  # (D, m)
    for rows in _slices(0, len(u), DISTANCE_ROWS):
        product = (
            u[rows].float() @ v
        ).half()  # summed in float32, as a float16 product is, and rounded
        block[rows] = ((norm_u[rows, None] - 2 * product) + norm_v).clamp_(min=0)
        if not block[rows].isfinite().all():
            return None
    return block


def _distances(u: Tensor, v: Tensor) -> Tensor:
    """max(|u|^2 - 2 u.v + |v|^2, 0) in float32: (n, m)."""
    norm_u, norm_v = u.square().sum(dim=1), v.square().sum(dim=1)
    return ((norm_u[:, None] - 2 * (u @ v.T)) + norm_v).clamp_(min=0)


def _half_squared_norms(x: Tensor) -> Tensor:
    """|x|^2 of float16 rows (N, D) as float16 (N,), rounded after each addition.

    In TensorFlow's order on a CPU. Rows of more than 1600 values are halved. Each part is summed
    in 32 interleaved running sums; these are added as four groups of 8, and the last 8 sums are
    added in float32.
    """
    width = x.shape[1]
    if width > 1600:
        middle = -(-width // 16) * 8
        return _half_squared_norms(x[:, :middle]) + _half_squared_norms(x[:, middle:])
    squares = torch.nn.functional.pad(x * x, (0, -width % 32))  # (N, D)
    squares = squares.view(len(x), -1, 4, 8)  # (N, D/32, 4, 8)
    sums = torch.zeros_like(squares[:, 0])  # (N, 4, 8)
    for square in squares.unbind(dim=1):
        sums = sums + square
    lanes = ((sums[:, 0] + sums[:, 1]) + sums[:, 2]) + sums[:, 3]  # (N, 8)
    return lanes.float().sum(dim=1).half()


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    """Yield [start, stop) as consecutive slices of at most ``size``."""
    for begin in range(start, stop, size):
        yield slice(begin, min(begin + size, stop))


def _factor(sigma: Tensor) -> Tensor:
    """Return A (D, rank) with A A^T = sigma, without eigenvalues that are zero up to rounding."""
    values, vectors = torch.linalg.eigh(sigma)
    kept = values > values.max() * len(values) * torch.finfo(torch.float64).eps
    return vectors[:, kept] * values[kept].sqrt()


def _require_features(x: np.ndarray, name: str, least: int) -> None:
    if x.ndim != 2 or len(x) < least:
        raise ValueError(f"{name} have the shape {tuple(x.shape)}, expected at least {least} rows")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} hold values that are not finite")
