"""A set of images -> features and statistics: over all processes, with a progress bar, the reference's kept on disk."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from evaluations.c2i.features import FeatureNetwork, ImageFeatures, extract_features
from evaluations.c2i.image_archive import ImageArchive, ImageSet, open_archive
from evaluations.c2i.metrics import Statistics, mean_and_covariance
from utils.distributed import World
from utils.files import atomic_path, sha256_file
from utils.logger import progress

VERSION = 1  # of what is kept on disk: to be raised when resize, network or statistics change


class MeasuredSet(NamedTuple):
    """Features of the images (None: there are none, or this is not rank 0), statistics of pool and spatial ones."""

    features: ImageFeatures | None
    pool: Statistics | None
    spatial: Statistics | None


def measure_set(
    images: ImageSet, network: FeatureNetwork | None, name: str, batch_size: int, world: World
) -> MeasuredSet:
    """Run all images through ``network`` (None: take what is stored); stored statistics go before computed ones.

    To be called by every rank; only rank 0 gets the features and statistics.
    """
    features = None
    if network is not None:
        with progress(world, name, images.count, unit="image") as bar:
            batches = count_up(images.batches(batch_size, world.rank, world.size), bar, images.count, world.size)
            features = extract_features(network, batches, world)
    pool, spatial = images.pool, images.spatial
    if features is not None:
        pool = pool or mean_and_covariance(features.pool)
        if spatial is None and features.spatial is not None:
            spatial = mean_and_covariance(features.spatial)
    return MeasuredSet(features, pool, spatial)


def count_up(batches: Iterator[torch.Tensor], bar: tqdm, total: int, size: int) -> Iterator[torch.Tensor]:
    """The same batches; the bar moves on by their images and as many of each of the other ``size`` - 1 ranks."""
    for batch in batches:
        yield batch
        bar.update(min(len(batch) * size, total - bar.n))


def measure_reference(
    images: ImageSet, network: FeatureNetwork | None, hashes: list[str], keep: bool, batch_size: int, world: World
) -> MeasuredSet:
    """``measure_set``, from the file beside the reference where an earlier call left it.

    ``hashes``: SHA-256 of reference and network, which the name of that file is made of. ``keep``: write and read it.
    """
    keep = keep and network is not None and isinstance(images, ImageArchive)
    path = images.path.with_name(f"{images.path.name}.{'-'.join(h[:8] for h in hashes)}.features.npz")
    key = f"{VERSION} {' '.join(hashes)}"
    cached = _read(path, key, images) if keep and world.is_main else None
    if world.broadcast(cached is not None):
        return cached or MeasuredSet(None, None, None)
    measured = measure_set(images, network, "reference", batch_size, world)
    if keep and world.is_main:
        _write(path, key, measured)
    return measured


def reference_hashes(images: ImageSet, network_hash: str, wanted: bool) -> list[str]:
    """SHA-256 of the reference file and of the network's; the first is empty unless ``wanted``, and of a folder."""
    own = sha256_file(images.path) if wanted and images.path.is_file() else ""
    return [own, network_hash]


def _read(path: Path, key: str, images: ImageSet) -> MeasuredSet | None:
    """What ``_write`` wrote under ``key``; None if it is not there, not whole or of something else."""
    if not path.exists():
        return None
    try:
        statistics = open_archive(path, "kept features")
        with np.load(path, allow_pickle=False) as z:
            pool, written = z["pool"], str(z["key"])
        if written != key or statistics.pool is None or len(statistics.pool.mu) != pool.shape[1]:
            raise ValueError("it belongs to something else")
        if len(pool) != images.count or pool.dtype != np.float32 or not np.isfinite(pool).all():
            raise ValueError(f"it holds features {pool.dtype} {pool.shape}")
    except Exception as error:  # a damaged file may break the reader in any way
        print(f"note: {path} is not whole ({error}) and is made again", file=sys.stderr)
        return None
    print(f"features of the reference are read from {path}")
    none = np.zeros((len(pool), 0), np.float32)
    features = ImageFeatures(pool, None, none, np.zeros(0, np.uint64))
    return MeasuredSet(features, statistics.pool, statistics.spatial)


def _write(path: Path, key: str, measured: MeasuredSet) -> None:
    """Keep pool features and statistics; a folder where nothing can be written is no error."""
    arrays = {"pool": measured.features.pool, "key": np.array(key)}
    for names, statistics in ((("mu", "sigma"), measured.pool), (("mu_s", "sigma_s"), measured.spatial)):
        if statistics is not None:
            arrays |= dict(zip(names, statistics, strict=True))
    try:
        with atomic_path(path) as temporary, open(temporary, "wb") as f:
            np.savez(f, **arrays)
    except OSError as error:
        print(f"note: features of the reference are not kept: {path}: {error.strerror}", file=sys.stderr)
