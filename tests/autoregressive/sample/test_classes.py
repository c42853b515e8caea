"""Classes by number and name."""

import pytest

from autoregressive.sample.classes import find_classes

NAMES = [
    "tench, Tinca tinca",
    "golden retriever",
    "hen",
    "flat-coated retriever",
    "hen-of-the-woods, hen of the woods",
]


@pytest.mark.parametrize(
    "words, expected",
    [
        (["0", "3"], [0, 3]),
        (["0, 3 2", "1"], [0, 3, 2, 1]),
        (["golden", "retriever,", "0"], [1, 0]),
        (["Tinca Tinca, hen"], [0, 2]),  # a whole name goes before parts of others
        (["golden"], [1]),
    ],
)
def test_classes_are_found_by_id_and_name(words, expected):
    assert find_classes(words, NAMES) == expected


@pytest.mark.parametrize(
    "words, message",
    [
        (["5"], "--classes 5: the checkpoint has classes 0 to 4"),
        (["retriever"], r"which of 1 \(golden retriever\), 3 \(flat-coated retriever\)\?"),
        (["unicorn"], "--classes unicorn: the checkpoint has no class of this name"),
        (["golden retreiver"], "no class of this name; near it: golden retriever"),
        (["-1"], "--classes -1: the checkpoint has no class"),
        ([""], "--classes names no class"),
    ],
)
def test_classes_that_are_not_there(words, message):
    with pytest.raises(ValueError, match=message):
        find_classes(words, NAMES)
