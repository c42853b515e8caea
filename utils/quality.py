"""Quality of reconstructions and use of a codebook: PSNR, SSIM, usage and perplexity."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SSIM_WINDOW = 11  # pixels


def psnr(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """10 log10(255^2 / MSE) of each pair of images (N, H, W, 3) in 0-255: (N,) dB.

    The MSE of images in [0, 1] is floored at 1e-10, so that equal images have 100 dB and a mean
    stays finite.
    """
    mse = np.square(images.astype(np.float64) - others).mean(axis=(1, 2, 3))  # (N,)
    return 10 * np.log10(255.0**2 / np.maximum(mse, 255.0**2 * 1e-10))


def ssim(images: np.ndarray, others: np.ndarray, device: torch.device | str = "cpu") -> np.ndarray:
    """SSIM of each pair of images (N, H, W, 3) in 0-255: (N,) float32, 1 for equal images.

    With a Gaussian window of 11 x 11 pixels and sigma 1.5 (Wang et al. 2004), mirrored at the
    borders; the mean over colours and pixels. H and W must be at least 11.
    """
    # here: it takes over a second
    from torchmetrics.functional.image import structural_similarity_index_measure

    both = (torch.from_numpy(a).to(device) for a in (images, others))  # (N, H, W, 3)
    x, y = (a.permute(0, 3, 1, 2).float() for a in both)  # (N, 3, H, W)
    similarity = structural_similarity_index_measure(
        x, y, data_range=255.0, kernel_size=SSIM_WINDOW, reduction="none"
    )
    return similarity.reshape(-1).cpu().numpy()


def codebook_usage(counts: Tensor) -> float:
    """Return the fraction of codebook entries used; ``counts`` (V,) are their occurrences."""
    return (counts > 0).sum().item() / len(counts)


def perplexity(counts: Tensor) -> float:
    """exp(entropy) of the distribution of ``counts`` (V,), occurrences of codebook entries.

    It equals the number of entries in use if these are used equally often: at most V, and 1 without
    any counts.
    """
    p = counts.cpu().double() / counts.sum().clamp(min=1).cpu()  # (V,)
    return torch.special.entr(p).sum().exp().item()
