"""Losses of tokenizer training against closed forms and slow versions."""

import math
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers import slow_lpips
from tokenizer.vq_loss import (
    DISCRIMINATOR_LOSSES,
    GENERATOR_LOSSES,
    Adversary,
    ReconstructionLoss,
    adaptive_weight,
    load_lpips,
)
from tokenizer.vq_model import QuantizerLoss
from utils.distributed import World

CPU = World(0, 1, torch.device("cpu"))


def options(**changes) -> Namespace:
    base = dict(
        reconstruction_loss="l2",
        reconstruction_weight=1.0,
        perceptual_weight=0.0,
        codebook_weight=1.0,
    )
    base |= dict(
        vgg_weights=None, disc_type="patchgan", disc_weight=0.5, disc_start=3, disc_loss="hinge"
    )
    base |= dict(
        gen_loss="hinge", disc_adaptive_weight=False, image_size=32, mixed_precision="none", lr=1e-3
    )
    return Namespace(
        **base | dict(weight_decay=0.0, beta1=0.5, beta2=0.9, max_skipped_steps=20) | changes
    )


def adversary(**changes) -> Adversary:
    torch.manual_seed(0)
    return Adversary(options(**changes), CPU, torch.contiguous_format)


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_supervised_loss_is_the_weighted_sum(kind):
    images, made = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    quantizer = QuantizerLoss(*torch.tensor([0.2, 0.05, -0.1]))
    supervised = ReconstructionLoss(
        options(reconstruction_loss=kind, reconstruction_weight=2.0, codebook_weight=3.0),
        CPU.device,
        torch.contiguous_format,
    )
    loss, decoded, terms = supervised(images, made, quantizer)
    pixel = 0.5 if kind == "l1" else 0.25
    assert decoded.item() == pytest.approx(2 * pixel)
    assert loss.item() == pytest.approx(2 * pixel + 3 * 0.15)
    expected = {
        "loss": loss.item(),
        "reconstruction": pixel,
        "perceptual": 0,
        "codebook": 0.15,
        "entropy": -0.1,
    }
    assert {k: v.item() for k, v in terms.items()} == pytest.approx(expected)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    "kind, each_real, each_fake",
    [
        ("hinge", lambda x: max(0.0, 1 - x), lambda x: max(0.0, 1 + x)),
        ("vanilla", lambda x: -math.log(sigmoid(x)), lambda x: -math.log(1 - sigmoid(x))),
        ("non-saturating", lambda x: -math.log(sigmoid(x)), lambda x: -math.log(1 - sigmoid(x))),
    ],
)
def test_discriminator_losses(kind, each_real, each_fake):
    real, fake = [-2.0, -0.3, 0.0, 0.9, 3.0], [-1.5, -0.2, 0.4, 2.0]
    expected = (sum(map(each_real, real)) / 5 + sum(map(each_fake, fake)) / 4) / 2
    found = DISCRIMINATOR_LOSSES[kind](torch.tensor(real), torch.tensor(fake))
    assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "kind, each", [("hinge", lambda x: -x), ("non-saturating", lambda x: -math.log(sigmoid(x)))]
)
def test_generator_losses_fall_as_the_logits_rise(kind, each):
    """The published non-saturating loss swaps its arguments: the gradient of mean -x, always."""
    logits = [-2.0, 0.3, 4.0]
    x = torch.tensor(logits, requires_grad=True)
    loss = GENERATOR_LOSSES[kind](x)
    loss.backward()
    assert loss.item() == pytest.approx(sum(map(each, logits)) / 3, rel=1e-6)
    slope = [(each(v + 1e-4) - each(v - 1e-4)) / 2e-4 / 3 for v in logits]
    assert x.grad.tolist() == pytest.approx(slope, rel=1e-3) and max(slope) < 0


def test_lpips_against_a_slow_version(vgg):
    a, b = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model = load_lpips(str(vgg))
    b.requires_grad_()
    distance = model(b, a).flatten()
    assert distance.tolist() == pytest.approx(slow_lpips(vgg, a, b.detach()), rel=1e-4)
    assert model(a, a).flatten().tolist() == [0, 0]
    distance.sum().backward()
    assert b.grad.abs().sum() > 0 and not any(p.requires_grad for p in model.parameters())


def test_lpips_without_weights_says_where_it_looked(vgg, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        ValueError, match=f"vgg16-397923af.pth .* is not in {tmp_path}/hub/checkpoints; .*weight 0"
    ):
        load_lpips(None)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth").symlink_to(vgg)
    assert load_lpips(None) is not None
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match="other.pth does not hold torchvision's VGG16: see features.0.bias"
    ):
        load_lpips(str(tmp_path / "other.pth"))


def test_adaptive_weight_is_the_ratio_of_gradients():
    """supervised = 3 |w|^2 / 2, adversarial = c.w: gradients 3 w and c; clamped where c is 0."""
    w, c = torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([0.0, 5.0])
    supervised = 1.5 * w.square().sum()
    for scale in (1.0, 1024.0):
        assert adaptive_weight(supervised, c @ w, w, CPU, scale).item() == pytest.approx(
            15 / 5.0001, rel=1e-6
        )
    assert adaptive_weight(1e3 * supervised, 0 * (c @ w), w, CPU).item() == 1e4
    assert w.grad is None


def test_adversarial_weight_and_gradients():
    """The generator's loss leaves the discriminator's gradients alone, and the other way round."""
    it, images = adversary(gen_loss="non-saturating"), torch.rand(4, 3, 32, 32)
    layer = torch.ones((), requires_grad=True)
    made = layer * torch.rand(4, 3, 32, 32)
    loss, weight = it.generator_loss(made, made.sum(), layer, 1.0)
    loss.backward()
    assert weight.item() == 0.5 and layer.grad.abs() > 0
    assert all(p.grad is None for p in it.model.parameters())
    expected = F.binary_cross_entropy_with_logits(it.model(made), torch.ones_like(it.model(made)))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)

    before = layer.grad.clone()
    told, real, fake = it.discriminator_loss(images, layer * torch.rand(4, 3, 32, 32))
    told.backward()
    assert torch.equal(layer.grad, before) and all(
        p.grad is not None for p in it.model.parameters()
    )
    assert real.item() == pytest.approx(it.model(images).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    "start, step, active", [(0, 1, True), (3, 2, False), (3, 3, True), (3, 4, True)]
)
def test_adversary_starts_exactly_at_disc_start(start, step, active):
    assert adversary(disc_start=start).active(step) is active


@pytest.mark.parametrize("loss", ["hinge", "non-saturating"])
def test_a_discriminator_learns_to_tell(loss):
    """Real: smooth gradients; made: the same with noise. After 15 steps new batches are told apart:
    at a third of the loss of one who cannot tell, which is 1 (hinge) or log 2.
    """
    it = adversary(disc_loss=loss, disc_weight=1.0, lr=2e-4)
    generator = torch.Generator().manual_seed(0)

    def batch() -> tuple[Tensor, Tensor]:
        slopes = torch.rand(8, 3, 1, 1, generator=generator)
        real = slopes * torch.linspace(-1, 1, 24).view(1, 1, 24, 1).expand(8, 3, 24, 24)
        return real, real + 0.5 * torch.randn(real.shape, generator=generator)

    for step in range(15):
        told, _, _ = it.discriminator_loss(*batch())
        told.backward()
        it.state.update(step, told.detach(), it.state.gradient_norm(), 0)
    for _ in range(5):
        told, real, fake = it.discriminator_loss(*batch())
        assert real > fake + 1 and told < {"hinge": 1, "non-saturating": math.log(2)}[loss] / 3
