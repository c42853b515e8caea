"""Sets of images as one ``.npz`` of ``arr_0`` uint8 (N, H, W, 3) and ``labels`` int64 (N,), written in chunks."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils.files import atomic_path


def write_chunk(path: str | Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write images uint8 (b, H, W, 3) and labels (b,) as one file that appears whole or not at all."""
    with atomic_path(path) as temporary, open(temporary, "wb") as f:
        np.savez(f, arr_0=images, labels=labels)


def pack_chunks(npz: str | Path, chunks: Sequence[Path], bar: tqdm) -> None:
    """Join chunk files, in order, into one uncompressed npz; one chunk is in memory at a time.

    The bytes depend on the images and labels alone.
    """
    first = np.load(chunks[0], allow_pickle=False)["arr_0"]
    labels = np.concatenate([np.load(c, allow_pickle=False)["labels"] for c in chunks])
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *first.shape[1:])}
    with atomic_path(npz) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as f:
            np.lib.format.write_array_header_1_0(f, header)
            for chunk in chunks:
                f.write(np.load(chunk, allow_pickle=False)["arr_0"].tobytes())
                bar.update()
        with archive.open(zipfile.ZipInfo("labels.npy"), "w") as f:
            np.lib.format.write_array(f, labels, allow_pickle=False)
    bar.close()
