"""The split of the user's images."""

from __future__ import annotations

import os

import pytest

from scripts.own_images import images as folders
from scripts.own_images.images import divide, held_out, list_classes, look, split
from tests.scripts.own_images.helpers import found


def test_held_out_parts():
    assert set(held_out(found(500).counts).values()) == {50}
    assert held_out({"a": 10}) == {"a": 4} and held_out({"a": 4, "b": 1000}) == {"a": 1, "b": 50}
    assert sum(held_out(found(10_000, 100).counts).values()) == 1000
    with pytest.raises(ValueError, match="class b has 3 readable images; at least 4"):
        held_out({"a": 100, "b": 3})
    with pytest.raises(ValueError, match="6 images are too few"):
        held_out({"a": 6})


def test_the_split_is_disjoint_deterministic_and_stable():
    names = [f"a/{i}.png" for i in range(50)]
    parts = divide(names, 5, 1000, seed=0)
    assert sorted(sum(parts.values(), [])) == sorted(names)
    assert parts == divide(names[::-1], 5, 1000, seed=0) != divide(names, 5, 1000, seed=1)
    assert len(divide(names, 5, 7, seed=0)["train"]) == 7


@pytest.mark.parametrize("links", [True, False])
def test_split_links_or_copies(folder, tmp_path, monkeypatch, links):
    if not links:
        for name in ("symlink", "link"):
            monkeypatch.setattr(os, name, lambda *_: (_ for _ in ()).throw(OSError("no links")))
    found = look(folder)
    assert found.counts == {"ape": 8, "bee": 8, "cat": 8} and found.unreadable == ["cat/broken.jpg"]
    assert (found.sides[0], found.sides[-1]) == (36, 36)
    split(folder, tmp_path / "split", found, 3, seed=0)
    files = list((tmp_path / "split").rglob("*.png"))
    assert len(files) == 3 * (2 + 2 + 3) and all(p.is_symlink() == links for p in files)
    assert {p.relative_to(tmp_path / "split").parts[0] for p in files} == set(folders.PARTS)
    for path in files:
        source = folder / path.relative_to(
            tmp_path / "split" / path.relative_to(tmp_path / "split").parts[0]
        )
        assert path.read_bytes() == source.read_bytes()
    originals = [path.relative_to(tmp_path / "split").parts[1:] for path in files]
    assert len(set(originals)) == len(originals)
    assert len(list_classes(folder)["cat"]) == 9
    assert not list(tmp_path.glob("*.tmp-*"))
