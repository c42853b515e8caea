"""GPT: golden logits, released names and shapes, dropout, modes, compiled graphs."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from autoregressive.models.config import GPT_models, GPTConfig
from autoregressive.models.gpt import GPT
from scripts.diagnosis.models import fill_from_names
from scripts.diagnosis.models import golden_gpt as tiny_gpt
from tests.helpers import random_codes, small_config, train_steps, trainable_gpt


@pytest.mark.parametrize("n", [1, 4, 9, 16])
def test_logits_and_loss_are_golden(golden, n):
    file = golden(f"gpt_tiny_n{n}.npz")
    model = tiny_gpt(file)
    with torch.no_grad():
        codes, cond = torch.from_numpy(file["raster_tokens"]).long(), torch.from_numpy(file["cond"])
        logits, (loss, _) = model.logits(codes, cond), model(codes, cond)
    torch.testing.assert_close(logits, torch.from_numpy(file["train_logits"]), atol=1e-4, rtol=0)
    assert abs(loss.item() - float(file["train_loss"])) < 1e-4


def released_names(config: GPTConfig) -> dict[str, list[int]]:
    with torch.device("meta"):
        return {k: list(v.shape) for k, v in GPT(config).state_dict().items()}


@pytest.mark.parametrize("size", [s for s in GPT_models if s not in ("GPT-N", "GPT-T", "GPT-S")])
@pytest.mark.parametrize("n", [4, 16])
def test_every_released_size_has_its_names_and_shapes(golden, size, n):
    expected = json.loads(golden("state_dict_manifest.json"))[f"{size}/n{n}"]
    names = released_names(GPTConfig(**GPT_models[size], ar_token_num=n))
    shapes = expected["shapes"]
    for layer in range(1, expected["layers"]):
        shapes |= {
            k.replace("layers.0.", f"layers.{layer}."): v
            for k, v in shapes.items()
            if "layers.0." in k
        }
    assert names == shapes
    assert sum(torch.Size(s).numel() for s in names.values()) == expected["parameters"]


def test_n1_has_no_special_tokens():
    """LlamaGen's c2i checkpoints, n = 1, have no such parameter and must load strictly."""
    assert not any(
        "spe_tok" in k for k in released_names(GPTConfig(**GPT_models["GPT-B"], ar_token_num=1))
    )


def test_small_sizes_are_small():
    def parameters(size):
        config = GPTConfig(
            **GPT_models[size], vocab_size=256, num_classes=10, grid_height=8, grid_width=8
        )
        return sum(torch.Size(s).numel() for s in released_names(config).values())

    assert parameters("GPT-N") < 0.5e6
    assert parameters("GPT-T") < 2e6
    assert 5.5e6 < parameters("GPT-S") < 6.5e6


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_head": 2},
        {"n_kv_head": 1},
        {"order": "raster"},
        {"group_attention": "causal"},
        {"special_tokens": "last", "special_positions": "predicted"},
    ],
    ids=str,
)
def test_no_logit_depends_on_a_later_token(changes):
    """Changing region-ordered token s changes logits of later steps only (grouped heads too)."""
    model = fill_from_names(GPT(small_config(**changes))).eval()
    order = model.order
    codes, cond = random_codes(model.config)
    with torch.no_grad():
        before = model.logits(codes, cond)
        for s in range(order.num_tokens):
            changed = codes.clone()
            changed[:, order.permutation[s]] = (
                codes[:, order.permutation[s]] + 1
            ) % model.config.vocab_size
            differs = (model.logits(changed, cond) != before).any(-1).any(0)
            later = order.step_of_slot > order.step_of_slot[s]
            assert not differs[~later].any(), s


def test_grouped_heads_equal_repeated_heads():
    """Grouped-query attention is attention whose key-value heads repeat, group by group."""
    grouped = fill_from_names(GPT(small_config(n_kv_head=2))).eval()
    full = fill_from_names(GPT(small_config())).eval()
    state = grouped.state_dict()
    for name in [k for k in state if k.endswith("wqkv.weight")]:
        q, k, v = state[name].split([32, 16, 16])
        k, v = (x.view(2, 8, 32).repeat_interleave(2, dim=0).flatten(0, 1) for x in (k, v))
        state[name] = torch.cat([q, k, v])
    full.load_state_dict(state)
    codes, cond = random_codes(full.config)
    torch.testing.assert_close(
        grouped.logits(codes, cond), full.logits(codes, cond), atol=1e-5, rtol=1e-5
    )


def test_special_slots_have_zero_rotary_rows():
    """Released weights were trained with queries and keys of class and special slots zeroed."""
    model = GPT(small_config())
    without_position = model.order.slot_positions[:, 0] < 0
    assert without_position.sum() == 4
    assert not model.freqs_cis[without_position].any()
    assert model.freqs_cis[~without_position].any(-1).all()


