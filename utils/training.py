"""What the training loops share: seeds, optimizer, EMA, gradient clipping, where runs and checkpoints stand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from utils.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from utils.distributed import World
from utils.files import prepare_folder, remove_temporary


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one training step, so that a resumed run draws what the uninterrupted one draws."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))


def make_adamw(model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Fused AdamW; weight decay on matrices and convolutions, none on norms and biases."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load moments and step counts, but keep this run's learning rate, weight decay and betas."""
    now = [{k: group[k] for k in ("lr", "weight_decay", "betas")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, options in zip(optimizer.param_groups, now, strict=True):
        group.update(options, initial_lr=options["lr"])


class Ema:
    """Exponential moving average of a module's parameters: average += (1 - decay) (parameter - average).

    The decay grows from 0.1 to ``decay`` as min(decay, (1 + step) / (10 + step)), so that the first weights fade.
    """

    def __init__(self, module: nn.Module, decay: float = 0.9999):
        self.decay = decay
        self.average = {k: p.detach().clone() for k, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the module's parameters after training step ``step``, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), list(module.parameters()), 1.0 - decay)

    def state_dict(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """The averages, with the module's own buffers: a state dict that loads into the module."""
        return module.state_dict() | self.average

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take averages back from a state dict."""
        for name, average in self.average.items():
            average.copy_(state[name])


@dataclass
class TrainingState:
    """What changes as a run trains: saved in its checkpoints and restored from them."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Ema | None

    def checkpoint(self, step: int, **facts: Any) -> dict[str, Any]:
        """A checkpoint after ``step`` steps, with ``facts`` about the run."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "steps": step}
        state["scaler"] = self.scaler.state_dict()
        if self.ema:
            state["ema"] = self.ema.state_dict(self.model)
        return state | facts

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Take a checkpoint's state; a moving average that it lacks starts at its weights."""
        self.model.load_state_dict(checkpoint["model"])
        restore_optimizer(self.optimizer, checkpoint["optimizer"])
        if checkpoint["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint["scaler"])
        if self.ema:
            self.ema.load(checkpoint.get("ema", checkpoint["model"]))


def split_batch(global_batch: int, world_size: int, accumulation: int) -> int:
    """Items of one process's micro-batch; ``ValueError`` if the global batch does not split evenly."""
    if global_batch % (world_size * accumulation):
        raise ValueError(
            f"--global-batch-size {global_batch} does not split over {world_size} processes x "
            f"{accumulation} accumulation steps; take a multiple of {world_size * accumulation}"
        )
    return global_batch // (world_size * accumulation)


def check_finite(values: Iterable[torch.Tensor], step: int, lr: float) -> None:
    """``ValueError`` when a logged loss, or a weight that is about to be saved, is not a finite number."""
    if not all(torch.isfinite(v).all() for v in values):
        raise ValueError(
            f"the loss is not a finite number at or shortly before step {step} (learning rate {lr:.3g}); the last "
            f"checkpoint is from before it: lower --lr, or use --mixed-precision bf16 or none instead of fp16"
        )


@dataclass(frozen=True)
class RunFolder:
    """Where one run writes: logs and options in ``folder``, checkpoints in every one of ``checkpoint_folders``.

    The name is a function of the options, so the same command finds its checkpoints again and resumes.
    """

    folder: Path
    checkpoint_folders: tuple[Path, ...]

    @classmethod
    def of(cls, results_dir: str, cloud_save_path: str, no_local_save: bool, name: str) -> RunFolder:
        """Local results and the durable copy; with ``no_local_save`` the durable place is the only one."""
        cloud = Path(cloud_save_path) / name
        if no_local_save:
            return cls(cloud, (cloud / "checkpoints",))
        folder = Path(results_dir) / name
        folders = dict.fromkeys(p.absolute() for p in (folder / "checkpoints", cloud / "checkpoints"))
        return cls(folder, tuple(folders))

    def resume(self, world: World, state: TrainingState, run: dict[str, Any]) -> int:
        """Restore ``state`` from the newest checkpoint; the steps it has done, 0 without one.

        Rank 0 decides which is the newest, and every rank must find it in one of its folders: they may be local to a
        machine. ``run``: the options that may not change in mid-run, as the checkpoint must have them too.
        """
        newest = newest_checkpoint(*self.checkpoint_folders)
        name = world.broadcast(newest.name if newest else None)
        if name is None:
            return 0
        path = next((folder / name for folder in self.checkpoint_folders if (folder / name).is_file()), None)
        if path is None:
            raise ValueError(f"rank {world.rank} finds no {name} in {' or '.join(map(str, self.checkpoint_folders))}")
        try:
            checkpoint = load_checkpoint(path, "resume")
        except ValueError as error:
            raise ValueError(f"{error}; delete it to resume from the checkpoint before it") from error
        check_same_run(checkpoint.get("run"), run, path)
        state.restore(checkpoint)
        return checkpoint["steps"]

    def save(self, step: int, checkpoint: dict[str, Any]) -> Path:
        """Write a checkpoint to every place; returns the last, most durable one."""
        paths = [folder / f"{step:07d}.pt" for folder in self.checkpoint_folders]
        for path in paths:
            remove_temporary(path)
        save_checkpoint(checkpoint, *paths)
        return paths[-1]

    def make(self) -> None:
        """Create the folders now, so that an unwritable place is found before long work starts."""
        for folder in (self.folder, *self.checkpoint_folders):
            prepare_folder(folder, "--cloud-save-path or --results-dir")


def check_same_run(before: dict[str, Any] | None, now: dict[str, Any], path: Path) -> None:
    """``ValueError`` if a run found on disk was made with options that cannot change in mid-run."""
    if before is None:
        raise ValueError(f"{path} is no checkpoint of a training run of ours; move it out of the run's folder")
    differing = [k for k, v in now.items() if before.get(k) != v]
    if differing:
        k = differing[0]
        raise ValueError(
            f"{path} is of a run with another {', '.join(differing)} ({k}: {before.get(k)} there, {now[k]} now); "
            f"give another --results-dir and --cloud-save-path, or the same options to resume"
        )
