"""Names of a model's classes, and the classes that a command line names."""

from __future__ import annotations

import difflib
import re

from autoregressive.sample.pipeline import Pipeline


def class_names(pipeline: Pipeline) -> list[str]:
    """Return a name per class: ImageNet's in words, or those of the folders learned from."""
    names, num_classes = pipeline.classes, pipeline.gpt.config.num_classes
    if names is None or len(names) != num_classes:
        names = None if num_classes == 1000 else [str(i) for i in range(num_classes)]
    if names is not None and not any(re.fullmatch(r"n\d{8}", name) for name in names):
        return names
    # here: it takes a second or two, and other data sets need no names of it
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    wnids = info.label_names()
    known = set(wnids)
    return [info.label_name_to_description(n) if n in known else n for n in names or wnids]


def class_labels(classes: list[int], names: list[str]) -> list[str]:
    """Return "ID NAME" of each class, by its first synonym; ID alone where that is its name."""
    first_names = [name.split(",")[0] for name in names]
    return [f"{i} {first_names[i]}" if first_names[i] != str(i) else str(i) for i in classes]


def find_classes(words: list[str], names: list[str]) -> list[int]:
    """Return the class ids that ``--classes`` lists, as ids or as names between commas.

    Where classes are named by numbers, a number is an id. Raises ``ValueError`` if there is
    no such class.
    """
    found: list[int] = []
    for item in filter(None, map(str.strip, " ".join(words).split(","))):
        if all(part.isdigit() for part in item.split()):
            found += map(int, item.split())
        else:
            found.append(find_name(item, names))
    if not found:
        raise ValueError("--classes names no class")
    if bad := [i for i in found if i >= len(names)]:
        raise ValueError(f"--classes {bad[0]}: the checkpoint has classes 0 to {len(names) - 1}")
    return found


def find_name(name: str, names: list[str]) -> int:
    """Return the class of this name: one of its synonyms, else a part of only one class's name."""
    synonyms = [[s.strip().lower() for s in n.split(",")] for n in names]
    exact = [i for i, s in enumerate(synonyms) if name.lower() in s]
    found = exact or [i for i, n in enumerate(names) if name.lower() in n.lower()]
    if not found:
        near = difflib.get_close_matches(name.lower(), sum(synonyms, []), n=3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ValueError(f"--classes {name}: the checkpoint has no class of this name{hint}")
    if len(found) > 1:
        raise ValueError(
            f"--classes {name}: which of {', '.join(f'{i} ({names[i]})' for i in found[:5])}?"
        )
    return found[0]
