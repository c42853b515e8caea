"""Sizes, models and epochs for a set of images, a machine and a budget: pure functions.

The budget is divided in this order: starting the programs, codes, samples and metrics as their cost
was measured; of the rest, ``TOKENIZER_SHARE`` to the tokenizer and what remains to the GPT.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from scripts.own_images.images import Images, held_out

MARGIN = 0.93  # share of the budget that is planned: trainers also log, save and load data
TOKENIZER_SHARE = 0.4
MOST_EPOCHS = 300  # more passes over the same images only memorise them
SEEN_BY_TOKENIZER, SEEN_BY_GPT = 8_000, 24_000  # images over all epochs: the quickstart's, x2 and x1
LEAST = 0.25  # share of these below which little is learned
NEW_SIZES = {32: "VQ-4", 64: "VQ-4", 128: "VQ-16", 256: "VQ-16"}
DOWNSAMPLE = {"VQ-4": 4, "VQ-16": 16}
CODEBOOK = {"VQ-4": (64, 512), "VQ-16": (64, 4096)}  # least and most entries
CODES_PER_ENTRY = 500
TOKENIZER_LR = {"VQ-4": 2e-3, "VQ-8": 3e-4, "VQ-16": 3e-4}
FINETUNE_LR = 1e-4
# size -> learning rate, images to train on and images seen over all epochs that it needs
GPTS = {
    "GPT-T": (2e-3, 0, 0),
    "GPT-S": (1e-3, 2_000, 150_000),
    "GPT-B": (3e-4, 20_000, 1_000_000),
    "GPT-L": (2e-4, 200_000, 5_000_000),
}
FEW = 100  # images per class
CLASSIFIER_BYTES = 2 << 30  # its training images are held in memory
PICTURE_ROWS, PICTURE_COLUMNS = 20, 12


@dataclass(frozen=True)
class Options:
    """The options of the command line; paths are absolute."""

    folder: str
    output: str
    size: int | None
    budget: float
    tokenizer: str | None
    finetune: bool
    flip: bool
    seed: int


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer: of the file ``path`` or, without one, new of the size ``name``."""

    path: str | None
    name: str
    downsample: int
    codebook: int


