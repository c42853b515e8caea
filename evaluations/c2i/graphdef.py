"""Reads the constants and boolean attributes of a frozen TensorFlow graph (``.pb``) without
TensorFlow.

Decodes the protobuf wire format and the few messages that lead to a constant (graph.proto,
node_def.proto, attr_value.proto, tensor.proto, tensor_shape.proto of TensorFlow) and skips all
other fields. Nothing in the file is executed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

# wire types: the lowest three bits of a field's key
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
# numeric members of the DataType enum -> numpy dtype, and the field of TensorProto that lists
# values of this type
DTYPES: dict[int, tuple[str, int]] = {
    1: ("<f4", 5),
    2: ("<f8", 6),
    3: ("<i4", 7),
    4: ("|u1", 7),
    5: ("<i2", 7),
    6: ("|i1", 7),
    9: ("<i8", 10),
    10: ("|b1", 11),
    17: ("<u2", 7),
    19: ("<f2", 13),
    22: ("<u4", 16),
    23: ("<u8", 17),
}
SHAPE, CONTENT = 2, 4  # fields of TensorProto
LARGEST = 1 << 28  # bytes of all constants: one repeated value can stand for a huge array


class Node(NamedTuple):
    """One operation: type, value (None unless it is a numeric ``Const``) and boolean attributes."""

    op: str
    value: np.ndarray | None
    switches: dict[str, bool]


def read_graphdef(data: bytes) -> dict[str, Node]:
    """Return the nodes of a serialised GraphDef by name; ``ValueError`` for anything else."""
    nodes, size = {}, 0
    try:
        for field, value in _fields(memoryview(data)):
            if field == 1:
                name, node = _node(_message(value))
                nodes[name] = node
                size += 0 if node.value is None else node.value.nbytes
                if size > LARGEST:
                    raise ValueError(
                        f"GraphDef too large: its constants take more than {LARGEST:,} bytes"
                    )
    except (IndexError, TypeError, OverflowError, MemoryError, UnicodeDecodeError) as error:
        raise ValueError(f"not a GraphDef: {error}") from error
    if not nodes:
        raise ValueError("not a GraphDef: it has no nodes")
    return nodes


def _node(data: memoryview) -> tuple[str, Node]:
    name, op, value, switches = "", "", None, {}
    for field, content in _fields(data):
        if field == 1:
            name = str(_message(content), "utf-8")
        elif field == 2:
            op = str(_message(content), "utf-8")
        elif field == 5:  # an entry of the map of attributes: 1 is the key, 2 the AttrValue
            entry = dict(_fields(_message(content)))
            attribute = dict(_fields(_message(entry.get(2, memoryview(b"")))))
            key = str(_message(entry.get(1, memoryview(b""))), "utf-8")
            if 5 in attribute:
                switches[key] = bool(attribute[5])
            elif key == "value" and 8 in attribute:
                value = _tensor(_message(attribute[8]))
    return name, Node(op, value if op == "Const" else None, switches)


def _tensor(data: memoryview) -> np.ndarray | None:
    """Decode a TensorProto: raw bytes, or values of which the last fills the rest of the shape."""
    fields: dict[int, list[int | memoryview]] = {}
    for field, content in _fields(data):
        fields.setdefault(field, []).append(content)
    kind = fields.get(1, [0])[-1]
    if kind not in DTYPES:
        return None  # strings and such
    dtype, listed = np.dtype(DTYPES[kind][0]), DTYPES[kind][1]
    shape = _shape(_message(fields[SHAPE][-1])) if SHAPE in fields else ()
    count = math.prod(shape)
    if CONTENT in fields:
        values = np.frombuffer(_message(fields[CONTENT][-1]), dtype)
    else:
        values = np.concatenate(
            [_values(x, dtype) for x in fields.get(listed, [])] or [np.zeros(min(count, 1), dtype)]
        )
        if len(values) < count <= LARGEST // dtype.itemsize:
            values = np.concatenate([values, np.full(count - len(values), values[-1])])
    if len(values) != count:
        raise ValueError(f"not a GraphDef: a tensor of shape {shape} has {len(values)} values")
    return values.reshape(shape)


def _values(content: int | memoryview, dtype: np.dtype) -> np.ndarray:
    """Return the values of one field of a TensorProto, packed or single, as ``dtype``."""
    if isinstance(content, int):
        words = np.array([content], np.uint64)
    elif dtype.kind == "f" and dtype.itemsize > 2:
        return np.frombuffer(content, dtype)
    else:
        words = np.array(list(_varints(content)), np.uint64)
    if dtype == np.float16:  # its bits, as an integer
        return words.astype(np.uint16).view(dtype)
    if dtype.kind == "f":  # a single value: the bits of a fixed32 or fixed64
        return words.astype(f"<u{dtype.itemsize}").view(dtype)
    # negative integers are written as 64-bit two's complement
    return words.astype(np.int64).astype(dtype)


def _shape(data: memoryview) -> tuple[int, ...]:
    sizes = [
        dict(_fields(_message(content))).get(1, 0) for field, content in _fields(data) if field == 2
    ]
    if any(not 0 <= s < 1 << 31 for s in sizes):
        raise ValueError(f"not a GraphDef: a tensor of shape {sizes}")
    return tuple(sizes)


def _message(content: int | memoryview) -> memoryview:
    if isinstance(content, int):
        raise ValueError("not a GraphDef: a number where a message should be")
    return content


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield number and value of each field: unsigned integers (their bits), or bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        field, kind = key >> 3, key & 7
        if kind == VARINT:
            value, position = _varint(data, position)
            yield field, value
            continue
        if kind == BYTES:
            length, position = _varint(data, position)
        elif kind in (FIXED32, FIXED64):
            length = 4 if kind == FIXED32 else 8
        else:
            raise ValueError(f"not a GraphDef: unknown kind of field {kind}")
        content, position = data[position : position + length], position + length
        if position > len(data):
            raise ValueError("not a GraphDef: it ends within a field")
        yield field, content if kind == BYTES else int.from_bytes(content, "little")


def _varints(data: memoryview) -> Iterator[int]:
    position = 0
    while position < len(data):
        value, position = _varint(data, position)
        yield value


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """Return an integer, stored in 7 bits per byte, lowest first, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, position
    raise ValueError("not a GraphDef: a number of more than 64 bits")
