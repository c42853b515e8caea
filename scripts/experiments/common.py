"""What the experiments share: the ordinary commands, and files."""

from __future__ import annotations

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


def extract(vq: Path, images: Path, output: Path, *crops: object) -> Path:
    """Extract codes, by default of five crops, unless that is done; return their folder."""
    if not (output / "meta.json").exists():
        run(
            *("bash", "scripts/autoregressive/extract_codes_c2i.sh", "--vq-ckpt", vq),
            *("--data-path", images, "--code-path", output, "--image-size", 32, "--ten-crop"),
            *(crops or ("--no-flip",)),
            *("--batch-size", 100, "--num-workers", 0),
        )
    return output


def save_figure(figure: object, path: Path) -> None:
    """Write a matplotlib figure as PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