@dataclass(frozen=True)
class Plan:
    """All that the commands depend on."""

    options: Options
    images: Images
    size: int
    tokenizer: Tokenizer
    perceptual: bool  # LPIPS in the tokenizer's training
    most: int  # training images per class
    used: int  # training images
    held: int  # images in each held-out part
    n: int
    tokenizer_epochs: int  # 0: it is used as it is
    tokenizer_batch: int
    ten_crop: bool
    gpt: str
    gpt_epochs: int
    gpt_batch: int
    samples: int
    classifier_epochs: int  # 0: Inception's weights are there
    read: float  # share of the tokenizer's training that goes into reading files
    seconds: dict[str, float]  # expected, per stage

    @property
    def tokenizer_steps(self) -> int:
        """Steps of the tokenizer's training."""
        return self.tokenizer_epochs * (self.used // self.tokenizer_batch)

    @property
    def gpt_steps(self) -> int:
        """Steps of the GPT's training."""
        return self.gpt_epochs * (self.used // self.gpt_batch)

    def seen(self, share: float = 1.0) -> bool:
        """Return whether both models see ``share`` of the images that they need."""
        tokenizer = self.tokenizer_epochs * self.used >= share * SEEN_BY_TOKENIZER
        enough = (tokenizer or not self.tokenizer_epochs, self.gpt_epochs >= MOST_EPOCHS)
        return enough[0] and (enough[1] or self.gpt_epochs * self.used >= share * SEEN_BY_GPT)


class Speeds(Protocol):
    """Seconds per image on a machine: ``measure.Machine``."""

    cores: int
    vq_batch: int
    gpt_batch: int
    perceptual: bool

    def overhead(self) -> float: ...
    def train_tokenizer(self, vq: Tokenizer, size: int) -> float: ...
    def code(self, vq: Tokenizer, size: int) -> tuple[float, float]: ...
    def train_gpt(self, name: str, grid: int, codebook: int, n: int) -> float: ...
    def train_classifier(self, size: int) -> float: ...
    def inception(self, size: int) -> float: ...


def power_of_two(value: float, least: int, most: int) -> int:
    """Return the largest power of two up to ``value``, but at least and at most the others."""
    return max(least, min(most, 2 ** int(math.log2(max(value, 1)))))


def codebook_size(name: str, images: int, grid: int) -> int:
    """Return the number of entries for so many images of grid x grid codes."""
    return power_of_two(images * grid * grid / CODES_PER_ENTRY, *CODEBOOK[name])


def choose(
    options: Options, images: Images, machine: Speeds, file: Tokenizer | None, inception: bool
) -> Plan:
    """Return the plan of the largest image size at which both models still see enough images.

    file: the tokenizer to use, or to try first where the user named none. inception: whether the
    weights of the metrics' network are there. The next size, of four times the pixels, is measured
    only where this one has four times what it needs.
    """
    train = sum(images.counts.values()) - 2 * sum(held_out(images.counts).values())
    largest = max(images.sides[1], min(NEW_SIZES))
    families = []
    if file is not None:
        sizes = [options.size] if options.size else [file.downsample * g for g in (8, 16, 24)]
        families.append([(size, file) for size in sizes if size <= largest or size == sizes[0]])
    if options.tokenizer is None:
        sizes = [options.size] if options.size else [s for s in NEW_SIZES if s <= largest]
        names = [NEW_SIZES.get(size, "VQ-4" if size < 128 else "VQ-16") for size in sizes]
        grids = [size // DOWNSAMPLE[name] for size, name in zip(sizes, names, strict=True)]
        new = [
            (size, Tokenizer(None, name, DOWNSAMPLE[name], codebook_size(name, train, grid)))
            for size, name, grid in zip(sizes, names, grids, strict=True)
        ]
        families.append(new)
    for family in families:
        best = None
        for size, tokenizer in family:
            plan = fit(options, images, machine, size, tokenizer, inception)
            best = plan if best is None or plan.seen() else best
            if not plan.seen(4):
                break
        assert best is not None
        if best.seen():
            break
    return best


def fit(
    options: Options, images: Images, machine: Speeds, size: int, vq: Tokenizer, inception: bool
) -> Plan:
    """Return the plan for one image size and tokenizer: divide the budget, see the top."""
    if size % (2 * vq.downsample) or size < 4 * vq.downsample:
        raise ValueError(
            f"--size {size} must be a multiple of {2 * vq.downsample} and at least "
            f"{4 * vq.downsample}, for {vq.downsample}x{vq.downsample} pixels per code"
        )
    held = held_out(images.counts)
    grid, n = size // vq.downsample, 4 if size // vq.downsample < 32 else 16
    work = max(0.0, MARGIN * 60 * options.budget - machine.overhead())
    read = images.seconds / machine.cores
    trains = vq.path is None or options.finetune
    share = TOKENIZER_SHARE if trains else 0.0
    per_vq = machine.train_tokenizer(vq, size) + read if trains else math.inf
    encode, decode = machine.code(vq, size)
    tiny = machine.train_gpt("GPT-T", grid, vq.codebook, n)

    # training images: at most so many that the budget goes once through the tokenizer, four times
    # through the GPT
    seen = [0.75 * work * (1 - share) / tiny / 4, CLASSIFIER_BYTES / (3 * size * size)]
    seen += [0.75 * work * share / per_vq] if trains else []
    most = max(2, int(min(seen) / len(images.counts)))
    used = sum(min(n - 2 * held[c], most) for c, n in images.counts.items())
    total_held = sum(held.values())

    # what is neither training
    crops = 5 * (2 if options.flip else 1)
    ten_crop = used * crops * encode <= 0.1 * work
    crops = crops if ten_crop else crops // 5
    per_sample = 3 * tiny + decode
    samples = max(4, min(total_held, int(0.1 * work / per_sample)))
    drawn = min(len(images.counts), PICTURE_ROWS) * PICTURE_COLUMNS
    epochs, metrics = 0, 3 * total_held * machine.inception(size) if inception else 0.0
    if not inception:
        epoch = used * machine.train_classifier(size)
        epochs = max(2, min(60, int(0.05 * work / epoch)))
        metrics = epochs * epoch + used * read
    seconds = {
        "programs, planning": machine.overhead(),
        "tokenizer": 0.0,
        "reconstructions": total_held * (encode + decode + read),
        "codes": used * (crops * encode + read),
        "GPT": 0.0,
        "samples": (samples + drawn) * per_sample,
        "metrics": metrics + total_held * read,
    }

    # the two trainings
    rest = max(0.0, MARGIN * 60 * options.budget - sum(seconds.values()))
    vq_epochs = max(1, min(MOST_EPOCHS, int(share * rest / per_vq / used))) if trains else 0
    seconds["tokenizer"] = vq_epochs * used * per_vq if trains else 0.0
    rest = max(0.0, rest - seconds["tokenizer"])
    gpt, per_gpt = "GPT-T", tiny
    for name, (_, least_images, least_seen) in list(GPTS.items())[1:]:
        # the next size costs about four times as much; it is measured only where that may fit
        if used < least_images or rest / per_gpt / 3 < least_seen:
            break
        cost = machine.train_gpt(name, grid, vq.codebook, n)
        if rest / cost < least_seen:
            break
        gpt, per_gpt = name, cost
    gpt_epochs = max(1, min(MOST_EPOCHS, int(rest / per_gpt / used)))
    seconds["GPT"] = gpt_epochs * used * per_gpt

    return Plan(
        options=options,
        images=images,
        size=size,
        tokenizer=vq,
        perceptual=machine.perceptual,
        most=most,
        used=used,
        held=total_held,
        n=n,
        tokenizer_epochs=vq_epochs,
        tokenizer_batch=batch_size(vq_epochs * used / 1500, machine.vq_batch, used),
        ten_crop=ten_crop,
        gpt=gpt,
        gpt_epochs=gpt_epochs,
        gpt_batch=batch_size(gpt_epochs * used / 3000, machine.gpt_batch, used),
        samples=samples,
        classifier_epochs=epochs,
        read=read / per_vq if trains else 0.0,
        seconds=seconds,
    )


def batch_size(wanted: float, least: int, images: int) -> int:
    """Return a power of two near ``wanted``, from the measured batch on, but no more than the
    images."""
    return power_of_two(images, 1, power_of_two(wanted, least, 16 * least))


def describe(plan: Plan) -> list[str]:
    """Return the choices and their reasons, a line each."""
    images, vq, options = plan.images, plan.tokenizer, plan.options
    counts = images.counts.values()
    total = sum(plan.seconds.values())
    grid = plan.size // vq.downsample
    origin = vq.path or f"new {vq.name}"
    training = f"{plan.tokenizer_epochs} epochs, {plan.tokenizer_steps:,} steps of {plan.tokenizer_batch}"
    shares = ", ".join(f"{name} {s / 60:.1f}" for name, s in plan.seconds.items())
    network = (
        f"a small classifier trained here ({plan.classifier_epochs} epochs): no Inception weights in pretrained_models/"
        if plan.classifier_epochs
        else "Inception"
    )
    return [
        f"images     {sum(counts):,} of {len(counts)} classes ({min(counts)} to {max(counts)} each), "
        f"shorter side {images.sides[0]} to {images.sides[-1]} pixels, {len(images.unreadable)} unreadable",
        f"split      {plan.used:,} to train on, {plan.held:,} held out as reference, {plan.held:,} held out as yardstick",
        f"size       {plan.size}x{plan.size}: the largest at which both models see enough images in the budget"
        if options.size is None
        else f"size       {plan.size}x{plan.size}, as asked",
        f"tokenizer  {origin}, {vq.codebook} entries, {grid}x{grid} codes; "
        + (training if plan.tokenizer_epochs else "used as it is"),
        f"GPT        {plan.gpt}, n = {plan.n}; {plan.gpt_epochs} epochs, {plan.gpt_steps:,} steps of {plan.gpt_batch}"
        + (", no more as they would memorise the images" if plan.gpt_epochs == MOST_EPOCHS else ""),
        f"metrics    {plan.samples:,} samples; features of {network}",
        f"minutes    {total / 60:.1f} of {options.budget:g} expected: {shares}",
    ]


def warnings(plan: Plan) -> list[str]:
    """Return what may go wrong with these images and this budget, a sentence each."""
    images, names, found = plan.images, list(plan.images.counts), []
    if images.unreadable:
        found.append(f"{len(images.unreadable)} files are unreadable and left out, such as {images.unreadable[0]}")
    if few := [c for c, n in images.counts.items() if n < FEW]:
        found.append(
            f"{len(few)} of {len(names)} classes have fewer than {FEW} images, such as {few[0]} "
            f"({images.counts[few[0]]}): the GPT will partly repeat them"
        )
    ids = ", ".join(f"{i} {name}" for i, name in enumerate(names[:4])) + (", ..." if len(names) > 4 else "")
    numbers = all(re.fullmatch(r"\d+", name) for name in names)
    disorder = numbers and sorted(names, key=int) != names
    found.append(
        f"class ids follow the sorted names of the folders ({ids}), not ImageNet's order: a GPT trained on ImageNet "
        "needs its 1,000 folders, or a new class table"
        + ("; they are sorted as text, so that ids differ from these numbers" if disorder else "")
    )
    if plan.options.flip:
        found.append(
            "images are mirrored in training; text, digits and all that has a left and a right must not be: --no-flip"
        )
    if smaller := sum(side < plan.size for side in images.sides[:-1]):
        found.append(f"about {10 * smaller}% of the images are smaller than {plan.size} pixels and will be enlarged")
    if (total := sum(images.counts.values()) - 2 * plan.held) > plan.used:
        found.append(
            f"{plan.used:,} of {total:,} training images are used: the budget does not go through more of them"
        )
    if plan.read > 0.3:
        found.append(
            f"reading the files takes {plan.read:.0%} of the tokenizer's training: smaller copies of them train faster"
        )
    if plan.held < 50:
        found.append(f"{plan.held} held-out images: the metrics are rough, look at the pictures")
    if not plan.seen(LEAST):
        found.append(
            f"{plan.options.budget:g} minutes are too few for anything to be learned at {plan.size}x{plan.size} here: "
            "take a larger --budget or a smaller --size"
        )
    if (expected := sum(plan.seconds.values())) > 1.1 * 60 * plan.options.budget:
        found.append(f"the shortest possible run takes about {expected / 60:.1f} minutes, more than the budget")
    return found


def load_plan(values: dict) -> Plan:
    """Return the plan of a plan.json."""
    parts = {"options": Options, "images": Images, "tokenizer": Tokenizer}
    return Plan(**values | {name: make(**values[name]) for name, make in parts.items()})


def default_output(folder: Path, root: Path) -> Path:
    """Return the output folder for images of ``folder``."""
    return root / "results" / "own-images" / folder.name
