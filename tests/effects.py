"""Every option has an effect: a table of them per training command, and one runner for all tables.

The command runs in this process with the option and, once for all options of a context, without.
What the table names must differ between both runs.
"""

from __future__ import annotations

import ast
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.helpers import ROOT, quietly
from utils.checkpoints.weights_file import state_sha256


@dataclass(frozen=True)
class Effect:
    """What one option changes.

    value: of the option; None: it takes none; False: it is written --no-OPTION. changes: ``files``
    (names of all that is written), ``printed`` (lines that match ``Command.printed``), ``metrics``
    (validation losses), a name in ``Command.recorded``, or a part of a checkpoint: ``model``,
    ``ema``, ... context: options of both runs, separated by spaces.

    value and context may hold names of ``Command.places`` in braces; {place} is the
    run's own folder.
    """

    value: object
    changes: str
    context: str = ""


# options of utils/training/options.py that change the same things in every trainer
SHARED_EFFECTS = {
    "mixed_precision": Effect("bf16", "model"),
    "weight_decay": Effect(0.9, "model"),
    "beta1": Effect(0.5, "model"),
    "beta2": Effect(0.5, "model"),
    "max_grad_norm": Effect(1e-3, "model"),
    "gradient_accumulation_steps": Effect(3, "printed"),
    "ema": Effect(None, "ema"),
    "ema_decay": Effect(0.01, "ema", "--ema"),
    "max_loss_spike": Effect(0, "guard"),
    "global_seed": Effect(1, "model"),
    "log_every": Effect(1, "printed"),
    "max_steps": Effect(2, "files"),
    "ckpt_every": Effect(1, "files"),
    "dry_run": Effect(None, "files"),
}


@dataclass(frozen=True)
class Recorded:
    """A function whose calls count: ``owner.name``; with ``skip`` it is recorded and not called."""

    owner: object
    name: str
    skip: bool = False


@dataclass(frozen=True)
class Outcome:
    """What one run left."""

    place: Path
    printed: str
    calls: dict[str, list[str]]


@dataclass
class Command:
    """A training command. weights: (folder of the run, part of a checkpoint) -> tensors."""

    main: Callable[[], None]
    base: tuple[object, ...]
    places: Mapping[str, Path]
    scratch: Path
    printed: str
    weights: Callable[[Path, str], Mapping]
    recorded: dict[str, Recorded] = field(default_factory=dict)
    without: dict[str, Outcome] = field(default_factory=dict)  # runs without the option, by context

    def run(self, place: Path, words: list[object], capfd, monkeypatch) -> Outcome:
        """Run the command with ``words`` after its base, recording calls."""
        calls = defaultdict(list)

        def record(what: str, real: Callable, skip: bool, *args: object, **named: object) -> object:
            simple = [a for a in (*args, *named.values()) if isinstance(a, (int, float, str))]
            calls[what].append(str(simple))
            return None if skip else real(*args, **named)

        with monkeypatch.context() as patch:
            for what, target in self.recorded.items():
                # a function, and no partial, as methods are bound to their object
                call = partial(record, what, getattr(target.owner, target.name), target.skip)
                patch.setattr(
                    target.owner,
                    target.name,
                    lambda *args, _call=call, **named: _call(*args, **named),
                )
            words = [str(w).format(**self.places, place=place) for w in (*self.base, *words)]
            return Outcome(place, quietly(capfd, monkeypatch, *words, main=self.main), dict(calls))

    def look(self, outcome: Outcome, changes: str) -> object:
        """Return the part of ``outcome`` that ``changes`` names."""
        if changes == "files":
            return sorted(str(p.relative_to(outcome.place)) for p in outcome.place.rglob("*"))
        if changes == "printed":
            return re.findall(self.printed, outcome.printed.replace(str(outcome.place), ""))
        if changes == "metrics":
            lines = next(outcome.place.rglob("*.jsonl")).read_text().splitlines()
            return [json.loads(line).get("val/loss") for line in lines]
        if changes in self.recorded:
            return outcome.calls.get(changes)
        return state_sha256(self.weights(outcome.place, changes))

    def has_effect(self, option: str, effect: Effect, place: Path, capfd, monkeypatch) -> bool:
        """Return whether ``option`` changes what ``effect`` names, in a run at ``place``."""
        context = effect.context.split()
        if effect.context not in self.without:
            folder = self.scratch / f"without{len(self.without)}"
            self.without[effect.context] = self.run(folder, context, capfd, monkeypatch)
        flag = option.replace("_", "-")
        words = [f"--no-{flag}"] if effect.value is False else [f"--{flag}"]
        if effect.value is not None and effect.value is not False:
            words.append(effect.value)
        outcome = self.run(place, [*context, *words], capfd, monkeypatch)
        return self.look(outcome, effect.changes) != self.look(
            self.without[effect.context], effect.changes
        )


def options_of(*paths: str) -> set[str]:
    """Return the names of the options that files of the repository declare."""
    return set().union(*(declared_options(ROOT / path) for path in paths))


def is_declaration(node: ast.AST) -> bool:
    """Return whether ``node`` is a call of ``add_argument``."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "add_argument"
    )


def declared_options(path: Path) -> set[str]:
    """Return the destinations of every add_argument of a file; retired options are left out."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if is_declaration(node):
            flags = [a.value for a in node.args if isinstance(a, ast.Constant)]
            long = [f for f in flags if f.startswith("--")] or flags
            names |= {f.lstrip("-").replace("-", "_") for f in long[:1]}
    return names
