"""Where the tokenizer lies in memory on CUDA."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dataset.imagenet import to_model_range
from tests.fake_cuda import CUDA, fake_cuda, place
from tokenizer.layout import place_tokenizer
from tokenizer.vq_model import AttnBlock, VQModel, make_vq_config


class Convolutions(TorchDispatchMode):
    """Lists whether input and weight of each convolution are NCHW in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.contiguous: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "conv" in func._schema.name:
            self.contiguous.append(all(x.is_contiguous() for x in args[:2]))
        return func(*args, **(kwargs or {}))


def test_convolutions_of_the_tokenizer_lie_as_group_norm_does(monkeypatch):
    """On CUDA it is NCHW whatever it gets: channels-last weights had two copies a convolution."""
    with torch.device("meta"):
        vq = VQModel(make_vq_config("VQ-4", codebook_size=64)).eval()
    moves = []
    monkeypatch.setattr(VQModel, "to", lambda self, *a, **k: moves.append(k) or self)
    place_tokenizer(vq, CUDA)
    place_tokenizer(vq, torch.device("cpu"))
    formats = [move["memory_format"] for move in moves]
    assert formats == [torch.contiguous_format, torch.channels_last]
    with fake_cuda(), Convolutions() as convolutions, torch.no_grad():
        place(vq)
        pixels = torch.zeros(2, 8, 8, 3, dtype=torch.uint8, device=CUDA)
        vq.decode_code(vq.encode(to_model_range(pixels, CUDA)))
    # but for the 1x1 convolution after attention, whose channels come last
    attentions = sum(isinstance(module, AttnBlock) for module in vq.modules())
    assert len(convolutions.contiguous) > 20
    assert convolutions.contiguous.count(False) == attentions
