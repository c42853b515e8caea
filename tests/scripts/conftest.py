"""Files that the scripts' tests start from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import make_plan, write_all
from tests.scripts.diagnosis.helpers import save_gpt, save_vq


@pytest.fixture
def given(tmp_path) -> dict[str, str]:
    """A tokenizer, codes and a GPT that belong together."""
    sha256 = save_vq(tmp_path / "vq.pt")
    write_all(tmp_path / "codes", make_plan(tokenizer_sha256=sha256))
    save_gpt(tmp_path / "gpt.pt", sha256)
    return {
        "vq_ckpt": str(tmp_path / "vq.pt"),
        "code_path": str(tmp_path / "codes"),
        "gpt_ckpt": str(tmp_path / "gpt.pt"),
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    """24 images of three classes, some in sub-folders; an unreadable one, an empty class."""
    rng = np.random.default_rng(0)
    for label in ("ape", "bee", "cat"):
        (tmp_path / "images" / label / "more").mkdir(parents=True)
        for i in range(8):
            pixels = np.full((40 + i, 36, 3), rng.integers(0, 256, 3), np.uint8)
            name = f"more/{i}.png" if i == 7 else f"{i}.png"
            Image.fromarray(pixels).save(tmp_path / "images" / label / name)
    (tmp_path / "images" / "cat" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "images" / "empty").mkdir()
    return tmp_path / "images"
