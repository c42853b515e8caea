"""Files appear whole or not at all."""

import pytest

from utils.files import atomic_path, cut_torn_line


def test_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(OSError, match="full"), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


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
