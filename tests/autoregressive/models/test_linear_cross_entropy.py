"""The chunked loss is that of whole logits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from autoregressive.models.linear_cross_entropy import linear_cross_entropy
from tests.fake_cuda import CUDA, Operations, fake_cuda


@pytest.mark.parametrize("chunk", [1, 19 * 5, 1 << 24])
@pytest.mark.parametrize("accumulations", [1, 2])
def test_chunked_loss_and_gradients_are_those_of_whole_logits(monkeypatch, chunk, accumulations):
    """In float64, against torch's logits and cross-entropy; also short chunks, summed calls."""
    monkeypatch.setattr("autoregressive.models.linear_cross_entropy.CHUNK_ELEMENTS", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 4, 8, generator=generator, dtype=torch.float64)
    weight = torch.randn(19, 8, generator=generator, dtype=torch.float64)
    targets = torch.randint(19, (3, 4), generator=generator)
    inputs = [[x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2)]
    for _ in range(accumulations):
        ours, each = linear_cross_entropy(*inputs[0], targets)
        expected = F.cross_entropy(
            (inputs[1][0] @ inputs[1][1].T).flatten(0, 1), targets.flatten(), reduction="none"
        )
        torch.testing.assert_close(each, expected.detach().view(3, 4))
        torch.testing.assert_close(ours, expected.mean())
        (3.0 * ours).backward()
        (3.0 * expected.mean()).backward()
    for ours, expected in zip(*inputs, strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)
    assert not each.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(*inputs[0], targets)[1], each)


def test_chunked_loss_under_autocast_is_that_of_whole_logits():
    """Products in bfloat16, softmax and gradients of parameters in float32, as under autocast."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 8, generator=generator) for n in (12, 19))
    targets = torch.randint(19, (12,), generator=generator)
    grads = []
    for whole in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (
                F.cross_entropy((h @ w.T).float(), targets)
                if whole
                else linear_cross_entropy(h, w, targets)[0]
            )
        loss.backward()
        grads.append((loss.detach(), h.grad, w.grad))
    for ours, expected in zip(*grads, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, expected, atol=2e-3, rtol=2e-2)


def test_loss_is_made_in_few_chunks():
    """32 images of 576 tokens at 16384 codes: each chunk adds to a gradient as large as itself."""
    with fake_cuda(), Operations() as operations:
        hidden = torch.zeros(32, 576, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.zeros(16384, 64, device=CUDA, requires_grad=True)
        targets = torch.zeros(32, 576, device=CUDA, dtype=torch.int64)
        linear_cross_entropy(hidden, weight, targets)
    sums = [seen for name, seen, _ in operations.all if name == "logsumexp"]
    assert len(sums) == 3
    assert max(math.prod(seen[0][0]) for seen in sums) <= 1 << 27
