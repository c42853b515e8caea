"""One check of the doctor in this process; files that belong together."""

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import torch

from autoregressive.models.gpt import GPT, GPT_models, GPTConfig
from scripts.diagnosis.check import OK, Check, Context, Result, run_here
from scripts.diagnosis.models import fill_from_names
from tests.helpers import GOLDEN, ROOT
from tokenizer.vq_model import VQModel, make_vq_config
from utils.checkpoints.weights_file import state_sha256

FILES = ("gpt_ckpt", "vq_ckpt", "code_path", "data_path")
NO_FILES = dict.fromkeys(FILES)
HINT = "do something about it"


def context(golden_folder: Path = GOLDEN[1], work: Path = ROOT, **options: object) -> Context:
    return Context(Namespace(**NO_FILES | {"quick": True} | options), golden_folder, work)


def result_of(function, **options: object) -> Result:
    return run_here(Check("group", "name", function, HINT), context(**options))


def all_is_well(_: Context) -> Result:
    return Result(OK, "well", figures={"seconds": 2.0})


def save_vq(path: Path, another: bool = False) -> str:
    """Write a tokenizer for codes of ``make_plan``, or another one; return its hash."""
    vq = fill_from_names(VQModel(make_vq_config("VQ-4", codebook_size=70)))
    if another:
        torch.nn.init.constant_(vq.quant_conv.bias, 0.5)
    torch.save({"model": vq.state_dict(), "vq_model": "VQ-4", "config": asdict(vq.config)}, path)
    return state_sha256(vq.weights())


def save_gpt(path: Path, tokenizer_sha256: str, **changes: object) -> GPT:
    sizes = GPT_models["GPT-T"] | dict(
        vocab_size=70, num_classes=3, grid_height=2, grid_width=2, ar_token_num=2
    )
    model = fill_from_names(GPT(GPTConfig(**sizes | changes)))
    facts = dict(
        config=asdict(model.config),
        gpt_model="GPT-T",
        tokenizer_sha256=tokenizer_sha256,
        classes=list("abcd"[: model.config.num_classes]),
    )
    torch.save({"model": model.state_dict(), **facts}, path)
    return model
