"""Checks that the evaluator of this installation computes what the published TensorFlow evaluator
does.

Resize and network are compared with stored values: TensorFlow's own for the resize, those of seeded
random weights for the network, stored when it agreed with TensorFlow's features (golden tests).
Formulas are checked in closed form.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from evaluations.c2i import inception
from evaluations.c2i.metrics import frechet_distance, inception_score, precision_recall
from utils.files import sha256_file

# an image of 8 x 8 pixels; sums per channel and pixel (35, 55) of TensorFlow 2.21's resize of it to
# 299 x 299
IMAGE = np.frombuffer(
    bytes.fromhex(
        "2611da52fe4cec176b8e862c91ab9883dd183da115b74daa935744739c4c408952ab0581d4a58b52aa29a9e954fa3d7f"
        "8126274ff1119c023740950f9afefab0da78b2b284e55f31ac43fae8544c86b36a14210acf26d024f87710ba2b16b7a2"
        "4622e9a9b802288fe3cef8eb07f8bc58e5a3f1f10e08a2d9cfc1819d3938dbfb83f6544cd9bb8244b3605e2356b64c4d"
        "08ec846d98440cd4cb6e7b62c5d50d73330679252389df6fd5f3e914e2ea0b51cbc7ca95464be423219cc18d6f321dbe"
    ),
    np.uint8,
).reshape(1, 8, 8, 3)
RESIZED_SUMS = (11042524.93740177, 12586016.72127485, 10728167.19121981)
RESIZED_PIXEL = (94.995895, 146.91473, 79.57858)
# features of this image by the network with the weights of `recipe_constants`: first values and sum
POOL, POOL_SUM = (0.314783, 0.02594752, 0.08523279), 1619.4098
SPATIAL, SPATIAL_SUM = (0.4310166, 0.760426, 0), 1181.2959

# OpenAI's sample files and the metrics published with them (guided-diffusion, evaluations)
PUBLISHED = {
    "admnet_guided_imagenet128.npz": dict(
        inception_score=141.4767, fid=2.973289, sfid=5.094564, precision=0.78138, recall=0.5929
    ),
    "admnet_guided_upsampled_imagenet256.npz": dict(
        inception_score=215.837, fid=3.942557, sfid=6.140434, precision=0.8265, recall=0.5309
    ),
}


def self_check(weights: str | None, folder: Path, allow_unknown: bool) -> None:
    """Run all checks and print one line per check; ``ValueError`` at the end if one failed."""
    checks: dict[str, Callable[[], str]] = {
        "weights": lambda: check_weights(weights, folder, allow_unknown),
        "resize": check_resize,
        "network": check_network,
        "FID": check_frechet,
        "Inception Score": check_inception_score,
        "Precision, Recall": check_precision_recall,
    }
    failed = []
    for name, check in checks.items():
        try:
            verdict = f"ok      {check()}"
        except (ValueError, AssertionError) as error:
            failed.append(name)
            verdict = f"FAILED  {error}"
        print(f"{name:18} {verdict}", flush=True)
    if failed:
        raise ValueError(f"--self-check: failed: {', '.join(failed)}")


def check_weights(weights: str | None, folder: Path, allow_unknown: bool) -> str:
    """Check that the weights file is a published one and loads."""
    path = inception.find_weights(weights, folder, allow_unknown)
    inception.load_inception(path)
    state = "(not checked)" if allow_unknown else "as published"
    return f"{path} loads, sha256 {sha256_file(path)} {state}"


def check_resize() -> str:
    """Check TF1's resize: one pixel bit for bit, the sums up to rounding."""
    out = inception.resize_tf1(torch.tensor(IMAGE), inception.IMAGE_SIZE).numpy()
    assert np.array_equal(out[0, 35, 55], np.float32(RESIZED_PIXEL)), (
        f"pixel (35, 55) is {out[0, 35, 55]}"
    )
    _close("sums", out.sum(axis=(0, 1, 2), dtype=np.float64), RESIZED_SUMS, 1e-13)
    return "8x8 -> 299x299 as TensorFlow's"


