"""Archives that are damaged; checksums of parts make up that of the whole."""

import zlib

import numpy as np
import pytest

from utils.npz import combine_crc32, member_names, open_npz


def test_crcs_of_parts_combine_to_that_of_the_whole():
    data = np.random.default_rng(0).integers(0, 256, 70_000, dtype=np.uint8).tobytes()
    for cut in (0, 1, 7, 4096, 65_537, len(data)):
        first, second = data[:cut], data[cut:]
        whole = combine_crc32(zlib.crc32(first), zlib.crc32(second), len(second))
        assert whole == zlib.crc32(data)


@pytest.mark.parametrize("renamed", [b"labelz.npy", b"labels.nqy"])
def test_an_array_that_a_damaged_directory_hides_is_missed(tmp_path, renamed):
    """The evaluation went on without the labels, and without the metrics that need them."""
    np.savez(tmp_path / "a.npz", arr_0=np.zeros(3), labels=np.arange(3))
    before, _, after = (tmp_path / "a.npz").read_bytes().rpartition(b"labels.npy")
    with open_npz(tmp_path / "a.npz") as archive:
        assert member_names(archive) == ["arr_0", "labels"]
    (tmp_path / "a.npz").write_bytes(before + renamed + after)
    with (
        open_npz(tmp_path / "a.npz") as archive,
        pytest.raises(ValueError, match=r"a\.npz is not a whole .* File name in directory"),
    ):
        member_names(archive)
