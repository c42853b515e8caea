"""Which process makes which shard."""

import os
import subprocess
import time

from dataset.claims import Claims
from dataset.codes import shard_path


def test_claims_exclude_the_living_and_outlive_the_dead(tmp_path):
    ours, theirs = Claims(tmp_path), Claims(tmp_path)
    assert ours.take(3)
    assert not theirs.take(3)  # this very process is alive
    assert theirs.take(4)
    path = shard_path(tmp_path, 3).with_suffix(".claim")
    dead = subprocess.Popen(["true"])
    dead.wait()
    path.write_text(f"{ours._machine} {dead.pid} token")
    assert theirs.take(3)
    path.write_text("another-host 1 token")
    assert not ours.take(3)
    os.utime(path, (time.time() - 1000,) * 2)
    assert ours.take(3)
    theirs.release(3)  # no longer theirs: left alone
    theirs.renew()
    assert not theirs.free(3)
    ours.release(3)
    assert theirs.free(3) and theirs.take(3)


def test_a_claim_clears_what_a_killed_writer_left(tmp_path):
    shard_path(tmp_path, 2).parent.mkdir()
    leftover = shard_path(tmp_path, 2).with_name("00002.npz.tmp-1234abcd")
    leftover.write_bytes(b"half")
    with Claims(tmp_path) as claims:
        assert claims.take(2)
        assert not leftover.exists()
    assert not list(shard_path(tmp_path, 2).parent.iterdir())


def test_a_claim_is_never_without_its_owner(tmp_path, monkeypatch):
    """Killed between a file's creation and its first byte, a process would be waited for."""
    seen = []
    link = os.link
    monkeypatch.setattr(os, "link", lambda a, b: seen.append(a.read_text()) or link(a, b))
    claims = Claims(tmp_path)
    assert claims.take(2) and seen == [claims._text]
    assert [p.name for p in shard_path(tmp_path, 2).parent.iterdir()] == ["00002.claim"]
