"""The commands of a plan, as they can be typed in the repository's root."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from scripts.own_images.choices import FINETUNE_LR, GPTS, PICTURE_COLUMNS, PICTURE_ROWS, TOKENIZER_LR, Plan
from utils.performance import usable_cores

ROOT = Path(__file__).resolve().parents[2]
CFG_SCALE, TOP_P = 2.0, 0.9


class Command(NamedTuple):
    """A stage: what it does, the file that shows that it is done, the words of the command."""

    title: str
    made: str
    words: list[str]


def short(path: str | Path) -> str:
    """Return a path relative to the repository's root if it is below it."""
    return os.path.relpath(path, ROOT) if Path(path).is_relative_to(ROOT) else str(path)


class Files:
    """Where the commands of ``plan`` write."""

    def __init__(self, plan: Plan) -> None:
        o, vq = short(plan.options.output), plan.tokenizer
        self.output, self.images, self.codes = o, f"{o}/images", f"{o}/codes"
        trained = f"{o}/tokenizer/{vq.name}-{plan.size}/checkpoints/{plan.tokenizer_steps:07d}.pt"
        self.tokenizer = trained if plan.tokenizer_epochs else short(vq.path or "")
        run = f"{plan.gpt}-{plan.n}x-{plan.size}"
        self.gpt = f"{o}/gpt/{run}/checkpoints/{plan.gpt_steps:07d}.pt"
        stem = Path(self.tokenizer).stem
        self.reconstructions = f"{o}/reconstructions/{vq.name}-{stem}-size-{plan.size}"
        self.samples = (
            f"{o}/samples/{plan.gpt}-{plan.gpt_steps:07d}-size-{plan.size}-size-{plan.size}-{vq.name}-topk-0-"
            f"topp-{TOP_P}-temperature-1.0-cfg-{CFG_SCALE}-seed-{plan.options.seed}"
        )
        self.picture, self.classifier, self.reference = (
            f"{o}/{name}" for name in ("samples.png", "classifier.pt", "reference.npz")
        )


def words(text: str) -> list[str]:
    """Return the words of options that hold no spaces of their own."""
    return text.split()


def train_tokenizer(plan: Plan, files: Files) -> list[str]:
    """Return the command that trains or fine-tunes the tokenizer."""
    vq = plan.tokenizer
    if vq.path:
        model = ["--vq-ckpt", short(vq.path), "--finetune", "--lr", str(FINETUNE_LR)]
    else:
        model = words(f"--codebook-size {vq.codebook} --codebook-init kmeans --revive-dead-codes 100")
        model += ["--lr", str(TOKENIZER_LR[vq.name])]
    return [
        *words("bash scripts/tokenizer/train_vq.sh --data-path"), f"{files.images}/train",
        "--cloud-save-path", f"{files.output}/tokenizer", "--no-local-save", "--vq-model", vq.name, *model,
        *words(f"--image-size {plan.size} --epochs {plan.tokenizer_epochs} --lr-schedule cosine"),
        *words(f"--global-batch-size {plan.tokenizer_batch} --perceptual-weight {int(plan.perceptual)}"),
        *words(f"--disc-weight 0 --num-workers {max(1, usable_cores() - 1)}"),
        *(["--no-flip"] if not plan.options.flip else []),
        *run_options(plan, plan.tokenizer_steps),
    ]  # fmt: skip


