"""What tests of tokenizer training share: command lines, checkpoints, reviving at once."""

from argparse import Namespace
from pathlib import Path

from torch import Tensor

from tokenizer import train_vq
from utils.checkpoints.folder import read_sharded
from utils.distributed import World

NAME = "VQ-4-24"
NO_GAN = ("--perceptual-weight", 0, "--disc-weight", 0)
GAN = ("--disc-weight", 0.5, "--disc-start", 2)
SMALL = (
    "--vq-model", "VQ-4", "--codebook-size", 64, "--image-size", 24, "--global-batch-size", 8,
    "--lr", 1e-3,
)  # fmt: skip
SMALL += ("--num-workers", 0, "--mixed-precision", "none", "--log-every", 1, "--epochs", 1)


def words(work: Path, cloud: Path, *options: object) -> list[object]:
    """Return the options of a small run into ``cloud``, by default without GAN and LPIPS."""
    return [
        "--data-path", work / "images", "--cloud-save-path", cloud, "--no-local-save", *SMALL,
        *NO_GAN, *options,
    ]  # fmt: skip


def tensors(cloud: Path, step: int) -> dict[str, Tensor]:
    """Return all tensors of the checkpoint at ``step`` of the run in ``cloud``."""
    return read_sharded(cloud / NAME / "checkpoints" / f"{step:07d}", "")


# everything at once: GAN, average, dropout, entropy
LIVELY = (
    *GAN, "--disc-adaptive-weight", "--ema", "--epochs", 2, "--dropout-p", 0.1,
    "--entropy-loss-ratio", 0.1,
)  # fmt: skip


REVIVE = train_vq.revive_dead_codes


def revive_all_but_one(
    args: Namespace, world: World, state: train_vq.VQState, *rest: object
) -> None:
    """The real thing waits for 65,536 codes: here a few are enough to tell the dead."""
    used = state.model.quantize.codebook_used
    window = used.clone()
    used.fill_(3)
    REVIVE(args, world, state, *rest)
    used.copy_(window)
