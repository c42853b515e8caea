"""A machine with known costs, and plans for it."""

from __future__ import annotations

from dataclasses import replace

from scripts.own_images.choices import GPTS, Options, Plan, Tokenizer, choose
from scripts.own_images.images import Images


class FakeMachine:
    """Costs in proportion to pixels, codes and parameters; ``speed`` 1 is about two old cores."""

    cores, vq_batch, gpt_batch, perceptual = 2, 8, 16, False

    def __init__(self, speed: float = 1.0) -> None:
        self.speed = speed

    def overhead(self) -> float:
        return 60.0

    def train_tokenizer(self, vq: Tokenizer, size: int) -> float:
        return (0.017 if vq.name == "VQ-4" else 0.3) * (size / 32) ** 2 / self.speed

    def code(self, vq: Tokenizer, size: int) -> tuple[float, float]:
        return self.train_tokenizer(vq, size) / 10, self.train_tokenizer(vq, size) / 8

    def train_gpt(self, name: str, grid: int, codebook: int, n: int, dropout: float) -> float:
        return 0.008 * 4.0 ** list(GPTS).index(name) * (grid / 8) ** 2 / self.speed

    def train_classifier(self, size: int) -> float:
        return 0.001 * (size / 32) ** 2 / self.speed

    def inception(self, size: int) -> float:
        return 0.05 / self.speed


def found(per_class: int = 500, classes: int = 10, side: int = 32, unreadable: int = 0) -> Images:
    counts = {f"class {i:02d}": per_class for i in range(classes)}
    broken = [f"class 00/{i}.jpg" for i in range(unreadable)]
    return Images(counts, [side] * 11, 1e-4, broken)


def plan_of(
    images: Images, budget: float = 20, speed: float = 1.0, file: Tokenizer | None = None, **changes
) -> Plan:
    options = Options("/data/x", "/data/out", None, budget, None, False, True, 0)
    options = replace(options, **changes)
    return choose(options, images, FakeMachine(speed), file, inception=False)
