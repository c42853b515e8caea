"""Files appear whole or not at all."""

import errno

import pytest

from utils.files import atomic_path, cut_torn_line, readable_size


def test_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(OSError, match="full"), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_error_of_a_full_disk_names_the_file(tmp_path):
    """The system's error of a write has no name, unlike that of opening."""
    with pytest.raises(OSError, match="shard"), atomic_path(tmp_path / "shard") as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_torn_line_is_cut_off_but_no_link_followed(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("one\ntwo\nth")
    cut_torn_line(log)
    assert log.read_text() == "one\ntwo\n"
    (tmp_path / ".bashrc").write_text("not a whole line")
    log.unlink()
    log.symlink_to(tmp_path / ".bashrc")
    with pytest.raises(ValueError, match=r"log\.txt is a link"):
        cut_torn_line(log)
    assert (tmp_path / ".bashrc").read_text() == "not a whole line"


def test_small_sizes_are_not_0_gib():
    """Sampling onto a full disk said "has 0.0 GiB free, needs 0.0 GiB"."""
    assert readable_size(20 << 10) == "20 KiB" and readable_size(3 << 29) == "1.5 GiB"
