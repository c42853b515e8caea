"""Facts read from files: sealed JSON, dataclasses of checked values."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from utils.records import build, has_type, read_json, read_sealed, write_sealed


@dataclass(frozen=True)
class Sizes:
    width: int
    levels: tuple[int, ...] = (1, 2)
    names: list[str] | None = None
    rate: float = 0.5


def test_a_sealed_file_is_read_back_and_a_change_is_found(tmp_path):
    path = tmp_path / "meta.json"
    write_sealed(path, {"steps": 3, "path": tmp_path})
    assert read_sealed(path) == {"steps": 3, "path": str(tmp_path)}
    path.write_text(path.read_text().replace("3", "4", 1))
    with pytest.raises(
        ValueError, match=r"meta\.json is missing or damaged: its bytes have changed"
    ):
        read_sealed(path)
    path.write_text('{"steps": 4}')  # of a version that wrote no hash
    assert read_sealed(path) == {"steps": 4}


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, "\udcff"])
def test_text_that_is_not_json_is_an_error_of_one_line(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=r"^[^\n]*a\.json is missing or damaged: [^\n]+$"):
        read_json(path)


def test_values_become_a_dataclass():
    values = json.loads('{"width": 3, "levels": [4], "names": ["a"], "rate": 1}')
    assert build(Sizes, values, "f") == Sizes(3, (4,), ["a"], 1)
    assert build(Sizes, {"width": 3}, "f") == Sizes(3)


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        {},
        {"width": 3, "x": 1},
        *({"width": w} for w in (0, -1, True, 1.5, "3", None, 1 << 31, [3])),
        *({"width": 3, "levels": w} for w in (3, [0], ["1"], None, [True])),
        *({"width": 3, "names": w} for w in ("a", [1], [None], {})),
        *({"width": 3, "rate": w} for w in (-1, float("nan"), float("inf"), "1", True, 10**30)),
    ],
)
def test_wrong_types_and_absurd_sizes_are_named(wrong):
    with pytest.raises(ValueError, match=r"^net\.pt"):
        build(Sizes, wrong, "net.pt")


def test_the_least_whole_number_is_chosen():
    assert has_type(0, int) and not has_type(0, int, least=1)
    assert not has_type([1, 0], list[int], least=1)
