"""Losses of tokenizer training (VQGAN, Esser et al. 2021, section 3.1, as LlamaGen weighs them).

    loss   = w_r reconstruction + w_p LPIPS + w_c (codebook + commitment + entropy)
    total  = loss + w_d a GAN loss of the generator, from step --disc-start on

with a = 1, or the adaptive weight.

Images and reconstructions are float (B, 3, H, W), about [-1, 1]; every loss is a scalar.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tokenizer.discriminator import make_discriminator
from tokenizer.vq_model import QuantizerLoss
from utils.checkpoints.weights_file import load_checkpoint
from utils.distributed import World
from utils.parallel import replicate
from utils.training.state import make_training_state

VGG_FILE = "vgg16-397923af.pth"  # torchvision's name for it, under which torch.hub keeps it
MAX_ADAPTIVE_WEIGHT = 1e4


def find_vgg(path: str | None) -> Path | None:
    """Return VGG16's file: ``path``, or torch.hub's copy if there; nothing is downloaded."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE
    return Path(path) if path is not None else cached if cached.is_file() else None


def load_lpips(path: str | None) -> nn.Module:
    """Return frozen LPIPS on VGG16 (Zhang et al. 2018): (B, 3, H, W) twice -> (B, 1, 1, 1).

    The linear layers come with torchmetrics; the backbone is torchvision's state dict, from
    ``path`` or torch.hub's cache. ``ValueError`` if it is in neither or is of another network.
    """
    file = find_vgg(path)
    if file is None:
        raise ValueError(
            f"--perceptual-weight above 0 needs VGG16's weights: {VGG_FILE} (from torchvision's "
            f"model page) is not in {Path(torch.hub.get_dir()) / 'checkpoints'}; name it by "
            "--vgg-weights, or disable LPIPS by --perceptual-weight 0"
        )
    from torchmetrics.functional.image import lpips  # takes seconds, only where it is needed

    backbone = load_checkpoint(file, "--vgg-weights")
    linear_file = Path(lpips.__file__).parent / "lpips_models" / "vgg.pth"
    linear = torch.load(linear_file, map_location="cpu", weights_only=True)
    with torch.device("meta"):  # VGG16 has 120M parameters that LPIPS does not use
        model = lpips._LPIPS(pretrained=False, net="vgg", pnet_rand=True, use_dropout=False)
    model.scaling_layer = lpips.ScalingLayer()
    state = {
        f"lin{i}.model.0.weight": linear[f"lin{i}.model.1.weight"] for i in range(len(model.chns))
    }
    # slice1.0.weight is the backbone's features.0.weight
    for name, parameter in model.net.named_parameters():
        given = backbone.get(f"features.{name.partition('.')[2]}")
        if not isinstance(given, Tensor) or given.shape != parameter.shape:
            raise ValueError(
                f"--vgg-weights: {file} does not hold torchvision's VGG16: see features.{name[7:]}"
            )
        state[f"net.{name}"] = given.float()
    model.load_state_dict(state, strict=False, assign=True)  # lins.* are the lin* once more
    return model.eval().requires_grad_(False)


def discriminator_hinge(real: Tensor, fake: Tensor) -> Tensor:
    """(mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2 of logits (Lim & Ye 2017)."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def discriminator_logistic(real: Tensor, fake: Tensor) -> Tensor:
    """(mean -log sigmoid(real) + mean -log(1 - sigmoid(fake))) / 2 (Goodfellow et al. 2014)."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_hinge(fake: Tensor) -> Tensor:
    """-mean logit."""
    return -fake.mean()


def generator_non_saturating(fake: Tensor) -> Tensor:
    """mean -log sigmoid(logit) (Goodfellow et al. 2014, section 3)."""
    return F.softplus(-fake).mean()


# "non-saturating" is a way to train the generator: its discriminator's loss is the vanilla one
DISCRIMINATOR_LOSSES = {
    "hinge": discriminator_hinge,
    "vanilla": discriminator_logistic,
    "non-saturating": discriminator_logistic,
}
GENERATOR_LOSSES = {"hinge": generator_hinge, "non-saturating": generator_non_saturating}
PIXEL_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}


