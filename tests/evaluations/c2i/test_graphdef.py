"""The reader of frozen TensorFlow graphs: golden encodings, a whole Inception graph, and damaged
files.
"""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from evaluations.c2i import inception
from evaluations.c2i.graphdef import read_graphdef
from evaluations.c2i.self_check import recipe_constants
from tests.evaluations.c2i.helpers import attribute, constant, field, varint


def inception_graph(constants: dict[str, np.ndarray], scaled: bool) -> bytes:
    """A GraphDef of the constants and the batch norms that use them."""
    nodes = [constant(name, value) for name, value in constants.items()]
    for scope in inception.TENSORFLOW_SCOPES.values():
        switch = attribute("scale_after_normalization", field(5, int(scaled)))
        name = f"{scope}/batchnorm".encode()
        nodes.append(
            field(1, field(1, name) + field(2, b"BatchNormWithGlobalNormalization") + switch)
        )
    return b"".join(nodes)


def test_every_numeric_encoding_is_golden(golden):
    z = golden("evaluator_graphdef_encodings.npz")
    nodes = read_graphdef(z["pb_bytes"].tobytes())
    expected = {k.removeprefix("expect/"): z[k] for k in z if k.startswith("expect/")}
    assert {k for k, node in nodes.items() if node.value is not None} == expected.keys()
    for name, value in expected.items():
        assert nodes[name].value.dtype == value.dtype
        assert np.array_equal(nodes[name].value, value)
    assert nodes["j/conv"].switches == {"use_cudnn_on_gpu": True}


@pytest.mark.parametrize(
    ("kind", "number", "dtype", "values"),
    [
        (3, 7, np.int32, [5, -2]),
        (9, 10, np.int64, [-1]),
        (10, 11, np.bool_, [1, 0]),
        (19, 13, np.float16, [1.5, -2]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_lists_of_numbers_packed_and_not(kind, number, dtype, values, packed):
    array = np.array(values, dtype)
    words = array.view(np.uint16) if dtype == np.float16 else array.astype(np.int64)
    words = [int(w) & 0xFFFFFFFFFFFFFFFF for w in words]
    listed = (
        field(number, b"".join(map(varint, words)))
        if packed
        else b"".join(field(number, w) for w in words)
    )
    tensor = field(1, kind) + field(2, field(2, field(1, 4))) + listed
    node = field(1, field(1, b"x") + field(2, b"Const") + attribute("value", field(8, tensor)))
    found = read_graphdef(node)["x"].value
    assert found.dtype == dtype
    assert found.tolist() == [*array.tolist(), *[array.tolist()[-1]] * (4 - len(array))]


def test_single_floats_are_read():
    tensor = field(1, 1) + b"".join(varint(5 << 3 | 5) + struct.pack("<f", x) for x in (1.25, -3.0))
    tensor += field(2, field(2, field(1, 2)))
    node = field(1, field(1, b"x") + field(2, b"Const") + attribute("value", field(8, tensor)))
    assert read_graphdef(node)["x"].value.tolist() == [1.25, -3.0]


@pytest.mark.parametrize("scaled", [True, False])
def test_graph_and_state_dict_of_the_same_weights_give_the_same_features(tmp_path, scaled):
    """Also: gamma counts only where ``scale_after_normalization`` says so."""
    (tmp_path / "graph.pb").write_bytes(inception_graph(recipe_constants(), scaled))
    torch.save(
        inception.state_from_tensorflow(recipe_constants(use_gamma=scaled)), tmp_path / "state.pth"
    )
    images = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        first, second = (
            inception.load_inception(tmp_path / name)(images) for name in ("graph.pb", "state.pth")
        )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_graph_without_a_constant_is_refused(tmp_path):
    constants = recipe_constants()
    del constants["softmax/weights"]
    (tmp_path / "graph.pb").write_bytes(inception_graph(constants, True))
    with pytest.raises(
        ValueError, match="graph.pb is not the Inception graph of 2015: .*softmax/weights"
    ):
        inception.load_inception(tmp_path / "graph.pb")


def test_damaged_graphs_are_a_value_error_or_read():
    """Every cut and many flipped bytes: nothing but ValueError comes out, and no long work."""
    data = constant("a", np.arange(6, dtype=np.float32)) + constant(
        "b", np.ones((2, 3), np.float32)
    )
    rng = np.random.default_rng(0)
    damaged = [data[:end] for end in range(len(data))]
    for _ in range(2000):
        flipped = bytearray(data)
        flipped[rng.integers(len(data))] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    refused = 0
    for text in damaged:
        try:
            read_graphdef(text)
        except ValueError:
            refused += 1
    assert refused > 200


def test_constants_are_bounded_together():
    """Each of them a small message that says 16 million values."""
    tensor = field(1, 1) + field(2, field(2, field(1, 1 << 24))) + field(5, struct.pack("<f", 1))
    node = field(1, field(1, b"x") + field(2, b"Const") + attribute("value", field(8, tensor)))
    with pytest.raises(ValueError, match="constants take more than"):
        read_graphdef(node * 8)


def test_an_empty_constant_and_a_misplaced_message():
    empty = field(1, 1) + field(2, field(2, field(1, 0)))
    node = field(1, field(1, b"x") + field(2, b"Const") + attribute("value", field(8, empty)))
    assert read_graphdef(node)["x"].value.shape == (0,)
    wrong = field(1, 1) + field(2, field(2, field(1, b"ab")))
    with pytest.raises(ValueError, match="not a GraphDef"):
        read_graphdef(
            field(1, field(1, b"x") + field(2, b"Const") + attribute("value", field(8, wrong)))
        )


def test_a_huge_shape_is_not_filled():
    tensor = (
        field(1, 1) + field(2, field(2, field(1, 1 << 30)) * 3) + field(5, struct.pack("<f", 1))
    )
    node = field(1, field(1, b"x") + field(2, b"Const") + attribute("value", field(8, tensor)))
    with pytest.raises(ValueError, match="has 1 values"):
        read_graphdef(node)
