"""Which process makes which shard."""

import errno
import fcntl
import multiprocessing
import os
import signal
from contextlib import contextmanager

from dataset.claims import Claims
from dataset.shards import shard_path
from utils.files import temporary_path

FORK = multiprocessing.get_context("fork")


def hold(folder, shards, pipe) -> None:
    """Claim ``shards`` in another process, send which were free, and live on until killed."""
    claims = Claims(folder)
    pipe.send([claims.take(s) for s in shards])
    signal.pause()


@contextmanager
def other_process(folder, *shards):
    """Another process and which of ``shards`` it has got; killed at the end."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=hold, args=(folder, shards, theirs))
    process.start()
    try:
        yield ours.recv()
    finally:
        process.kill()
        process.join()


def test_claims_exclude_the_living_and_not_the_dead(tmp_path):
    with Claims(tmp_path) as claims:
        assert claims.take(3) and claims.take(4)
        claims.release(4)
        with other_process(tmp_path, 2, 3, 4) as taken:
            assert taken == [True, False, True]
            assert [claims.take(s) for s in (1, 2, 3, 4)] == [True, False, True, False]
        assert [claims.take(s) for s in (2, 4)] == [True, True]  # killed
    with other_process(tmp_path, 1, 2, 3, 4) as taken:
        assert taken == [True] * 4


def test_a_finished_shard_is_not_claimed(tmp_path, monkeypatch):
    shard_path(tmp_path, 2).parent.mkdir()
    shard_path(tmp_path, 2).touch()
    locked, lockf = [], fcntl.lockf

    def lock(file, kind, length, start):
        locked.append(kind)
        if start == 3 and kind != fcntl.LOCK_UN:
            shard_path(tmp_path, 3).touch()  # between the look and the claim
        lockf(file, kind, length, start)

    monkeypatch.setattr(fcntl, "lockf", lock)
    with Claims(tmp_path) as claims:
        assert not claims.take(2) and not locked
        assert not claims.take(3) and locked[-1] == fcntl.LOCK_UN


def test_sweeping_spares_what_a_living_process_writes(tmp_path):
    """Of this machine by its process, of others by its claim; the rest is cleared away."""
    folder = shard_path(tmp_path, 0).parent
    folder.mkdir()
    shard_path(tmp_path, 4).touch()
    foreign = [folder / f"{s:05d}.npz.tmp-1-00000000-00000000" for s in (2, 3)]
    ours = temporary_path(shard_path(tmp_path, 1))
    for path in (ours, *foreign, folder / "00002.npz.tmp-1234abcd"):
        path.write_bytes(b"half")
    with Claims(tmp_path) as claims, other_process(tmp_path, 3):
        claims.sweep()
        assert sorted(folder.iterdir()) == sorted([shard_path(tmp_path, 4), ours, foreign[1]])
    ours.unlink()
    with Claims(tmp_path) as claims:
        claims.sweep()
    assert [p.name for p in folder.iterdir()] == ["00004.npz"]


def test_a_disk_without_locks_leaves_every_shard_free(tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with Claims(tmp_path) as claims:
        assert claims.exclude and claims.take(1) and claims.take(1)
        assert not claims.exclude
        claims.release(1)
