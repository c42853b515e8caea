"""Sizes, models and epochs for a set of images, a machine and a budget: pure functions.

The budget is divided in this order: starting the programs, codes, samples and metrics as their cost
was measured; of the rest, ``TOKENIZER_SHARE`` to the tokenizer and what remains to the GPT.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from scripts.own_images.images import Images, held_out
from utils.records import build, read_json

MARGIN = 0.93  # share of the budget that is planned: trainers also log, save and load data
TOKENIZER_SHARE = 0.5
DROPOUT, OVERFITTING = 0.1, 2_000  # below so many images a GPT overfits rather than underfits
MOST_EPOCHS = 300  # more passes over the same images only memorise them
# images over all epochs, below which a larger image size is not taken: twice and once those of the
# quickstart
SEEN_BY_TOKENIZER, SEEN_BY_GPT = 8_000, 24_000
NEW_SIZES = {32: "VQ-4", 64: "VQ-4", 128: "VQ-16", 256: "VQ-16"}
DOWNSAMPLE = {"VQ-4": 4, "VQ-16": 16}
CODEBOOK = {"VQ-4": (256, 512), "VQ-16": (256, 4096)}  # least and most entries
CODES_PER_ENTRY = 500
TOKENIZER_LR = {"VQ-4": 2e-3, "VQ-8": 3e-4, "VQ-16": 3e-4}
FINETUNE_LR = 1e-4


class Needs(NamedTuple):
    """Learning rate of a GPT, and what it needs: training images, images seen over all epochs."""

    lr: float
    images: int
    seen: int


GPTS = {
    "GPT-T": Needs(2e-3, 0, 0),
    "GPT-S": Needs(1e-3, 2_000, 150_000),
    "GPT-B": Needs(3e-4, 20_000, 1_000_000),
    "GPT-L": Needs(2e-4, 200_000, 5_000_000),
}
CLASSIFIER_BYTES = 2 << 30  # its training images are held in memory


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
    dropout: float
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
    def train_gpt(self, name: str, grid: int, codebook: int, n: int, dropout: float) -> float: ...
    def train_classifier(self, size: int) -> float: ...
    def inception(self, size: int) -> float: ...


def power_of_two(value: float, least: int, most: int) -> int:
    """Return the largest power of two up to ``value``, but at least and at most the others."""
    return max(least, min(most, 2 ** int(math.log2(max(value, 1)))))


def codebook_size(name: str, images: int, grid: int) -> int:
    """Return the number of entries for so many images of grid x grid codes.

    k-means needs a latent per entry in an epoch, which may drop up to half of the images.
    """
    least, most = CODEBOOK[name]
    codes = images * grid * grid
    return power_of_two(min(max(codes / CODES_PER_ENTRY, least), codes / 2), 1, most)


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
        size, tokenizer = family[0]
        best = plan = fit(options, images, machine, size, tokenizer, inception)
        for size, tokenizer in family[1:]:
            if not plan.seen(4):
                break
            plan = fit(options, images, machine, size, tokenizer, inception)
            best = plan if plan.seen() else best
        if best.seen():
            break
    return best


class Costs(NamedTuple):
    """Seconds per image on a machine, at one image size and with one tokenizer."""

    read: float
    tokenizer: float  # of its training, with reading; 0 where it is used as it is
    encode: float
    decode: float
    gpt: float  # of the training of the smallest GPT

    @property
    def sample(self) -> float:
        """Seconds to generate and decode one image."""
        return 3 * self.gpt + self.decode


def measure_costs(
    images: Images,
    machine: Speeds,
    size: int,
    vq: Tokenizer,
    train_tokenizer: bool,
    shape: tuple[int, int, int, float],
) -> Costs:
    """Return the costs of one image; shape: grid, codebook size, n and dropout of the GPT."""
    read = images.seconds / machine.cores
    tokenizer = machine.train_tokenizer(vq, size) + read if train_tokenizer else 0.0
    encode, decode = machine.code(vq, size)
    return Costs(read, tokenizer, encode, decode, machine.train_gpt("GPT-T", *shape))


def metrics_network(
    machine: Speeds, size: int, used: int, held: int, read: float, work: float, inception: bool
) -> tuple[int, float]:
    """Return the epochs of the classifier (0: Inception is there), and seconds with its use."""
    if inception:
        return 0, 3 * held * machine.inception(size)
    epoch = used * machine.train_classifier(size)
    epochs = max(2, min(60, int(0.05 * work / epoch)))
    return epochs, epochs * epoch + used * read


def fit(
    options: Options, images: Images, machine: Speeds, size: int, vq: Tokenizer, inception: bool
) -> Plan:
    """Return the plan for one image size and tokenizer: divide the budget, see the top."""
    if size % (2 * vq.downsample) or size < 4 * vq.downsample:
        raise ValueError(
            f"--size {size} must be a multiple of {2 * vq.downsample} and at least "
            f"{4 * vq.downsample}, for {vq.downsample}x{vq.downsample} pixels per code"
        )
    held, grid = sum(held_out(images.counts).values()), size // vq.downsample
    n = 4 if grid < 32 else 16
    dropout = DROPOUT if sum(images.counts.values()) < OVERFITTING else 0.0
    shape = (grid, vq.codebook, n, dropout)  # of a GPT, as far as its cost depends on it
    budget, overhead = MARGIN * 60 * options.budget, machine.overhead()
    work = max(0.0, budget - overhead)
    share = TOKENIZER_SHARE if vq.path is None or options.finetune else 0.0
    cost = measure_costs(images, machine, size, vq, bool(share), shape)
    most, used = training_images(images, size, share * work, (1 - share) * work, cost)

    # codes, samples, metrics
    crops = 2 if options.flip else 1
    ten_crop = 5 * used * crops * cost.encode <= 0.1 * work
    samples = max(4, min(held, int(0.1 * work / cost.sample)))
    classifier_epochs, network = metrics_network(
        machine, size, used, held, cost.read, work, inception
    )
    seconds = {
        "programs and planning": overhead,
        "tokenizer": 0.0,
        "codes": used * ((5 if ten_crop else 1) * crops * cost.encode + cost.read),
        "GPT": 0.0,
        "samples": 2 * samples * cost.sample,  # as many again for the picture
        "metrics": network + held * (cost.encode + cost.decode + 2 * cost.read),
    }

    # the two trainings
    rest = max(0.0, budget - sum(seconds.values()))
    vq_epochs = epochs_within(share * rest, used * cost.tokenizer) if share else 0
    seconds["tokenizer"] = vq_epochs * used * cost.tokenizer
    rest = max(0.0, rest - seconds["tokenizer"])
    gpt, per_image = choose_gpt(machine, used, rest, cost.gpt, shape)
    gpt_epochs = epochs_within(rest, used * per_image)
    seconds["GPT"] = gpt_epochs * used * per_image

    return Plan(
        options=options,
        images=images,
        size=size,
        tokenizer=vq,
        perceptual=machine.perceptual,
        most=most,
        used=used,
        held=held,
        n=n,
        tokenizer_epochs=vq_epochs,
        tokenizer_batch=batch_size(vq_epochs * used / 1500, machine.vq_batch, used),
        ten_crop=ten_crop,
        gpt=gpt,
        gpt_epochs=gpt_epochs,
        gpt_batch=batch_size(gpt_epochs * used / 3000, machine.gpt_batch, used),
        dropout=dropout,
        samples=samples,
        classifier_epochs=classifier_epochs,
        read=cost.read / cost.tokenizer if share else 0.0,
        seconds=seconds,
    )


def training_images(
    images: Images, size: int, for_tokenizer: float, for_gpt: float, cost: Costs
) -> tuple[int, int]:
    """Return how many images are trained on, per class at most and in all.

    At most so many that three quarters of the seconds go once through the tokenizer and four times
    through the GPT, and that the classifier's training images fit in memory.
    """
    limits = [0.75 * for_gpt / cost.gpt / 4, CLASSIFIER_BYTES / (3 * size * size)]
    limits += [0.75 * for_tokenizer / cost.tokenizer] if cost.tokenizer else []
    most = max(2, int(min(limits) / len(images.counts)))
    held = held_out(images.counts)
    return most, sum(min(n - 2 * held[c], most) for c, n in images.counts.items())


def epochs_within(seconds: float, seconds_per_epoch: float) -> int:
    """Return the number of epochs that fit, at least 1 and at most ``MOST_EPOCHS``."""
    return max(1, min(MOST_EPOCHS, int(seconds / seconds_per_epoch)))


def choose_gpt(
    machine: Speeds, used: int, seconds: float, per_image: float, shape: tuple[int, int, int, float]
) -> tuple[str, float]:
    """Return the largest GPT that sees enough in ``seconds``, and its seconds per image.

    per_image: those of the smallest. The next size costs about four times as much as the last; it
    is measured only where that may fit.
    """
    chosen, *larger = GPTS
    for name in larger:
        needs = GPTS[name]
        if used < needs.images or seconds / per_image / 3 < needs.seen:
            break
        cost = machine.train_gpt(name, *shape)
        if seconds / cost < needs.seen:
            break
        chosen, per_image = name, cost
    return chosen, per_image


def batch_size(wanted: float, least: int, images: int) -> int:
    """Return a power of two near ``wanted``, from the measured batch on, but no more than the
    images."""
    return power_of_two(images, 1, power_of_two(wanted, least, 16 * least))


def load_plan(path: Path) -> Plan:
    """Return the plan of a plan.json; ``ValueError`` if it is damaged or of another version.

    Its values become words of commands, so each must be of its type.
    """
    parts = {"options": Options, "images": Images, "tokenizer": Tokenizer}
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError("it holds no plan")
        for name, kind in parts.items():
            values[name] = build(kind, values.get(name), name, least=0)
        plan = build(Plan, values, "plan", least=0)
        if plan.gpt not in GPTS or plan.tokenizer.name not in TOKENIZER_LR:
            raise ValueError(f"no model is a {plan.gpt} or a {plan.tokenizer.name}")
        return plan
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged or of another version of this script ({error}); give another folder"
        ) from error