def adaptive_weight(
    supervised: Tensor, adversarial: Tensor, last_layer: Tensor, world: World, scale: float = 1.0
) -> Tensor:
    """|d supervised / d last layer| / (|d adversarial / d last layer| + 1e-4), at most 1e4.

    VQGAN's equation 7, a scalar without gradient. Gradients are averaged over the ranks
    first, so that all weigh alike. ``scale``: factor that keeps the gradients of half
    precision from vanishing.
    """
    norms = []
    for loss in (supervised, adversarial):
        gradient = torch.autograd.grad(loss * scale, last_layer, retain_graph=True)[0]
        norms.append(world.mean(gradient).norm() / scale)  # ()
    return (norms[0] / (norms[1] + 1e-4)).clamp(max=MAX_ADAPTIVE_WEIGHT)  # ()


class ReconstructionLoss:
    """The loss without a discriminator: pixels, LPIPS and the quantizer's losses."""

    names = ("loss", "reconstruction", "perceptual", "codebook", "entropy")

    def __init__(self, args: Namespace, device: torch.device, memory_format: torch.memory_format):
        self.args, self.lpips = args, None
        if args.perceptual_weight:
            self.lpips = load_lpips(args.vgg_weights).to(device, memory_format=memory_format)

    def __call__(
        self, images: Tensor, reconstruction: Tensor, quantizer: QuantizerLoss
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss, its decoder part (for the adaptive weight), detached ``names``."""
        args, codebook = self.args, sum(quantizer)  # ()
        pixel = PIXEL_LOSSES[args.reconstruction_loss](reconstruction, images)  # ()
        perceptual = torch.zeros_like(pixel)  # ()
        if self.lpips:
            perceptual = self.lpips(reconstruction, images).float().mean()  # ()
        decoded = args.reconstruction_weight * pixel + args.perceptual_weight * perceptual  # ()
        loss = decoded + args.codebook_weight * codebook  # ()
        terms = (loss, pixel, perceptual, codebook, quantizer.entropy)
        return loss, decoded, {k: v.detach() for k, v in zip(self.names, terms, strict=True)}


class Adversary:
    """The discriminator, its optimizer, and its losses for both updates."""

    names = ("adversarial", "adversarial_weight", "discriminator", "logits_real", "logits_fake")

    def __init__(self, args: Namespace, world: World, memory_format: torch.memory_format):
        self.args, self.world = args, world
        self.model = make_discriminator(args.disc_type, args.image_size)
        self.model.to(world.device, memory_format=memory_format).train()
        # a GAN loss has no stable mean: only steps whose loss is not a finite number are skipped
        self.state = make_training_state(self.model, args, world, ema=False, max_loss_spike=0.0)
        self.forward: nn.Module = self.model

    def replicate(self) -> None:
        """Average gradients over ranks from now on; weights must be made or resumed before."""
        self.forward = replicate(self.world, self.model)

    def active(self, step: int) -> bool:
        """Return whether ``step``, counted from 1 as in the log, has a GAN loss."""
        return step >= self.args.disc_start

    def generator_loss(
        self, reconstruction: Tensor, decoded: Tensor, last_layer: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return the GAN loss of reconstructions and its weight, two scalars.

        The discriminator's parameters get no gradient from it. ``decoded``, ``last_layer``,
        ``scale``: see ``adaptive_weight``.
        """
        frozen = {k: p.detach() for k, p in self.model.named_parameters()}
        logits = functional_call(self.model, frozen, (reconstruction,)).float()  # (B, ...)
        adversarial = GENERATOR_LOSSES[self.args.gen_loss](logits)  # ()
        weight = torch.full_like(adversarial, self.args.disc_weight, requires_grad=False)  # ()
        if self.args.disc_adaptive_weight:
            ratio = adaptive_weight(decoded, adversarial, last_layer, self.world, scale)  # ()
            weight = weight * ratio  # ()
        return adversarial, weight

    def discriminator_loss(self, images: Tensor, reconstruction: Tensor) -> tuple[Tensor, ...]:
        """Return the loss, times ``--disc-weight`` as published, and mean real and fake logits."""
        real = self.forward(images).float()  # (B, ...)
        fake = self.forward(reconstruction.detach()).float()  # (B, ...)
        loss = self.args.disc_weight * DISCRIMINATOR_LOSSES[self.args.disc_loss](real, fake)  # ()
        return loss, real.detach().mean(), fake.detach().mean()
