"""Samples of a run become one plain .npz, in any order, killed or not."""

import os
import resource
import signal
import zipfile

import numpy as np
import pytest
import torch
from tqdm import tqdm

from utils import samples
from utils.distributed import World
from utils.logger import progress
from utils.samples import SampleFile

CPU = torch.device("cpu")


def no_bar() -> tqdm:
    return progress(World(1, 2, CPU), "", 1)


@pytest.mark.parametrize("chunk", [1, 3, 7, 9])
def test_samples_written_in_any_order_are_one_plain_npz(tmp_path, chunk):
    """Against numpy's reader and zip's checksums; the bytes depend on images and labels alone."""
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)
    labels = np.arange(7)
    file = SampleFile(tmp_path / "a.npz", "f", images.shape, chunk)
    file.create()
    for c in np.random.default_rng(chunk).permutation(file.num_chunks).tolist():
        assert c in file.missing()
        file.write(c, images[file.images_of(c)])
    file.finish(labels, no_bar())
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert archive.testzip() is None and archive.namelist() == ["arr_0.npy", "labels.npy"]
        assert [i.file_size for i in archive.infolist()] == [
            128 + images.nbytes,
            128 + labels.nbytes,
        ]
    with np.load(tmp_path / "a.npz", allow_pickle=False) as npz:
        assert np.array_equal(npz["arr_0"], images) and np.array_equal(npz["labels"], labels)
    content = (tmp_path / "a.npz").read_bytes()
    other = SampleFile(tmp_path / "b.npz", "f", images.shape, 7)
    other.create()
    other.write(0, images)
    other.finish(labels, no_bar())
    assert (tmp_path / "b.npz").read_bytes() == content


def test_samples_go_on_where_they_were_stopped(tmp_path):
    """Also when stopped in the middle of the end of the file."""
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    for name, stopped in (("a", False), ("b", True)):
        SampleFile(tmp_path / f"{name}.npz", "f", images.shape, 2).create()
        for chunk in (2, 0, 1):
            file = SampleFile(tmp_path / f"{name}.npz", "f", images.shape, 2)
            file.create()
            file.write(chunk, images[file.images_of(chunk)])
        if stopped:
            with open(file.partial, "ab") as f:
                f.write(b"half of the table of contents")
        file.finish(np.arange(5), no_bar())
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "b.npz", allow_pickle=False) as npz:
        assert np.array_equal(npz["arr_0"], images)


def test_samples_that_do_not_fit_the_disk_are_refused_at_once(tmp_path):
    file = SampleFile(tmp_path / "a.npz", "f", (10**12, 256, 256, 3), 32)
    with pytest.raises(ValueError, match=r" GiB free, a.npz needs 183,105,468.8 GiB"):
        file.create()
    assert not list(tmp_path.iterdir())


def test_a_record_of_another_length_starts_samples_anew(tmp_path):
    """As a disk may leave it after a power cut: the full length, and anything in it."""
    file = SampleFile(tmp_path / "s.npz", "f", (5, 2, 2, 3), chunk=2)
    file.create()
    file.write(1, np.ones((2, 2, 2, 3), np.uint8))
    assert file.missing() == [0, 2]
    file.create()
    assert file.missing() == [0, 2]
    file.record.write_bytes(b"")
    file.create()
    assert file.missing() == [0, 1, 2]


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    file = SampleFile(tmp_path / "s.npz", "f", (4, 2, 2, 3), chunk=2)
    file.create()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, hard))
    try:
        with pytest.raises(ValueError, match="s.npz.f.partial cannot be written: File too large"):
            file.write(1, np.ones((2, 2, 2, 3), np.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.missing() == [0, 1]


def test_each_process_records_what_it_has_written(tmp_path, monkeypatch):
    """On a network disk one that writes a shared record back would undo what others wrote."""
    shape = (6, 2, 2, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    one = SampleFile(tmp_path / "s.npz", "f", shape, chunk=2)
    one.create()
    monkeypatch.setattr(samples, "process_name", lambda: "1-machine")
    two = SampleFile(tmp_path / "s.npz", "f", shape, chunk=2)
    blank = one.record.read_bytes()
    one.write(0, images[:2])
    two.write(2, images[4:])
    assert one.record.read_bytes() == blank and one.missing() == two.missing() == [1]
    two._own.write_bytes(b"")  # killed as it began its record, and its number given again
    assert one.missing() == [1, 2]
    two.write(2, images[4:])
    two.write(1, images[2:4])
    assert one.missing() == []
    one.finish(np.arange(6), no_bar())
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]


def test_shared_files_are_opened_for_writing_alone(tmp_path, monkeypatch):
    """See ``_write_at``: a descriptor that may read makes an NFS client write whole pages."""
    file = SampleFile(tmp_path / "s.npz", "f", (4, 2, 2, 3), chunk=2)
    file.create()
    flags, real = {}, os.open
    monkeypatch.setattr(os, "open", lambda p, f, *a: flags.update({p: f}) or real(p, f, *a))
    file.write(1, np.ones((2, 2, 2, 3), np.uint8))
    assert flags.keys() == {file.partial, file._own}
    assert all(f & os.O_ACCMODE == os.O_WRONLY and f & os.O_DSYNC for f in flags.values())


def test_samples_whose_records_are_lost_are_named(tmp_path, monkeypatch):
    file = SampleFile(tmp_path / "s.npz", "f", (4, 2, 2, 3), chunk=2)
    file.create()
    file.write(1, np.ones((2, 2, 2, 3), np.uint8))
    monkeypatch.setattr(samples, "PATIENCE", 0.0)
    with pytest.raises(ValueError, match="s.npz.f.partial lacks 1 of 2 batches, by the records"):
        file.finish(np.arange(4), no_bar())
