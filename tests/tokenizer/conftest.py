"""Runs of tokenizer training."""

import sys
from pathlib import Path

import pytest

from tests.helpers import quietly
from tests.tokenizer.helpers import LIVELY, words
from tokenizer import train_vq


@pytest.fixture
def train(work, capfd, monkeypatch):
    def trained(cloud: Path, *options: object) -> str:
        return quietly(capfd, monkeypatch, *words(work, cloud, *options), main=train_vq.main)

    return trained


@pytest.fixture(scope="session")
def whole(work, tmp_path_factory):
    """6 steps of everything at once, that nothing disturbed."""
    cloud = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["train_vq.py", *map(str, words(work, cloud, *LIVELY, "--ckpt-every", 4))]
        )
        train_vq.main()
    return cloud
