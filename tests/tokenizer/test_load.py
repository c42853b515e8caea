"""What a tokenizer's file says beside its weights."""

from argparse import Namespace

import pytest
import torch

from scripts.diagnosis.models import fill_from_names
from tests.helpers import ROOT
from tokenizer.load import load_tokenizer, resolve_image_size
from tokenizer.vq_model import VQModel, make_vq_config


def options(path) -> Namespace:
    return Namespace(vq_ckpt=str(path), vq_model=None, codebook_size=None, codebook_embed_dim=None)


def test_images_are_as_large_as_those_it_learned_from():
    """Extraction made 64x64 grids of 32-pixel images, as 256 pixels were the only default."""
    vq, _ = load_tokenizer(options(ROOT / "pretrained_models" / "small" / "digits-tokenizer"))
    assert vq.trained_size == resolve_image_size(None, vq) == 32
    assert resolve_image_size(64, vq) == 64


@pytest.mark.parametrize("run", [None, {}, {"image_size": "32"}, {"image_size": -1}, 7])
def test_released_and_odd_files_leave_the_published_size(tmp_path, run):
    model = fill_from_names(VQModel(make_vq_config("VQ-4")))
    facts = {} if run is None else {"run": run}
    torch.save({"model": model.state_dict()} | facts, tmp_path / "vq.pt")
    args = options(tmp_path / "vq.pt")
    args.vq_model = "VQ-4"
    assert resolve_image_size(None, load_tokenizer(args)[0]) == 256