def test_every_dropout_is_off_in_eval_and_on_in_train():
    codes, cond = random_codes(small_config())
    names = (
        "class_dropout_prob",
        "token_dropout_p",
        "attn_dropout_p",
        "resid_dropout_p",
        "ffn_dropout_p",
    )
    off = dict.fromkeys(names, 0.0)
    for name in (*names, "drop_path_rate"):
        model = fill_from_names(GPT(small_config(**off | {name: 0.5})))
        reference = fill_from_names(GPT(small_config(**off))).logits(codes, cond)
        torch.manual_seed(0)
        assert not torch.equal(model.train().logits(codes, cond), reference), name
        torch.testing.assert_close(model.eval().logits(codes, cond), reference)


def test_class_dropout_replaces_by_the_null_class():
    embedder = fill_from_names(GPT(small_config(class_dropout_prob=1.0))).cls_embedding.train()
    assert embedder.drop(torch.tensor([0, 2])).tolist() == [3, 3]


def test_untrained_loss_is_uniform_and_gradients_reach_every_parameter():
    """The output layer starts at zero, so the first loss is log(vocabulary)."""
    model = GPT(small_config())
    model.init_weights()
    codes, cond = random_codes(model.config)
    assert model(codes, cond)[0].item() == pytest.approx(torch.tensor(19.0).log().item(), abs=1e-6)
    torch.nn.init.normal_(model.output.weight)
    model(codes, cond)[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_cast_weights_keeps_the_rotary_table():
    model = GPT(small_config()).cast_weights(torch.bfloat16)
    assert model.output.weight.dtype == torch.bfloat16
    assert model.freqs_cis.dtype == torch.float32


def test_impossible_heads_are_named():
    with pytest.raises(ValueError, match="multiple of 4"):
        small_config(dim=36, n_head=6)
    with pytest.raises(ValueError, match="4 heads cannot share 3"):
        small_config(n_kv_head=3)


@pytest.mark.parametrize("what", ["selective", "full"])
def test_recomputed_activations_change_no_gradient(what):
    """Dropout on: what is computed again draws the same masks."""
    codes, cond = random_codes(small_config())
    grads = []
    for choice in ("none", what):
        model = fill_from_names(GPT(small_config())).train()
        model.recompute_activations(choice)
        torch.manual_seed(1)
        model(codes, cond)[0].backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("n", [1, 4])
def test_flex_attention_has_the_same_mask(n):
    """FlexAttention, uncompiled on the CPU, against the dense mask; 16 slots of a block of 128."""
    model = fill_from_names(GPT(small_config(ar_token_num=n, n_kv_head=2))).eval()
    codes, cond = random_codes(model.config)
    with torch.no_grad():
        dense = model.logits(codes, cond)
        model.use_flex_attention(torch.device("cpu"))
        torch.testing.assert_close(model.logits(codes, cond), dense, atol=1e-5, rtol=1e-5)


def test_flops_are_those_that_torch_counts():
    """Against torch's counter of forward and backward, which counts all pairs of slots."""
    from torch.utils.flop_counter import FlopCounterMode

    model = fill_from_names(GPT(small_config(n_kv_head=2)))
    codes, cond = random_codes(model.config, batch=3)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(SDPBackend.MATH):
        model.logits(codes, cond).sum().backward()
    config, slots = model.config, model.order.num_tokens
    hidden_pairs = slots**2 - int(model.order.mask().sum())
    assert counter.get_total_flops() == 3 * (
        model.flops_per_image() + 12 * config.n_layer * config.dim * hidden_pairs
    )


def block_gradients(codes: Tensor, cond: Tensor, compiled: bool) -> list[Tensor]:
    model = fill_from_names(
        GPT(small_config(n_layer=1, attn_dropout_p=0.0, resid_dropout_p=0.0, ffn_dropout_p=0.0))
    )
    if compiled:
        model.layers[0].compile()
    torch.manual_seed(0)
    model(codes, cond)[0].backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradients():
    inputs = random_codes(small_config())
    for ours, expected in zip(
        block_gradients(*inputs, True), block_gradients(*inputs, False), strict=True
    ):
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_graphs_of_training(compiler, recompute):
    """One for all blocks."""
    model = trainable_gpt()
    model.recompute_activations(recompute)
    train_steps(model, 2)
    assert compiler.graphs == 1


def test_graphs_of_training_with_stochastic_depth(compiler):
    """Each block has its own rate: it was compiled on its own, and from the ninth on not at all."""
    model = trainable_gpt(drop_path_rate=0.5)
    train_steps(model, 2)
    assert compiler.graphs == 1
