"""Images -> features -> statistics, shared among all processes; those of the reference are
cached on disk.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evaluations.c2i.image_sets import Crc, ImageArchive, ImageSet, open_archive
from evaluations.c2i.metrics import Statistics, mean_and_covariance
from utils.distributed import World
from utils.files import atomic_path, sha256_file
from utils.logger import progress

VERSION = 1  # of the cache files: to be raised when resize, network or statistics change


class Features(NamedTuple):
    """A network's float32 output for B images.

    ``pool`` (B, D) for FID, Precision and Recall; ``spatial`` (B, S) for sFID, or None if the
    network has none; ``probabilities`` (B, classes), rows that sum to 1, for the Inception Score
    and class accuracy.
    """

    pool: Tensor
    spatial: Tensor | None
    probabilities: Tensor


class FeatureNetwork(Protocol):
    """Any network that can replace Inception."""

    def __call__(self, images: Tensor) -> Features:
        """``images`` (B, H, W, 3) uint8, or float32 in 0-255, on the network's device."""
        ...


class ImageFeatures(NamedTuple):
    """``Features`` of N images as numpy arrays, and a hash of each image's pixels (N,) uint64."""

    pool: np.ndarray
    spatial: np.ndarray | None
    probabilities: np.ndarray
    hashes: np.ndarray


class MeasuredSet(NamedTuple):
    """Features (None without images and on ranks above 0) and statistics of both kinds."""

    features: ImageFeatures | None
    pool: Statistics | None
    spatial: Statistics | None


