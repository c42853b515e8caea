"""Metrics beyond the published five, each behind an option: KID, FID per class, bootstrap, PSNR,
SSIM, FD-DINOv2.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluations.c2i.features import Features
from evaluations.c2i.metrics import frechet_distance, frechet_distance_of_few, mean_and_covariance
from utils.checkpoints.weights_file import find_state_dict, load_checkpoint, load_strictly
from utils.distributed import World
from utils.logger import progress
from utils.quality import psnr, ssim

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
DINOV2 = "vit_large_patch14_dinov2.lvd142m"
DINOV2_SIZE = 224


def kernel_distance(
    reference: np.ndarray, samples: np.ndarray, seed: int = 0
) -> tuple[float, float]:
    """KID: mean and deviation over 100 subsets of 1,000 of the squared MMD with (x.y / D + 1)^3.

    Features (N, D) and (M, D) float32 (Binkowski et al. 2018, arXiv 1801.01401, section 4; not
    multiplied by 1,000). If a set has fewer than 1,000 rows, subsets have as many.
    """
    from torchmetrics.image.kid import poly_mmd  # takes over a second

    rng = np.random.default_rng(seed)
    size = min(KID_SUBSET_SIZE, len(reference), len(samples))
    values = []
    for _ in range(KID_SUBSETS):
        chosen = (x[rng.choice(len(x), size, replace=False)] for x in (reference, samples))
        real, fake = (torch.from_numpy(x).double() for x in chosen)
        values.append(poly_mmd(real, fake).item())
    return float(np.mean(values)), float(np.std(values))


def class_frechet(
    reference: np.ndarray, reference_labels: np.ndarray, samples: np.ndarray, labels: np.ndarray
) -> dict[int, float]:
    """Return FID by class with at least two images in both sets; labels (N,), (M,) integers."""
    distances = {}
    for label in np.intersect1d(reference_labels, labels):
        real, fake = reference[reference_labels == label], samples[labels == label]
        if min(len(real), len(fake)) > 1:
            distances[int(label)] = frechet_distance_of_few(real, fake)
    return distances


def frechet_interval(
    reference: tuple[np.ndarray, np.ndarray],
    samples: np.ndarray,
    distance: float,
    draws: int,
    world: World,
    seed: int = 0,
) -> tuple[float, float]:
    """Return a 95% interval around ``distance``, the FID of features (M, D) to (mu, sigma).

    Its ends are percentiles 2.5 and 97.5 of FID over ``draws`` bootstrap resamplings, shifted so
    that their mean is ``distance``: resampled sets repeat images, which raises FID as much again as
    the finite set does, far more than the interval is wide. The interval shows the noise of drawing
    M samples, not FID's bias at M.
    """
    rng = np.random.default_rng(seed)
    values = []
    for _ in progress(world, "bootstrap", draws, unit="draw", items=range(draws)):
        drawn = samples[rng.integers(len(samples), size=len(samples))]
        values.append(frechet_distance(*mean_and_covariance(drawn), *reference))
    low, high = np.percentile(values, [2.5, 97.5]) - np.mean(values) + distance
    return float(low), float(high)


def paired_quality(
    pairs: Iterable[tuple[Tensor, Tensor]], device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Return mean PSNR in dB and mean SSIM over pairs of images; batches (B, H, W, 3) in 0-255."""
    psnrs, ssims = [], []
    for first, second in pairs:
        psnrs.append(psnr(first.numpy(), second.numpy()))  # (B,)
        ssims.append(ssim(first.numpy(), second.numpy(), device))  # (B,)
    return np.concatenate(psnrs).mean().item(), np.concatenate(ssims).mean(dtype=np.float64).item()


class DinoFeatures(nn.Module):
    """Network of FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675): class tokens of ViT-L/14.

    Images are resized to 224 x 224 (bicubic, antialiased) and normalised by ImageNet's mean and
    standard deviation. ``probabilities`` are empty.
    """

    def __init__(self, name: str = DINOV2) -> None:
        import timm  # takes over a second

        super().__init__()
        self.network = timm.create_model(name, num_classes=0, dynamic_img_size=True)
        self.register_buffer(
            "mean", torch.tensor(timm.data.IMAGENET_DEFAULT_MEAN).view(3, 1, 1), persistent=False
        )
        self.register_buffer(
            "std", torch.tensor(timm.data.IMAGENET_DEFAULT_STD).view(3, 1, 1), persistent=False
        )

    def forward(self, images: Tensor) -> Features:
        """``images`` (B, H, W, 3) uint8, or float32 in 0-255 -> pool features (B, 1024)."""
        x = images.permute(0, 3, 1, 2).float()  # (B, 3, H, W)
        x = F.interpolate(x, (DINOV2_SIZE,) * 2, mode="bicubic", antialias=True)  # (B, 3, 224, 224)
        x = (x.clamp(0, 255) / 255 - self.mean) / self.std  # (B, 3, 224, 224)
        pool = self.network(x)  # (B, 1024), the normalised class token
        return Features(pool, None, pool[:, :0])


def load_dinov2(path: str | Path, name: str = DINOV2) -> DinoFeatures:
    """Load the network with timm's weights ``name``; ``ValueError`` if the file holds another."""
    model = DinoFeatures(name)
    state = find_state_dict(load_checkpoint(path, "--dinov2"), ("model", "state_dict"), path)
    load_strictly(model.network, state, path, f"timm's {name}")
    return model.eval().requires_grad_(False)
