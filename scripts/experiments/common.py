"""What the experiments share: the ordinary commands, run on the quickstart's digits."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from utils.files import atomic_path

ROOT = Path(__file__).resolve().parents[2]


def run(*command: object) -> None:
    """Run a command line from the repository's root and print it."""
    words = [str(word) for word in command]
    print("+", " ".join(words), flush=True)
    subprocess.run(words, cwd=ROOT, check=True)


def newest(folder: Path, pattern: str) -> Path:
    """Return the last file of ``pattern``; ``ValueError`` if there is none."""
    found = sorted(folder.glob(pattern))
    if not found:
        raise ValueError(f"{folder} holds no {pattern}; run scripts/quickstart.sh")
    return found[-1]


def extract(vq: Path, images: Path, output: Path) -> Path:
    """Extract codes of five crops, unless that is done; return their folder."""
    if not (output / "meta.json").exists():
        run(
            *("bash", "scripts/autoregressive/extract_codes_c2i.sh", "--vq-ckpt", vq),
            *("--data-path", images, "--code-path", output, "--image-size", 32, "--ten-crop"),
            *("--no-flip", "--batch-size", 100, "--num-workers", 0),
        )
    return output


def train_gpt(
    output: Path, codes: Path, held_out: Path, n: int, epochs: int, *options: object
) -> Path:
    """Train GPT-T with the quickstart's recipe, unless that is done; return the run's folder.

    ``metrics.jsonl`` in it ends with the loss on ``held_out`` codes.
    """
    if not list(output.glob("GPT-T-*/checkpoints/*.pt")):
        run(
            *("bash", "scripts/autoregressive/train_c2i.sh", "--cloud-save-path", output),
            *("--no-local-save", "--code-path", codes, "--val-code-path", held_out),
            *("--val-images", 1000, "--ar-token-num", n, "--spe-token-num", n - 1),
            *("--image-size", 32, "--gpt-model", "GPT-T", "--epochs", epochs, "--lr", 2e-3),
            *("--global-batch-size", 16, "--warmup-epochs", 1, "--dropout-p", 0),
            *("--attn-dropout-p", 0, "--token-dropout-p", 0, *options),
        )
    return newest(output, "GPT-T-*/checkpoints/*.pt").parents[1]


def last_value(folder: Path, name: str) -> float:
    """Return the last value of ``name`` in ``metrics.jsonl`` of the run in ``folder``."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(line[name] for line in reversed(lines) if name in line)


def save_figure(figure: object, path: Path) -> None:
    """Write a matplotlib figure as PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