def extract_features(
    network: FeatureNetwork, batches: Iterable[Tensor], count: int, batch_size: int, world: World
) -> ImageFeatures | None:
    """Run batches (B, H, W, 3) through ``network``; results in order on rank 0, None elsewhere.

    ``batches`` are those of this rank: every ``world.size``-th of ``count`` images in batches of
    ``batch_size``. Rank 0 gathers them as they come, so no other rank keeps any.
    """
    found: ImageFeatures | None = None
    done = 0
    rounds = -(-count // (batch_size * world.size))
    for _, images in zip_longest(range(rounds), batches):  # the last may lack some ranks' batches
        ours = None if images is None else _features_of(network, images, world)
        for part in filter(None, world.gather_objects(ours) or ()):
            found = found or ImageFeatures(*(None if x is None else _room(count, x) for x in part))
            for rows, x in zip(found, part, strict=True):
                if x is not None:
                    rows[done : done + len(x)] = x
            done += len(part.hashes)
    assert done == count or not world.is_main, (done, count)
    return found


@torch.inference_mode()
def _features_of(network: FeatureNetwork, images: Tensor, world: World) -> ImageFeatures:
    """Return the features of one batch (B, H, W, 3)."""
    # cudnn's default rounds the inputs of a float32 convolution to 10 bits
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        features = network(images.to(world.device))
    arrays = (None if x is None else x.cpu().numpy() for x in features)
    return ImageFeatures(*arrays, hashes=_hashes(images))


def _room(count: int, batch: np.ndarray) -> np.ndarray:
    """Return an array for ``count`` rows like those of ``batch``."""
    return np.empty((count, *batch.shape[1:]), batch.dtype)


def _hashes(images: Tensor) -> np.ndarray:
    digests = b"".join(hashlib.blake2b(image.numpy(), digest_size=8).digest() for image in images)
    return np.frombuffer(digests, np.uint64)


def measure_set(
    images: ImageSet, network: FeatureNetwork | None, name: str, batch_size: int, world: World
) -> MeasuredSet:
    """Run images through ``network``, if given; stored statistics take precedence over computed.

    Every rank must call this; only rank 0 gets the features and statistics.
    """
    features = None
    if network is not None:
        crcs: list[Crc] | None = [] if world.size > 1 else None
        with progress(world, name, images.count, unit="image") as bar:
            own = images.batches(batch_size, world.rank, world.size, crcs)
            batches = _count_up(own, bar, images.count, world.size)
            features = extract_features(network, batches, images.count, batch_size, world)
        if crcs is not None:
            _check_parts(images, crcs, world)
    pool, spatial = images.pool, images.spatial
    if features is not None:
        pool = pool or mean_and_covariance(features.pool)
        if spatial is None and features.spatial is not None:
            spatial = mean_and_covariance(features.spatial)
    return MeasuredSet(features, pool, spatial)


def _check_parts(images: ImageSet, crcs: list[Crc], world: World) -> None:
    """Raise ``ValueError`` on every rank if the parts that the ranks have read are damaged."""
    all_crcs, problem = world.gather_objects(crcs), None
    if all_crcs is not None:
        try:
            images.check(all_crcs)
        except ValueError as error:
            problem = str(error)
    if problem := world.broadcast(problem):
        raise ValueError(problem)


def _count_up(batches: Iterator[Tensor], bar: tqdm, total: int, size: int) -> Iterator[Tensor]:
    """Yield the batches; advance the bar by each batch's images times the number of ranks."""
    for batch in batches:
        yield batch
        bar.update(min(len(batch) * size, total - bar.n))


def measure_reference(
    images: ImageSet,
    network: FeatureNetwork | None,
    network_sha256: str,
    cache: bool,
    batch_size: int,
    world: World,
) -> MeasuredSet:
    """``measure_set``; with ``cache``, read from a file beside the reference if one was written.

    The file's name and content hold the SHA-256 of the reference and of the network.
    """
    cache = cache and network is not None and isinstance(images, ImageArchive)
    cached = None
    if cache and world.is_main:
        hashes = (sha256_file(images.path), network_sha256)
        path = images.path.with_name(
            f"{images.path.name}.{'-'.join(h[:8] for h in hashes)}.features.npz"
        )
        key = f"{VERSION} {' '.join(hashes)}"
        cached = _read_cache(path, key, images)
    if world.broadcast(cached is not None):
        return cached or MeasuredSet(None, None, None)

    measured = measure_set(images, network, "reference", batch_size, world)
    if cache and world.is_main:
        _write_cache(path, key, measured)
    return measured


def _read_cache(path: Path, key: str, images: ImageSet) -> MeasuredSet | None:
    """Return what ``_write_cache`` wrote under ``key``; None if it is missing or damaged."""
    if not path.exists():
        return None
    try:
        statistics = open_archive(path, "cached features")
        with np.load(path, allow_pickle=False) as z:
            pool, written_key = z["pool"], str(z["key"])
        if (
            written_key != key
            or statistics.pool is None
            or len(statistics.pool.mu) != pool.shape[1]
        ):
            raise ValueError("it belongs to something else")
        if len(pool) != images.count or pool.dtype != np.float32 or not np.isfinite(pool).all():
            raise ValueError(f"it holds features {pool.dtype} {pool.shape}")
    except Exception as error:  # a damaged file may break the reader in any way
        print(f"note: {path} is not whole ({error}) and is made again", file=sys.stderr)
        return None
    print(f"features of the reference are read from {path}")
    no_probabilities, no_hashes = np.zeros((len(pool), 0), np.float32), np.zeros(0, np.uint64)
    features = ImageFeatures(pool, None, no_probabilities, no_hashes)
    return MeasuredSet(features, statistics.pool, statistics.spatial)


def _write_cache(path: Path, key: str, measured: MeasuredSet) -> None:
    """Write pool features and statistics; a folder that cannot be written to is only noted."""
    arrays = {"pool": measured.features.pool, "key": np.array(key)}
    for names, statistics in (
        (("mu", "sigma"), measured.pool),
        (("mu_s", "sigma_s"), measured.spatial),
    ):
        if statistics is not None:
            arrays |= dict(zip(names, statistics, strict=True))
    try:
        with atomic_path(path) as temporary, open(temporary, "wb") as f:
            np.savez(f, **arrays)
    except OSError as error:
        print(
            f"note: features of the reference are not cached: {path}: {error.strerror}",
            file=sys.stderr,
        )
