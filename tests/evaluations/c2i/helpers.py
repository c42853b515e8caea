"""Parts of a TensorFlow graph in its encoding."""

from __future__ import annotations

import numpy as np


def varint(number: int) -> bytes:
    """Return a number in protobuf's encoding."""
    groups = []
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*groups, number])


def field(number: int, content: bytes | int) -> bytes:
    """Return a field of a protobuf message."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def attribute(name: str, value: bytes) -> bytes:
    """Return an attribute of a node of a TensorFlow graph."""
    return field(5, field(1, name.encode()) + field(2, value))


def constant(name: str, value: np.ndarray) -> bytes:
    """Return a float32 constant of a TensorFlow graph."""
    shape = b"".join(field(2, field(1, size)) for size in value.shape)
    tensor = field(1, 1) + field(2, shape) + field(4, value.tobytes())
    return field(
        1, field(1, name.encode()) + field(2, b"Const") + attribute("value", field(8, tensor))
    )
