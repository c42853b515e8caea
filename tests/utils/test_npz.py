"""Checksums of parts make up that of the whole."""

import zlib

import numpy as np

from utils.npz import combine_crc32


def test_crcs_of_parts_combine_to_that_of_the_whole():
    data = np.random.default_rng(0).integers(0, 256, 70_000, dtype=np.uint8).tobytes()
    for cut in (0, 1, 7, 4096, 65_537, len(data)):
        first, second = data[:cut], data[cut:]
        whole = combine_crc32(zlib.crc32(first), zlib.crc32(second), len(second))
        assert whole == zlib.crc32(data)