@torch.inference_mode()
def check_network() -> str:
    """Check the features of the network with seeded weights."""
    network = inception.build_inception(
        inception.state_from_tensorflow(recipe_constants()), "recipe"
    )
    pool, spatial, _ = (x.double().numpy()[0] for x in network(torch.tensor(IMAGE)))
    _close("pool features", [*pool[:3], pool.sum()], [*POOL, POOL_SUM], 1e-4)
    _close("spatial features", [*spatial[:3], spatial.sum()], [*SPATIAL, SPATIAL_SUM], 1e-4)
    return "features of seeded weights as stored"


def check_frechet() -> str:
    """Check FID of Gaussians with commuting covariances, deviations a, b: |m|^2 + sum (a - b)^2."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((64, 64)))[0]
    a, b, mean = rng.uniform(0.5, 2, 64), rng.uniform(0.5, 2, 64), rng.standard_normal(64)
    first, second = ((basis * s**2) @ basis.T for s in (a, b))
    expected = mean @ mean + np.square(a - b).sum()
    _close("distance", [frechet_distance(mean, first, np.zeros(64), second)], [expected], 1e-9)
    return "closed form of Gaussians to 1e-9"


def check_inception_score() -> str:
    """Check that certain predictions of 10 equally frequent classes score 10, uniform ones 1."""
    _close(
        "score",
        [inception_score(np.eye(10).repeat(5, 0)), inception_score(np.full((50, 10), 0.1))],
        [10, 1],
        1e-12,
    )
    return "10 certain classes score 10, uniform predictions 1"


def check_precision_recall() -> str:
    """Check that a set covers itself and nothing far away, in both precisions."""
    points = np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32)
    for exact in (False, True):
        itself = precision_recall(points, points, exact=exact)
        elsewhere = precision_recall(points, points + 100)
        assert itself[:2] == (1, 1) and elsewhere[:2] == (0, 0), f"{itself[:2]}, {elsewhere[:2]}"  # noqa: PT018
    return "a set covers itself and nothing far away"


def compare_with_published(name: str, metrics: dict[str, float]) -> str | None:
    """Return a table of published and measured metrics for OpenAI's sample files, else None."""
    if name not in PUBLISHED:
        return None
    lines = [f"{name}: published, measured, relative difference"]
    for metric, published in PUBLISHED[name].items():
        measured = metrics.get(metric, np.nan)
        lines.append(
            f"  {metric:16} {published:11.6f} {measured:11.6f} {measured / published - 1:+.2e}"
        )
    return "\n".join(lines)


def recipe_constants(use_gamma: bool = True) -> dict[str, np.ndarray]:
    """Return random constants of the 2015 graph, seeded by name; gamma is 1 or random."""
    shapes = {k: tuple(v.shape) for k, v in inception.Inception2015().state_dict().items()}
    constants = {}

    def random(name: str) -> np.random.RandomState:
        return np.random.RandomState(zlib.crc32(name.encode()))

    for module, scope in inception.TENSORFLOW_SCOPES.items():
        out, fan, height, width = shapes[f"{module}.conv.weight"]
        name = f"{scope}/conv2d_params"
        std = np.sqrt(2 / (height * width * fan))
        constants[name] = random(name).standard_normal((height, width, fan, out)) * std
        for constant in ("beta", "moving_mean"):
            name = f"{scope}/batchnorm/{constant}"
            constants[name] = random(name).standard_normal(out) * 0.1
        name = f"{scope}/batchnorm/moving_variance"
        constants[name] = 0.5 + random(name).random_sample(out)
        name = f"{scope}/batchnorm/gamma"
        constants[name] = 0.8 + 0.4 * random(name).random_sample(out) if use_gamma else np.ones(out)
    constants["softmax/weights"] = random("softmax/weights").standard_normal((2048, 1008)) * 0.05
    constants["softmax/biases"] = random("softmax/biases").standard_normal(1008) * 0.5
    return {k: v.astype(np.float32) for k, v in constants.items()}


def _close(name: str, computed: object, expected: object, relative: float) -> None:
    """Raise ``AssertionError`` for errors above ``relative`` times the largest expected value."""
    computed, expected = np.asarray(computed, np.float64), np.asarray(expected, np.float64)
    error = np.abs(computed - expected).max() / np.abs(expected).max()
    assert error <= relative, f"{name} are {computed.tolist()}, expected {expected.tolist()}"
