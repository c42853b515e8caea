"""Padded heads compute the same."""

from __future__ import annotations

import pytest
import torch

from autoregressive.decoding.generate import generate
from autoregressive.decoding.sampling import SamplingOptions
from autoregressive.models.gpt import GPT
from autoregressive.models.pad_heads import pad_heads
from scripts.diagnosis.models import fill_from_names
from tests.helpers import random_codes, same_tensors, small_config


@pytest.mark.parametrize("n_kv_head", [None, 1])
def test_padded_heads_change_nothing(n_kv_head):
    """Heads of 100 channels padded to 104, in float64: logits, tokens, and what is saved."""
    config = small_config(dim=200, n_head=2, n_kv_head=n_kv_head)
    model = fill_from_names(GPT(config)).double().eval()
    padded = pad_heads(fill_from_names(GPT(config)).double().eval(), 8)
    assert pad_heads(padded, 8).new_cache(1).store.shape[-1] == 104, "padded twice is padded once"
    codes, cond = random_codes(config)
    with torch.no_grad():
        logits = [m.logits(codes, cond) for m in (model, padded)]
    torch.testing.assert_close(*logits, atol=1e-12, rtol=0)
    options = SamplingOptions(cfg_scale=1.5, top_k=5, top_p=0.9, temperature=0.9)
    uniforms = torch.rand(2, 16)
    tokens = [generate(m, model.order, cond, uniforms, options) for m in (model, padded)]
    assert torch.equal(*tokens) and tokens[0].unique().numel() > 3
    assert same_tensors(padded.state_dict(), model.state_dict())
