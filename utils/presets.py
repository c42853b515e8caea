"""Released models by name: where each file is kept, the options of its published samples and their
published metrics.

Sources: PAR (arXiv 2412.15119) table 1 and README; LlamaGen (arXiv 2406.06525) README and
GETTING_STARTED.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRETRAINED_MODELS = Path(__file__).resolve().parents[1] / "pretrained_models"

PAR = "Epiphqny/PAR"
LLAMAGEN = "FoundationVision/LlamaGen"
TOKENIZER = "vq_ds16_c2i.pt"
# the spread of seeds, precisions and versions that one can expect of 50,000 images; a judgement
TOLERANCE = {"fid": 0.1, "inception_score": 5.0}


@dataclass(frozen=True)
class Preset:
    """One released GPT; its samples are 256x256, drawn from all tokens at temperature 1."""

    repo: str  # on huggingface.co
    file: str
    gpt_model: str
    n: int  # tokens per step
    image_size: int  # pixels, as trained
    cfg_scale: float
    fid: float  # published, of 50,000 samples
    inception_score: float | None = None  # published; None where its authors' pages have none

    @property
    def published(self) -> dict[str, float]:
        """The published metrics by their names in the evaluator."""
        values = {"fid": self.fid, "inception_score": self.inception_score}
        return {name: value for name, value in values.items() if value is not None}

    def options(self) -> dict[str, Any]:
        """Return the samplers' options that made the published samples."""
        return dict(
            gpt_ckpt=_shown(PRETRAINED_MODELS / self.file),
            vq_ckpt=_shown(PRETRAINED_MODELS / TOKENIZER),
            gpt_model=self.gpt_model,
            ar_token_num=self.n,
            image_size=self.image_size,
            image_size_eval=256,
            cfg_scale=self.cfg_scale,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
        )


# name                       home      file              size       n  pixels  CFG    FID   IS
PRESETS: dict[str, Preset] = {
    "PAR-XL-4x":      Preset(PAR,      "PAR-XL-4x.pt",    "GPT-XL",  4,  384, 1.5,   2.61, 259.2),
    "PAR-XXL-4x":     Preset(PAR,      "PAR-XXL-4x.pt",   "GPT-XXL", 4,  384, 1.435, 2.35, 263.2),
    "PAR-3B-4x":      Preset(PAR,      "PAR-3B-4x.pt",    "GPT-3B",  4,  384, 1.345, 2.29, 255.5),
    "PAR-3B-16x":     Preset(PAR,      "PAR-3B-16x.pt",   "GPT-3B",  16, 384, 1.5,   2.88, 262.5),
    "LlamaGen-B-256": Preset(LLAMAGEN, "c2i_B_256.pt",    "GPT-B",   1,  256, 2.0,   5.46),
    "LlamaGen-L-256": Preset(LLAMAGEN, "c2i_L_256.pt",    "GPT-L",   1,  256, 2.0,   3.80),
    "LlamaGen-B":     Preset(LLAMAGEN, "c2i_B_384.pt",    "GPT-B",   1,  384, 2.0,   6.09),
    "LlamaGen-L":     Preset(LLAMAGEN, "c2i_L_384.pt",    "GPT-L",   1,  384, 2.0,   3.07),
    "LlamaGen-XL":    Preset(LLAMAGEN, "c2i_XL_384.pt",   "GPT-XL",  1,  384, 1.75,  2.62),
    "LlamaGen-XXL":   Preset(LLAMAGEN, "c2i_XXL_384.pt",  "GPT-XXL", 1,  384, 1.75,  2.34),
    "LlamaGen-3B":    Preset(LLAMAGEN, "c2i_3B_384.pt",   "GPT-3B",  1,  384, 1.65,  2.18),
}  # fmt: skip


@dataclass(frozen=True)
class SmallPreset:
    """A small model trained here, whose weights are in the repository: made for playing."""

    gpt: str  # folder in pretrained_models/small
    tokenizer: str
    gpt_model: str
    n: int
    image_size: int
    cfg_scale: float
    top_p: float

    def options(self) -> dict[str, Any]:
        """Return the samplers' options for it."""
        small = PRETRAINED_MODELS / "small"
        return dict(
            gpt_ckpt=_shown(small / self.gpt),
            vq_ckpt=_shown(small / self.tokenizer),
            gpt_model=self.gpt_model,
            ar_token_num=self.n,
            image_size=self.image_size,
            image_size_eval=self.image_size,
            cfg_scale=self.cfg_scale,
            temperature=1.0,
            top_k=0,
            top_p=self.top_p,
        )


SMALL_PRESETS: dict[str, SmallPreset] = {
    "digits-4x": SmallPreset("digits-4x", "digits-tokenizer", "GPT-T", 4, 32, 2.5, 0.6),
    "digits-1x": SmallPreset("digits-1x", "digits-tokenizer", "GPT-T", 1, 32, 2.5, 0.6),
    "cifar10-4x": SmallPreset("cifar10-4x", "cifar10-tokenizer", "GPT-T", 4, 32, 3.0, 0.9),
    "cifar10-1x": SmallPreset("cifar10-1x", "cifar10-tokenizer", "GPT-T", 1, 32, 3.0, 0.9),
}
# file name -> repository
RELEASED_FILES = {p.file: p.repo for p in PRESETS.values()} | {TOKENIZER: LLAMAGEN}


def preset_of(options: Mapping[str, Any]) -> str | None:
    """Return the name of the preset behind a sampler's resolved options: ``--model``, else the
    file name of ``--gpt-ckpt``; None if neither is a released model's.
    """
    if options.get("model") in PRESETS:
        return str(options["model"])
    file = Path(str(options.get("gpt_ckpt"))).name
    return next((name for name, preset in PRESETS.items() if preset.file == file), None)


def _shown(path: Path) -> str:
    """Return ``path`` as in published command lines where the working folder is the root."""
    root = PRETRAINED_MODELS.parent
    return f"./{path.relative_to(root)}" if Path.cwd() == root else str(path)
