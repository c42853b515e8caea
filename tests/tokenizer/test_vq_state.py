"""The state of tokenizer training: dead entries, loss scales of both models."""

import json

import pytest
import torch

from tests.helpers import small_state, take_step
from tests.tokenizer.helpers import revive_all_but_one, tensors
from tokenizer import train_vq


def test_reviving_moves_dead_entries_of_weights_and_average(work, train, tmp_path, monkeypatch):
    """All entries but 3 are dead, so both end equal at unit latents, and entry 3 differs."""
    monkeypatch.setattr(train_vq, "revive_dead_codes", revive_all_but_one)
    train(tmp_path, "--revive-dead-codes", 3, "--ema")
    state = tensors(tmp_path, 3)
    same = (state["model.quantize.embedding.weight"] == state["ema.quantize.embedding.weight"]).all(
        1
    )
    assert same.tolist() == [i != 3 for i in range(64)]
    moved = state["model.quantize.embedding.weight"][same]
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(63))


@pytest.mark.parametrize("before, after", [(False, True), (True, False), (True, True)])
def test_loss_scales_of_both_models_survive_a_change_of_precision(before, after):
    """As on another machine: fp16 (True) has a loss scale for each; bf16 and float32 have none."""

    def state(fp16: bool) -> train_vq.VQState:
        parts = [small_state(1.0, fp16=fp16) for _ in range(2)]
        return train_vq.VQState(**vars(parts[0]), discriminator=parts[1])

    saved, resumed = state(before), state(after)
    for step in range(3):
        take_step(saved, step, -1.0)  # with a discriminator the loss may be below 0
        take_step(saved.discriminator, step, 1.0)
    if before:
        saved.discriminator.scaler.update(8.0)
    start = resumed.scaler.get_scale()
    resumed.load_scalars(json.loads(json.dumps(saved.scalars())))
    assert resumed.guard.state.tolist() == saved.guard.state.tolist()
    assert resumed.scaler.get_scale() == start
    assert resumed.discriminator.scaler.get_scale() == (8.0 if before and after else start)
    for part in (resumed, resumed.discriminator):
        take_step(part, 3, 1.0)
        assert part.guard.skipped == 0
