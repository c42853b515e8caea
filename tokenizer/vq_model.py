"""VQ tokenizer: images <-> grids of codes.

- convolutional encoder and decoder of VQGAN (Esser et al. 2021), attention at the lowest resolution
- vector quantizer with a small l2-normalised codebook (ViT-VQGAN, Yu et al. 2022; LlamaGen)
- parameter names and shapes of the released ``vq_ds16_c2i.pt``

Images are float (B, 3, H, W) in [-1, 1]; codes are int64 (B, H/f, W/f), f = ``config.downsample``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from tokenizer.config import VQ_models, VQConfig
from utils import quality

USAGE_WINDOW = 65536  # codes of which usage is counted; released checkpoints hold this many


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, eps 1e-6, as in VQGAN."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """x + conv(norm(conv(norm(x)))), with a 1x1 shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, dropout_p: float):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout_p)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C', H, W)
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))  # (B, C', H, W)
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h  # (B, C', H, W)


class AttnBlock(nn.Module):
    """x + single-head self-attention over all H*W places."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)  # (B, C, H, W)
        maps = (self.q(h), self.k(h), self.v(h))  # (B, C, H, W) each
        q, k, v = (m.flatten(2).transpose(1, 2)[:, None] for m in maps)  # (B, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)  # (B, 1, HW, C)
        return x + self.proj_out(h[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]))  # (B, C, H, W)


class Downsample(nn.Module):
    """Halve H and W by a strided convolution, padded at the right and bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Double H and W by nearest neighbour and a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2H, 2W)


class Level(nn.Module):
    """Residual blocks of one resolution, with attention if asked, then a change of resolution."""

    def __init__(
        self, widths: list[int], attention: bool, resample: type[nn.Module] | None, dropout_p: float
    ):
        super().__init__()
        pairs = list(zip(widths[:-1], widths[1:], strict=True))
        self.res = nn.ModuleList(ResnetBlock(a, b, dropout_p) for a, b in pairs)
        self.attn = nn.ModuleList(AttnBlock(b) for _, b in pairs if attention)
        if resample is not None:
            self.add_module(resample.__name__.lower(), resample(widths[-1]))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)  # (B, C, H, W)
            if len(self.attn):
                x = self.attn[i](x)  # (B, C, H, W)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)  # (B, C, H', W')
        return x


def mid_blocks(channels: int, dropout_p: float) -> nn.ModuleList:
    """The three blocks at the lowest resolution."""
    first, last = (ResnetBlock(channels, channels, dropout_p) for _ in range(2))
    return nn.ModuleList([first, AttnBlock(channels), last])


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, z_channels, H/f, W/f)."""

    def __init__(self, config: VQConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        before = config.ch
        for i, width in enumerate(widths):
            lowest = i == len(widths) - 1
            resample = None if lowest else Downsample
            path = [before] + [width] * config.num_res_blocks
            self.conv_blocks.append(Level(path, lowest, resample, config.dropout_p))
            before = width
        self.mid = mid_blocks(before, config.dropout_p)
        self.norm_out = group_norm(before)
        self.conv_out = nn.Conv2d(before, config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)  # (B, C, H, W)
        for block in (*self.conv_blocks, *self.mid):
            h = block(h)  # (B, C', H', W')
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, Z, H/f, W/f)


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> (B, 3, h*f, w*f)."""

    def __init__(self, config: VQConfig):
        super().__init__()
        widths = [config.ch * m for m in reversed(config.ch_mult)]
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = mid_blocks(widths[0], config.dropout_p)
        self.conv_blocks = nn.ModuleList()
        before = widths[0]
        for i, width in enumerate(widths):
            resample = None if i == len(widths) - 1 else Upsample
            path = [before] + [width] * (config.num_res_blocks + 1)
            self.conv_blocks.append(Level(path, i == 0, resample, config.dropout_p))
            before = width
        self.norm_out = group_norm(before)
        self.conv_out = nn.Conv2d(before, 3, 3, padding=1)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last layer, where adaptive GAN weights compare gradients."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)  # (B, C, h, w)
        for block in (*self.mid, *self.conv_blocks):
            h = block(h)  # (B, C', h', w')
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, 3, h*f, w*f)


class QuantizerLoss(NamedTuple):
    """Scalars of one batch; their sum is the quantizer's loss."""

    codebook: Tensor
    commitment: Tensor
    entropy: Tensor