def train_gpt(plan: Plan, files: Files, folder: str, epochs: int, size: str = "") -> list[str]:
    """Return the command that trains the GPT, of another size or length if asked."""
    gpt = size or plan.gpt
    # few passes underfit, many overfit
    dropout = 0.1 if epochs >= 50 else 0
    return [
        *words("bash scripts/autoregressive/train_c2i.sh --code-path"), files.codes,
        "--cloud-save-path", folder, "--no-local-save",
        *words(f"--gpt-model {gpt} --ar-token-num {plan.n} --spe-token-num {plan.n - 1} --image-size {plan.size}"),
        *words(f"--epochs {epochs} --warmup-epochs {epochs / 10:g} --global-batch-size {plan.gpt_batch}"),
        *words(f"--lr {GPTS[gpt][0]} --dropout-p {dropout} --attn-dropout-p 0 --token-dropout-p {dropout}"),
        *run_options(plan, epochs * (plan.used // plan.gpt_batch)),
    ]  # fmt: skip


def run_options(plan: Plan, steps: int) -> list[str]:
    """Return the options of both trainers that concern log, checkpoints and seed."""
    text = f"--log-every {max(1, min(100, steps // 10))} --ckpt-every {max(50, steps // 8)} --keep-last 1 "
    return words(text + f"--global-seed {plan.options.seed}")


def draw(plan: Plan, files: Files) -> list[str]:
    """Return the command that draws the picture of samples."""
    classes = map(str, range(min(PICTURE_ROWS, len(plan.images.counts))))
    return [
        *words("python autoregressive/sample/sample_c2i.py --vq-ckpt"), files.tokenizer, "--gpt-ckpt", files.gpt,
        "--classes", *classes, *words(f"--images-per-class {PICTURE_COLUMNS} --top-k 0 --top-p {TOP_P}"),
        *words(f"--cfg-scale {CFG_SCALE} --seed {plan.options.seed} --output"), files.picture,
    ]  # fmt: skip


def commands(plan: Plan) -> list[Command]:
    """Return all stages in order."""
    files, size, flip = Files(plan), plan.size, [] if plan.options.flip else ["--no-flip"]
    seed, workers = f"--global-seed {plan.options.seed}", f"--num-workers {max(1, usable_cores() - 1)}"
    stages = []
    if plan.tokenizer_epochs:
        title = f"tokenizer: {size}x{size} images <-> {size // plan.tokenizer.downsample} x {size // plan.tokenizer.downsample} codes"
        stages.append(Command(title, files.tokenizer, train_tokenizer(plan, files)))
    stages.append(Command("reconstructions of held-out images", f"{files.reconstructions}.npz", [
        *words("bash scripts/tokenizer/reconstruction_vq.sh --data-path"), f"{files.images}/held-out",
        "--vq-ckpt", files.tokenizer, *words(f"--image-size {size} --image-size-eval {size} {workers} --sample-dir"),
        f"{files.output}/reconstructions",
    ]))  # fmt: skip
    stages.append(Command("codes of the training images", f"{files.codes}/meta.json", [
        *words("bash scripts/autoregressive/extract_codes_c2i.sh --vq-ckpt"), files.tokenizer,
        "--data-path", f"{files.images}/train", "--code-path", files.codes, "--image-size", str(size),
        *(["--ten-crop", "--crop-range", "1.1"] if plan.ten_crop else []), *flip,
        *words(f"--batch-size 40 {workers}"),
    ]))  # fmt: skip
    gpt = train_gpt(plan, files, f"{files.output}/gpt", plan.gpt_epochs)
    stages.append(Command(f"GPT that predicts {plan.n} codes at once", files.gpt, gpt))
    stages.append(Command("picture of samples, a row per class", files.picture, draw(plan, files)))
    stages.append(Command(f"{plan.samples:,} samples to measure", f"{files.samples}.npz", [
        *words("bash scripts/autoregressive/sample_c2i.sh --vq-ckpt"), files.tokenizer, "--gpt-ckpt", files.gpt,
        *words(f"--cfg-scale {CFG_SCALE} --top-p {TOP_P} --image-size-eval {size} --class-protocol balanced {seed}"),
        *words(f"--num-fid-samples {plan.samples} --per-proc-batch-size {min(100, plan.samples)} --sample-dir"),
        f"{files.output}/samples",
    ]))  # fmt: skip
    network, note = [], ""
    if plan.classifier_epochs:
        network = ["--feature-network", files.classifier]
        note = "; what it prints as FID is here the Frechet distance in the classifier's features, not FID"
        stages.append(Command("classifier, the feature network of the metrics", files.classifier, [
            *words("python scripts/quickstart/train_classifier.py --data-path"), f"{files.images}/train",
            "--test-path", f"{files.images}/held-out", "--output", files.classifier,
            *words(f"--image-size {size} --epochs {plan.classifier_epochs} {seed}"),
        ]))  # fmt: skip
    stages.append(Command("held-out images as reference", files.reference, [
        *words("python scripts/images_to_npz.py --data-path"), f"{files.images}/reference",
        "--image-size", str(size), "--output", files.reference,
    ]))  # fmt: skip
    stages.append(Command(f"metrics{note}", f"{files.samples}.txt", [
        *words("python evaluations/c2i/evaluator.py"), files.reference, f"{files.reconstructions}-inputs.npz",
        f"{files.reconstructions}.npz", f"{files.samples}.npz", *network,
    ]))  # fmt: skip
    return stages
