"""Variants of the method: what the config takes, and what they are fed."""

import pytest
import torch

from autoregressive.models.config import variant_of
from autoregressive.models.gpt import GPT
from scripts.diagnosis.models import fill_from_names
from tests.helpers import random_codes, small_config


@pytest.mark.parametrize("kind", ["learned", "shared", "zeros", "class", "last"])
def test_what_special_slots_are_fed(kind):
    """In a whole pass and in a step of decoding, against the words of the option."""
    model = fill_from_names(GPT(small_config(special_tokens=kind))).eval()
    codes, cond = random_codes(model.config)
    tokens = codes[:, model.order.permutation]
    table = model.state_dict().get("spe_tok_embeddings.special_embeddings.weight")
    expected = {
        "learned": lambda: table.expand(len(cond), 3, -1),
        "shared": lambda: table.expand(len(cond), 3, -1),
        "zeros": lambda: torch.zeros(len(cond), 3, 32),
        "class": lambda: model.cls_embedding(cond)[:, None].expand(-1, 3, -1),
        "last": lambda: model.tok_embeddings(tokens[:, 3:4]).expand(-1, 3, -1),
    }[kind]()
    assert (table is None) == (kind not in ("learned", "shared"))
    assert torch.equal(model.embed_slots(tokens, cond, 0, 16)[:, 5:8], expected)
    assert torch.equal(model.embed_slots(tokens, cond, 4, 8)[:, 1:], expected)


def test_a_dropped_class_is_dropped_wherever_it_is_fed():
    model = fill_from_names(GPT(small_config(special_tokens="class", class_dropout_prob=0.5)))
    codes, cond = random_codes(model.config, batch=64)
    fed = []
    model.train().tok_dropout.register_forward_hook(lambda _m, inputs, _y: fed.append(inputs[0]))
    model(codes, cond)
    assert torch.equal(fed[0][:, :1].expand(-1, 3, -1), fed[0][:, 5:8])
    null = (fed[0][:, 0] == model.cls_embedding.embedding_table.weight[-1]).all(-1)
    assert 10 < null.sum() < 54


def test_a_variant_is_what_is_not_as_published():
    assert variant_of(small_config()) == {}
    changed = {"schedule": "4x4", "order": "raster", "special_positions": "predicted"}
    assert variant_of(small_config(**changed)) == changed


@pytest.mark.parametrize("field", ["group_attention", "special_tokens", "special_positions"])
def test_unknown_variants_are_named(field):
    option = field.replace("_", "-")
    with pytest.raises(ValueError, match=f"--{option} other: expected one of "):
        small_config(**{field: "other"})
