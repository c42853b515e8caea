"""What changes as a run trains, and how: optimizer, learning rate, moving average, the guard
against bad steps.
"""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from utils.distributed import World
from utils.parallel import gradient_norm, local

DOUBTFUL_STEPS = 3  # after this many consecutive skips no checkpoint is saved
SETTLED_STEPS = 100  # loss spikes in the first steps are ignored


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for one step, so that a resumed run draws the same numbers as an uninterrupted."""
    words = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(words[0]) >> 1)


def make_adamw(
    model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """Return a fused AdamW with weight decay on matrices and convolutions only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def learning_rate(
    step: int, peak: float, schedule: str, total_steps: int, warmup_steps: int = 0
) -> float:
    """Learning rate of training step ``step``, counted from 0.

    It rises linearly from 0 over the warm-up, then is ``peak`` (``constant``), or what is left at
    this step of half a cosine from ``peak`` at step 0 to 0 at ``total_steps`` (``cosine``).
    """
    if step < warmup_steps:
        return step * (peak / warmup_steps)
    if schedule == "constant":
        return peak
    return 0.5 * peak * (1 + math.cos(math.pi * step / total_steps))


class Ema:
    """Moving average of a module's parameters: average += (1 - decay) (parameter - average).

    The decay grows from 0.1 to ``decay`` as min(decay, (1 + step) / (10 + step)), so that the first
    weights fade. Sharded parameters have sharded averages.
    """

    def __init__(self, module: nn.Module, decay: float = 0.9999):
        self.decay = decay
        self.average = {k: p.detach().clone() for k, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the module's parameters after training step ``step``, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, parameters = map(local, self.average.values()), map(local, module.parameters())
        torch._foreach_lerp_(list(averages), list(parameters), 1.0 - decay)

    @torch.no_grad()
    def start(self, module: nn.Module) -> None:
        """Set the averages to the module's parameters."""
        for average, parameter in zip(self.average.values(), module.parameters(), strict=True):
            local(average).copy_(local(parameter))

    def state_dict(self, module: nn.Module) -> dict[str, Tensor]:
        """Return a state dict for the module: the averages, and the module's own buffers."""
        return module.state_dict() | self.average


class Guard:
    """Skips harmful steps; decides on the device, without waiting for it.

    Rule: a step leaves weights and moments as they are when its loss or gradient norm is not a
    finite number, or, after 100 steps taken, when its loss is more than ``spike`` (0: never) above
    the running mean of the losses of steps taken (decay 0.99). Every rank sees the same loss and
    norm and so decides the same.
    """

    def __init__(self, device: torch.device, spike: float, patience: int):
        self.spike, self.patience = spike, patience
        # running mean of the loss; steps taken, skipped, skipped in a row
        self.state = torch.zeros(4, device=device)

    def should_skip(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Return 1.0 if the step of this loss and gradient norm (scalars) is skipped, else 0.0."""
        mean, taken, skipped, in_a_row = self.state.unbind()  # () each
        bad = ~(loss.isfinite() & norm.isfinite())  # ()
        if self.spike:
            bad |= (taken >= SETTLED_STEPS) & (loss > mean + self.spike)
        moved = mean + (loss - mean) * (1.0 / (taken + 1.0)).clamp(min=0.01)  # ()
        mean = torch.where(bad, mean, moved)  # ()
        in_a_row = torch.where(bad, in_a_row + 1.0, 0.0)  # ()
        self.state = torch.stack([mean, taken + ~bad, skipped + bad, in_a_row])  # (4,)
        return bad.float()

    @property
    def in_a_row(self) -> int:
        """Number of consecutive steps skipped so far (waits for the device)."""
        return int(self.state[3].item())

    @property
    def skipped(self) -> int:
        """Number of steps skipped so far (waits for the device)."""
        return int(self.state[2].item())

    @property
    def healthy(self) -> bool:
        """False after enough consecutive skips to doubt the weights; waits for the device."""
        return self.in_a_row < DOUBTFUL_STEPS

    def check(self, step: int, lr: float, last: bool = False) -> None:
        """Raise ``ValueError`` after too many skips, or at the ``last`` step if in doubt."""
        if self.in_a_row >= self.patience or (last and not self.healthy):
            raise ValueError(
                f"the last {self.in_a_row} steps up to {step} were all skipped, as their loss was "
                f"not a finite number or a spike (learning rate {lr:.3g}); the last checkpoint is "
                "from before them: lower --lr, or use --mixed-precision bf16 or none instead of "
                "fp16, or see --max-loss-spike"
            )


@dataclass
class TrainingState:
    """What changes as a run trains: saved in its checkpoints and restored from them.

    Position, data order, learning rate and random numbers are functions of (seed, step, rank) and
    need no saving.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Ema | None
    guard: Guard

    def set_learning_rate(self, lr: float) -> None:
        """Set the learning rate of the next update."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def gradient_norm(self) -> Tensor:
        """Return the gradients' 2-norm over all ranks, unscaled from fp16: a device scalar."""
        self.scaler.unscale_(self.optimizer)
        return gradient_norm(self.model).to(self.guard.state.device)

    def update(self, step: int, loss: Tensor, norm: Tensor, max_norm: float) -> None:
        """Clip and step unless the guard skips; the moving average moves in any case.

        loss, norm: those of all ranks.
        """
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), max_norm, norm)
        # the fused optimizer itself looks at this flag, on the device: a step that is skipped
        # changes nothing
        place = next(self.model.parameters()).device  # the host's, if offloaded
        skip = self.guard.should_skip(loss, norm).to(place)
        self.optimizer.grad_scale, self.optimizer.found_inf = None, skip
        self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.model, step)

    @property
    def guards(self) -> list[Guard]:
        """Guards of everything that is trained."""
        return [self.guard]

    def parameters(self) -> list[nn.Parameter]:
        """Return everything that has gradients."""
        return list(self.model.parameters())

    def tensors(self) -> dict[str, Tensor]:
        """Return weights, moving average and moments under names independent of the sharding."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        if self.ema:
            tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict(self.model).items()}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                tensors |= {f"optimizer.{name}.{k}": v for k, v in self._moments(parameter).items()}
        return tensors

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the optimizer's state of one parameter, made as AdamW would at its first step."""
        state = self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = (
                torch.zeros_like(parameter),
                torch.zeros_like(parameter),
            )
        return state

    def scalars(self) -> dict[str, Any]:
        """Return the rest of the state, to be kept as JSON."""
        return {"scaler": self.scaler.state_dict(), "guard": self.guard.state.tolist()}

    def load_scalars(self, scalars: dict[str, Any]) -> None:
        """Restore ``scalars``; ``ValueError`` if they were not written by ``scalars``."""
        guard, scaler = scalars["guard"], scalars["scaler"]
        numbers: list[Any] = [*guard, *scaler.values()] if isinstance(scaler, dict) else [None]
        # a mean loss may be below 0: a tokenizer's is, with its discriminator
        finite = all(type(x) in (int, float) and math.isfinite(x) for x in numbers)
        if len(guard) != 4 or not finite:
            raise ValueError("not those of a training run")
        if scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(scaler)
        self.guard.state = torch.tensor(guard, device=self.guard.state.device)


def make_training_state(
    model: nn.Module, args: Namespace, world: World, ema: bool, max_loss_spike: float
) -> TrainingState:
    """Return a new state for ``model``, placed on its devices; see ``utils.training.options``."""
    optimizer = make_adamw(model, args.lr, args.weight_decay, (args.beta1, args.beta2))
    scaler = torch.amp.GradScaler(world.device.type, enabled=args.mixed_precision == "fp16")
    average = Ema(model, args.ema_decay) if ema else None
    guard = Guard(world.device, max_loss_spike, args.max_skipped_steps)
    return TrainingState(model, optimizer, scaler, average, guard)
