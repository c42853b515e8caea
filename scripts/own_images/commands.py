"""The commands of a plan, as they can be typed in the repository's root."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import NamedTuple

from scripts.own_images.choices import FINETUNE_LR, GPTS, TOKENIZER_LR, Plan
from utils.performance import usable_cores

ROOT = Path(__file__).resolve().parents[2]
PICTURE_ROWS, PICTURE_COLUMNS = 20, 12
CFG_SCALE = 3.0  # of models that saw little: less guidance blurs the classes


class Command(NamedTuple):
    """A stage: what it does, the file that shows that it is done, the command line."""

    title: str
    made: str
    line: str


def short(path: str | Path) -> str:
    """Return a path relative to the repository's root if it is below it."""
    return os.path.relpath(path, ROOT) if Path(path).is_relative_to(ROOT) else str(path)


class Files:
    """Where the commands of ``plan`` write, relative to the repository's root or absolute."""

    def __init__(self, plan: Plan) -> None:
        output, vq, size = short(plan.options.output), plan.tokenizer, plan.size
        self.output, self.images, self.codes = output, f"{output}/images", f"{output}/codes"
        run = f"{vq.name}-{size}/checkpoints/{plan.tokenizer_steps:07d}.pt"
        trained = plan.tokenizer_epochs > 0
        self.tokenizer = f"{output}/tokenizer/{run}" if trained else short(vq.path or "")
        run = f"{plan.gpt}-{plan.n}x-{size}/checkpoints/{plan.gpt_steps:07d}.pt"
        self.gpt = f"{output}/gpt/{run}"
        name = f"{vq.name}-{Path(self.tokenizer).stem}-size-{size}"
        self.reconstructions = f"{output}/reconstructions/{name}"
        name = f"{plan.gpt}-{plan.gpt_steps:07d}-size-{size}-size-{size}-{vq.name}-topk-0"
        name += f"-topp-1.0-temperature-1.0-cfg-{CFG_SCALE}-seed-{plan.options.seed}"
        self.samples = f"{output}/samples/{name}"
        self.picture, self.classifier = f"{output}/samples.png", f"{output}/classifier.pt"
        self.reference = f"{output}/reference.npz"


def q(*paths: str) -> str:
    """Return paths as words of a command line."""
    return shlex.join(paths)


def run_options(plan: Plan, steps: int) -> str:
    """Return the options of both trainers that concern log, checkpoints and seed."""
    return (
        f"--no-local-save --log-every {max(1, min(100, steps // 10))} "
        f"--ckpt-every {max(50, steps // 8)} --keep-last 1 --global-seed {plan.options.seed}"
    )


def train_tokenizer(plan: Plan, files: Files) -> str:
    """Return the command that trains or fine-tunes the tokenizer."""
    vq = plan.tokenizer
    model = f"--codebook-size {vq.codebook} --codebook-init kmeans --revive-dead-codes 100"
    rate = TOKENIZER_LR[vq.name]
    if vq.path:
        model, rate = f"--vq-ckpt {q(short(vq.path))} --finetune", FINETUNE_LR
    return (
        f"bash scripts/tokenizer/train_vq.sh --data-path {q(f'{files.images}/train')} "
        f"--cloud-save-path {q(f'{files.output}/tokenizer')} --vq-model {vq.name} {model} "
        f"--image-size {plan.size} --epochs {plan.tokenizer_epochs} --lr {rate} "
        f"--lr-schedule cosine --global-batch-size {plan.tokenizer_batch} "
        f"--perceptual-weight {int(plan.perceptual)} --disc-weight 0 {workers()}{flip(plan)} "
        + run_options(plan, plan.tokenizer_steps)
    )


