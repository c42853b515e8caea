"""What the curves of a training run look like: healthy, or one of the mistakes that were made for
real in ``curves/`` (scripts/experiments/mistakes.py).

The rules compare losses to ln V, the loss of guessing among V codes, and to one another; a test
holds that each stored curve is judged as what it is.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from utils.files import require_file

LEAST_STEPS = 100  # before them every run looks alike


@dataclass(frozen=True)
class Verdict:
    """What a run resembles, the figures that say so, and what to do."""

    name: str
    evidence: str
    advice: str = ""


@dataclass(frozen=True)
class Curves:
    """Curves of a run: (step, value) pairs in order of steps, by name of the figure."""

    values: dict[str, list[tuple[int, float]]]
    vocab_size: int

    def last(self, name: str, share: float = 0.1) -> float:
        """Return the mean over the last ``share`` of the recorded values."""
        kept = [value for _, value in self.values[name]]
        count = max(1, round(share * len(kept)))
        return sum(kept[-count:]) / count

    def at(self, name: str, share: float) -> float:
        """Return the value recorded after ``share`` of the steps."""
        pairs = self.values[name]
        return next(value for step, value in pairs if step >= share * pairs[-1][0])

    @property
    def steps(self) -> int:
        """The last step with a loss."""
        return self.values["loss"][-1][0]

    @property
    def guessing(self) -> float:
        """ln V: the loss of a model that has learned nothing."""
        return math.log(self.vocab_size)


def read_curves(folder: str | Path) -> Curves:
    """Read ``metrics.jsonl`` and ``options.json`` of a run of the GPT; ``ValueError`` if there is
    none in ``folder``. A step that a resumed run recorded again counts once.
    """
    path = require_file(Path(folder) / "metrics.jsonl", "--run", "the folder of a run of train_c2i")
    options = require_file(Path(folder) / "options.json", "--run")
    try:
        vocab_size = int(json.loads(options.read_text())["options"]["vocab_size"])
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        by_name: dict[str, dict[int, float]] = {}
        for line in lines:
            for name, value in line.items():
                by_name.setdefault(name, {})[int(line["step"])] = float(value)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--run: {folder} holds no curves of a GPT's training: {error}") from error
    if not by_name.get("loss"):
        raise ValueError(f"--run: {path} has no loss yet")
    return Curves({k: sorted(v.items()) for k, v in by_name.items()}, vocab_size)


def judge(curves: Curves) -> list[Verdict]:
    """Return what the run resembles; "healthy" if no mistake."""
    if curves.steps < LEAST_STEPS:
        return [Verdict("too short", f"{curves.steps} steps; {LEAST_STEPS} tell more")]
    rules = (unstable, slow, dead_codebook, no_structure, wrong_order, overfitting)
    found = [verdict for rule in rules if (verdict := rule(curves)) is not None]
    if found:
        return found
    text = f"loss {curves.last('loss'):.2f}, {curves.last('loss') / curves.guessing:.0%} of ln V"
    return [Verdict("healthy", text)]


def unstable(curves: Curves) -> Verdict | None:
    """A learning rate that is too high: the loss was above ln V or is far above what it once was,
    or updates are skipped.
    """
    values = [value for _, value in curves.values["loss"]]
    last, lowest, highest = curves.last("loss"), min(values), max(values)
    skipped = curves.last("skipped", 0) if "skipped" in curves.values else 0.0
    calm = highest < 1.1 * curves.guessing and last - lowest < 0.1 * curves.guessing
    if calm and all(map(math.isfinite, values)) and skipped < 0.02 * curves.steps:
        return None
    text = f"loss between {lowest:.2f} and {highest:.2f}, now {last:.2f}; {skipped:.0f} skipped"
    return Verdict("learning rate too high", text, "divide --lr by 3 to 10, or lengthen the warmup")


def slow(curves: Curves) -> Verdict | None:
    """A learning rate that is too low: the loss has hardly left ln V."""
    last = curves.last("loss")
    if last < 0.93 * curves.guessing:
        return None
    text = f"loss {last:.2f} is still near ln V = {curves.guessing:.2f}"
    return Verdict("learning rate too low", text, "multiply --lr by 10, or train for longer")


def dead_codebook(curves: Curves) -> Verdict | None:
    """Codes that are nearly all alike: little is left to learn after a tenth of the steps."""
    early, late = curves.at("loss", 0.1), curves.last("loss")
    if early > 0.35 * curves.guessing:
        return None
    text = f"loss {early:.2f} after a tenth of the steps, {late:.2f} now; ln V = "
    advice = (
        "look at the codes: scripts/inspect_codes.py --code-path CODES; train another tokenizer"
    )
    return Verdict("dead codebook", f"{text}{curves.guessing:.2f}", advice)


def no_structure(curves: Curves) -> Verdict | None:
    """Codes without structure: how often each occurs is learned at once, and nothing else ever."""
    early, late = curves.at("loss", 0.1), curves.last("loss")
    if early - late > 0.015 * curves.guessing or late > 0.93 * curves.guessing:
        return None
    text = f"loss {early:.2f} after a tenth of the steps and {late:.2f} now"
    advice = "decode some: scripts/inspect_codes.py --code-path CODES --vq-ckpt FILE --output a.png"
    return Verdict("wrong codes", text, advice)


def wrong_order(curves: Curves) -> Verdict | None:
    """Codes in another order than raster: the first n are then neighbours, and easier than the
    rest.
    """
    if "val/loss_first" not in curves.values:
        return None
    first, rest = curves.last("val/loss_first"), curves.last("val/loss_rest")
    if first > 0.75 * rest:
        return None
    text = f"held-out loss {first:.2f} of the first n codes, {rest:.2f} of the rest"
    return Verdict("wrong order", text, "codes must be in raster order; the model orders them")


def overfitting(curves: Curves) -> Verdict | None:
    """Images learned by heart: the held-out loss has risen from its lowest, the other falls on."""
    if "val/loss" not in curves.values:
        return None
    values = [value for _, value in curves.values["val/loss"]]
    lowest, last = min(values), values[-1]
    if last < 1.02 * lowest or last < 1.1 * curves.last("loss"):
        return None
    step = next(step for step, value in curves.values["val/loss"] if value == lowest)
    text = f"held-out loss {last:.2f} after {lowest:.2f} at step {step:,}; loss "
    advice = "stop there, use more images, or raise --dropout-p and --token-dropout-p"
    return Verdict("overfitting", f"{text}{curves.last('loss'):.2f}", advice)


def describe_run(folder: str | Path) -> str:
    """Return what the doctor says about a run, in a few lines."""
    curves = read_curves(folder)
    first = curves.values["loss"][0]
    lines = [
        f"{folder}: {curves.steps:,} steps, loss {first[1]:.2f} at step {first[0]:,}, "
        f"{curves.last('loss'):.2f} at the end; ln V = {curves.guessing:.2f}"
    ]
    if "val/loss" in curves.values:
        first_n, rest = (curves.values[f"val/loss_{part}"][-1][1] for part in ("first", "rest"))
        lines.append(
            f"held-out loss {curves.values['val/loss'][-1][1]:.2f}: {first_n:.2f} for the first n "
            f"codes, {rest:.2f} for the rest"
        )
    else:
        lines.append("no held-out loss: overfitting and order cannot be seen (--val-code-path)")
    for verdict in judge(curves):
        lines.append(f"resembles: {verdict.name} ({verdict.evidence})")
        lines += [f"  {verdict.advice}"] if verdict.advice else []
    return "\n".join(lines)