class VectorQuantizer(nn.Module):
    """Nearest codebook entry, with straight-through gradient (van den Oord et al. 2017)."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_embed_dim)
        # the latest codes of training, oldest first, -1: none yet; float32 and this size in
        # released checkpoints
        self.register_buffer("codebook_used", torch.full((USAGE_WINDOW,), -1.0))

    def codebook(self) -> Tensor:
        """(V, C) entries, unit length when ``codebook_l2_norm``."""
        return self._normalize(self.embedding.weight)  # (V, C)

    def _normalize(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.config.codebook_l2_norm else x

    def search(self, z: Tensor, codebook: Tensor | None = None, chunk: int = 4096) -> Tensor:
        """Nearest entries, argmin |z - e|^2 = argmax z.e - |e|^2 / 2: (N, C) -> (N,) int64.

        ``chunk`` rows at a time, so that at most chunk x V similarities exist at once. With unit
        entries |e| is the same for all and drops out. ``codebook``: the result of
        ``codebook()``, where it is at hand. float32 also under autocast, as each code is one of
        thousands of near neighbours.
        """
        codebook = self.codebook() if codebook is None else codebook  # (V, C)
        z = self._normalize(z)  # (N, C)
        bias = None if self.config.codebook_l2_norm else -0.5 * codebook.square().sum(-1)  # (V,)
        with torch.autocast(z.device.type, enabled=False):
            nearest = [F.linear(rows, codebook, bias).argmax(-1) for rows in z.split(chunk)]
        return torch.cat(nearest)  # (N,)

    @staticmethod
    def rows(z: Tensor) -> Tensor:
        """(B, C, h, w) -> (B*h*w, C) float32."""
        return z.permute(0, 2, 3, 1).flatten(0, 2).float()  # (N, C)

    def forward(self, z: Tensor) -> tuple[Tensor, QuantizerLoss, Tensor]:
        """(B, C, h, w) -> quantized with z's gradient, losses, codes (B, h, w) int64."""
        z = self._normalize(z.permute(0, 2, 3, 1).float())  # (B, h, w, C)
        with torch.no_grad():
            codes = self.search(z.flatten(0, 2)).view(z.shape[:-1])  # (B, h, w)
        quantized = F.embedding(codes, self.codebook())  # (B, h, w, C)
        losses = QuantizerLoss(
            codebook=F.mse_loss(quantized, z.detach()),
            commitment=self.config.commit_loss_beta * F.mse_loss(z, quantized.detach()),
            entropy=self.entropy_loss(z) if self.config.entropy_loss_ratio else z.new_zeros(()),
        )
        quantized = z + (quantized - z).detach()  # (B, h, w, C)
        return quantized.permute(0, 3, 1, 2), losses, codes

    def entropy_loss(self, z: Tensor, temperature: float = 0.01, chunk: int = 4096) -> Tensor:
        """ratio * (mean entropy per latent - entropy of the mean assignment): a scalar.

        Small when each latent is sure and all entries are used (MaskGIT's tokenizer, Chang et al.
        2022). Affinity is -|z - e|^2. ``chunk`` latents at a time, computed again in backward, so
        that at most chunk x V probabilities exist at once.
        """
        codebook, z = self.codebook(), z.flatten(0, -2)  # (V, C), (N, C)

        def sums(rows: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
            affinity = -torch.cdist(rows, codebook).square() / temperature  # (chunk, V)
            log_p = affinity.log_softmax(-1)  # (chunk, V)
            return log_p.exp().sum(0), -(log_p.exp() * log_p).sum()  # (V,), ()

        parts = [recompute(sums, rows, codebook, use_reentrant=False) for rows in z.split(chunk)]
        mean_p, per_latent = (sum(part) / len(z) for part in zip(*parts, strict=True))  # (V,), ()
        of_mean = -(mean_p * (mean_p + 1e-5).log()).sum()  # ()
        return self.config.entropy_loss_ratio * (per_latent - of_mean)

    @torch.no_grad()
    def record_usage(self, codes: Tensor) -> None:
        """Shift the newest codes, of any shape, into the usage window."""
        codes = codes.flatten()[-USAGE_WINDOW:].to(self.codebook_used.dtype)  # (N,)
        self.codebook_used.copy_(torch.cat([self.codebook_used, codes])[-USAGE_WINDOW:])

    def window_counts(self) -> Tensor:
        """How often each entry occurs in the window of the latest training codes: (V,) int64."""
        recorded = self.codebook_used[self.codebook_used >= 0].long()  # (N,)
        return recorded.bincount(minlength=self.config.codebook_size)  # (V,)

    def usage(self) -> float:
        """Fraction of the codebook that occurs in the window."""
        return quality.codebook_usage(self.window_counts())

    def perplexity(self) -> float:
        """exp(entropy) of the codes in the window."""
        return quality.perplexity(self.window_counts())

    def dead(self) -> Tensor:
        """Entries that a full window does not hold, (V,) bool; none while it is filling."""
        return (self.window_counts() == 0) & (self.codebook_used >= 0).all()  # (V,)

    @torch.no_grad()
    def move(self, entries: Tensor, latents: Tensor, generator: torch.Generator) -> None:
        """Put ``entries``, (V,) bool, at latents drawn from (N, C); ``generator`` is on the CPU."""
        drawn = torch.randint(len(latents), (int(entries.sum()),), generator=generator)  # (D,)
        self.embedding.weight[entries] = self._normalize(latents)[drawn.to(latents.device)]

    @torch.no_grad()
    def fit(self, latents: Tensor, iterations: int, generator: torch.Generator) -> None:
        """Put the entries at V of the latents (N, C), then iterate k-means (Lloyd 1982).

        Entries that no latent is nearest to go to random latents. N must be at least V.
        """
        z, weight = self._normalize(latents), self.embedding.weight  # (N, C), (V, C)
        weight.copy_(z[torch.randperm(len(z), generator=generator)[: len(weight)].to(z.device)])
        for _ in range(iterations):
            codes = self.search(z)  # (N,)
            counts = codes.bincount(minlength=len(weight))  # (V,)
            sums = torch.zeros_like(weight).index_add_(0, codes, z)  # (V, C)
            weight.copy_(self._normalize(sums / counts.clamp(min=1)[:, None]))
            self.move(counts == 0, latents, generator)


class VQModel(nn.Module):
    """The tokenizer: ``encode`` to codes, ``decode_code`` back to images."""

    trained_size: int | None = None  # side of the images it learned from, pixels, where it is known

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_embed_dim, config.z_channels, 1)

    def init_weights(self) -> None:
        """Initialise for training: convolutions keep torch's default; the codebook is uniform in
        +-1/V, with rows of unit length when l2-normalised.
        """
        bound = 1.0 / self.config.codebook_size
        nn.init.uniform_(self.quantize.embedding.weight, -bound, bound)
        if self.config.codebook_l2_norm:
            with torch.no_grad():
                self.quantize.embedding.weight.copy_(self.quantize.codebook())

    def weights(self) -> dict[str, Tensor]:
        """The state dict without the usage window, which codes and images do not depend on."""
        return {k: v for k, v in self.state_dict().items() if k != "quantize.codebook_used"}

    def latent(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H/f, W/f), before quantization."""
        return self.quant_conv(self.encoder(images))  # (B, C, h, w)

    @torch.no_grad()
    def encode(self, images: Tensor, codebook: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> codes (B, H/f, W/f) int64. H and W must be multiples of f.

        ``codebook``: the result of ``quantize.codebook()``, to compute it once for many calls.
        """
        z = self.latent(images).permute(0, 2, 3, 1).float()  # (B, h, w, C)
        return self.quantize.search(z.flatten(0, 2), codebook).view(z.shape[:-1])  # (B, h, w)

    def decode(self, quantized: Tensor) -> Tensor:
        """(B, C, h, w) -> images (B, 3, h*f, w*f), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(quantized))  # (B, 3, H, W)

    def quantized(self, codes: Tensor) -> Tensor:
        """Codebook entries of codes (B, h, w): (B, C, h, w)."""
        return F.embedding(codes, self.quantize.codebook()).permute(0, 3, 1, 2)  # (B, C, h, w)

    def decode_code(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) int64 -> images (B, 3, h*f, w*f), about [-1, 1]."""
        return self.decode(self.quantized(codes))  # (B, 3, H, W)

    def forward(self, images: Tensor) -> tuple[Tensor, QuantizerLoss, Tensor]:
        """Reconstruction (B, 3, H, W), quantizer losses, codes (B, h, w)."""
        quantized, losses, codes = self.quantize(self.latent(images))  # (B, C, h, w), -, (B, h, w)
        return self.decode(quantized), losses, codes


def make_vq_config(vq_model: str, **written: object) -> VQConfig:
    """Config of a size of the table; fields that are not None override it."""
    return VQConfig(**VQ_models[vq_model] | {k: v for k, v in written.items() if v is not None})