def train_gpt(plan: Plan, files: Files, folder: str, epochs: int, gpt: str) -> str:
    """Return the command that trains a GPT of the size ``gpt`` on the codes."""
    return (
        f"bash scripts/autoregressive/train_c2i.sh --code-path {q(files.codes)} "
        f"--cloud-save-path {q(folder)} --gpt-model {gpt} --ar-token-num {plan.n} "
        f"--spe-token-num {plan.n - 1} --image-size {plan.size} --epochs {epochs} "
        f"--warmup-epochs {epochs / 10:g} --global-batch-size {plan.gpt_batch} --lr {GPTS[gpt].lr} "
        f"--dropout-p {plan.dropout:g} --attn-dropout-p 0 --token-dropout-p {plan.dropout:g} "
        + run_options(plan, epochs * (plan.used // plan.gpt_batch))
    )


def draw(plan: Plan, files: Files, seed: int, picture: str) -> str:
    """Return the command that draws a picture of samples, a row per class."""
    classes = " ".join(map(str, range(min(PICTURE_ROWS, len(plan.images.counts)))))
    return (
        f"python3 autoregressive/sample/sample_c2i.py --vq-ckpt {q(files.tokenizer)} --gpt-ckpt "
        f"{q(files.gpt)} --classes {classes} --images-per-class {PICTURE_COLUMNS} --top-k 0 "
        f"--cfg-scale {CFG_SCALE} --seed {seed} --output {q(picture)}"
    )


def workers() -> str:
    """Return the option for processes that read images: one core stays for the training."""
    return f"--num-workers {max(1, usable_cores() - 1)}"


def flip(plan: Plan) -> str:
    """Return the option against mirroring, or nothing."""
    return "" if plan.options.flip else " --no-flip"


def commands(plan: Plan) -> list[Command]:
    """Return all stages in order."""
    files, size, seed = Files(plan), plan.size, plan.options.seed
    held_out, grid = f"{files.images}/held-out", size // plan.tokenizer.downsample
    inputs = f"{files.reconstructions}-inputs.npz"
    network, note = "", ""
    if plan.classifier_epochs:
        network = f" --feature-network {q(files.classifier)}"
        note = "; its FID is here the Frechet distance in the classifier's features, not FID"
    crops = " --ten-crop --crop-range 1.1" if plan.ten_crop else ""

    tokenizer = Command(
        f"tokenizer: {size}x{size} images <-> {grid}x{grid} codes",
        files.tokenizer,
        train_tokenizer(plan, files),
    )
    classifier = Command(
        "classifier, the feature network of the metrics",
        files.classifier,
        f"python3 scripts/quickstart/train_classifier.py --data-path {q(f'{files.images}/train')} "
        f"--test-path {q(held_out)} --output {q(files.classifier)} --image-size {size} "
        f"--epochs {plan.classifier_epochs} --global-seed {seed}",
    )
    return [
        *([tokenizer] if plan.tokenizer_epochs else []),
        Command(
            "reconstructions of held-out images",
            f"{files.reconstructions}.npz",
            f"bash scripts/tokenizer/reconstruction_vq.sh --data-path {q(held_out)} --vq-ckpt "
            f"{q(files.tokenizer)} --image-size {size} --image-size-eval {size} {workers()} "
            f"--sample-dir {q(f'{files.output}/reconstructions')}",
        ),
        Command(
            "codes of the training images",
            f"{files.codes}/meta.json",
            f"bash scripts/autoregressive/extract_codes_c2i.sh --vq-ckpt {q(files.tokenizer)} "
            f"--data-path {q(f'{files.images}/train')} --code-path {q(files.codes)} "
            f"--image-size {size}{crops}{flip(plan)} --batch-size 40 {workers()}",
        ),
        Command(
            f"GPT that predicts {plan.n} codes at once",
            files.gpt,
            train_gpt(plan, files, f"{files.output}/gpt", plan.gpt_epochs, plan.gpt),
        ),
        Command(
            "picture of samples, a row per class",
            files.picture,
            draw(plan, files, seed, files.picture),
        ),
        Command(
            f"{plan.samples:,} samples to measure",
            f"{files.samples}.npz",
            f"bash scripts/autoregressive/sample_c2i.sh --vq-ckpt {q(files.tokenizer)} --gpt-ckpt "
            f"{q(files.gpt)} --cfg-scale {CFG_SCALE} --image-size-eval {size} "
            f"--class-protocol balanced --global-seed {seed} --num-fid-samples {plan.samples} "
            f"--per-proc-batch-size {min(100, plan.samples)} "
            f"--sample-dir {q(f'{files.output}/samples')}",
        ),
        *([classifier] if plan.classifier_epochs else []),
        Command(
            "held-out images as reference",
            files.reference,
            f"python3 scripts/images_to_npz.py --data-path {q(f'{files.images}/reference')} "
            f"--image-size {size} --output {q(files.reference)}",
        ),
        Command(
            f"metrics{note}",
            f"{files.samples}.txt",
            "python3 evaluations/c2i/evaluator.py "
            f"{q(files.reference, inputs, f'{files.reconstructions}.npz', f'{files.samples}.npz')}"
            + network,
        ),
    ]
