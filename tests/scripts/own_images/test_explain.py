"""Warnings of own_images.sh."""

from __future__ import annotations

import re
from dataclasses import replace

from scripts.own_images.explain import warnings
from tests.scripts.own_images.helpers import found, plan_of


def test_warnings_name_what_goes_wrong():
    text = "\n".join(warnings(plan_of(found(30, side=20, unreadable=2), 2)))
    for part in (
        "2 unreadable files",
        "fewer than 100 images",
        "sorted names",
        "mirrored",
        "enlarged",
    ):
        assert part in text
    assert "2 minutes are too few for anything to be learned" in text
    assert "the metrics are rough" in "\n".join(warnings(plan_of(found(30, classes=2))))
    assert "shortest possible run" in "\n".join(warnings(plan_of(found(30), 0.5)))
    fine = "\n".join(warnings(plan_of(found(), 20, flip=False)))
    assert not re.search("mirrored|too few for|enlarged|unreadable|fewer|rough", fine)
    numbered = replace(found(), counts={str(i): 500 for i in sorted(range(11), key=str)})
    assert "sorted as text" in "\n".join(warnings(plan_of(numbered)))
    many = plan_of(found(100_000))
    assert any("has no room for more" in line for line in warnings(many))
    slow = replace(found(), seconds=0.5)
    assert any("reading the files takes" in line for line in warnings(plan_of(slow)))
