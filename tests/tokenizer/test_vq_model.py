"""Tokenizer: golden codes and reconstructions, released names, search, losses, straight-through
gradient.
"""

import json
import math

import pytest
import torch

from scripts.diagnosis.models import fill_from_names
from tokenizer.vq_model import USAGE_WINDOW, VQ_models, VQConfig, VQModel


def tiny_config(**changes) -> VQConfig:
    base = dict(
        ch=32,
        ch_mult=(1, 1),
        num_res_blocks=1,
        z_channels=32,
        codebook_size=11,
        codebook_embed_dim=4,
    )
    return VQConfig(**base | changes)


@pytest.mark.parametrize("size", ["VQ-16", "VQ-8"])
def test_codes_and_reconstruction_are_golden(golden, size):
    file = golden(size.lower().replace("-", "") + ".npz")
    model = fill_from_names(VQModel(VQConfig(**VQ_models[size]))).eval()
    image, codes = torch.from_numpy(file["image"]), torch.from_numpy(file["codes"]).long()
    with torch.no_grad():
        assert torch.equal(model.encode(image), codes)
        reconstruction, _, forward_codes = model(image)
        torch.testing.assert_close(
            model.quantized(codes), torch.from_numpy(file["latent_quantized"]), atol=1e-6, rtol=0
        )
        expected = torch.from_numpy(file["reconstruction"])
        torch.testing.assert_close(model.decode_code(codes), expected, atol=1e-4, rtol=0)
    assert torch.equal(forward_codes, codes)
    torch.testing.assert_close(reconstruction, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", ["VQ-16", "VQ-8"])
def test_released_names_and_shapes(golden, size):
    with torch.device("meta"):
        state = VQModel(VQConfig(**VQ_models[size])).state_dict()
    manifest = json.loads(golden("state_dict_manifest.json"))[size]
    assert {k: list(v.shape) for k, v in state.items()} == manifest


def test_small_tokenizer_is_small():
    """32x32 images become 8x8 grids with about a million parameters."""
    config = VQConfig(**VQ_models["VQ-4"])
    model = VQModel(config)
    assert config.downsample == 4
    assert 0.7e6 < sum(p.numel() for p in model.parameters()) < 1.5e6
    assert model.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 8, 8)


@pytest.mark.parametrize("l2_norm", [True, False])
def test_search_is_the_nearest_entry(l2_norm):
    """Against explicit distances in float64, also when the rows do not divide into chunks."""
    quantizer = fill_from_names(VQModel(tiny_config(codebook_l2_norm=l2_norm))).quantize.double()
    z = torch.randn(103, 4, dtype=torch.float64)
    rows, entries = z, quantizer.embedding.weight
    if l2_norm:
        rows = rows / rows.norm(dim=1, keepdim=True)
        entries = entries / entries.norm(dim=1, keepdim=True)
    distances = (rows[:, None] - entries[None]).square().sum(-1)
    assert torch.equal(quantizer.search(z, chunk=10), distances.argmin(1))


def test_straight_through_gradient_and_losses():
    """The reconstruction's gradient passes unchanged; the losses pull entries and latents."""
    quantizer = fill_from_names(VQModel(tiny_config(codebook_l2_norm=False))).quantize
    z = torch.randn(2, 4, 3, 3, requires_grad=True)
    quantized, losses, codes = quantizer(z)
    upstream = torch.randn_like(quantized)
    (gradient,) = torch.autograd.grad(quantized, z, upstream, retain_graph=True)
    assert torch.equal(gradient, upstream)

    entries = quantizer.embedding.weight[codes].permute(0, 3, 1, 2)
    gap = (z - entries).detach()
    assert losses.codebook.item() == pytest.approx(gap.square().mean().item(), rel=1e-6)
    assert losses.commitment.item() == pytest.approx(0.25 * gap.square().mean().item(), rel=1e-6)
    (to_latent,) = torch.autograd.grad(losses.commitment, z, retain_graph=True)
    torch.testing.assert_close(to_latent, 0.25 * 2 * gap / gap.numel())
    (to_entries,) = torch.autograd.grad(losses.codebook, quantizer.embedding.weight)
    slow = torch.zeros_like(to_entries)
    for code, pull in zip(codes.flatten(), gap.permute(0, 2, 3, 1).reshape(-1, 4), strict=True):
        slow[code] -= 2 * pull / gap.numel()
    torch.testing.assert_close(to_entries, slow)


def test_entropy_loss_closed_forms():
    """All latents on one entry: sure (0) and unused codebook (0). Spread over V entries: -log V."""
    config = tiny_config(codebook_size=4, entropy_loss_ratio=0.5)
    quantizer = VQModel(config).quantize
    quantizer.embedding.weight.data = torch.eye(4)
    one = torch.eye(4)[:1].expand(8, 4)
    assert quantizer.entropy_loss(one).item() == pytest.approx(0.0, abs=1e-4)
    assert quantizer.entropy_loss(torch.eye(4)).item() == pytest.approx(
        -0.5 * math.log(4), abs=1e-4
    )


def test_usage_is_a_window_of_the_latest_codes():
    model = VQModel(tiny_config(codebook_size=10)).train()
    model.quantize.record_usage(torch.arange(10).repeat(USAGE_WINDOW // 5))
    assert model.quantize.usage() == 1.0
    model.quantize.record_usage(torch.full((USAGE_WINDOW - 3,), 7))
    assert model.quantize.codebook_used[:3].tolist() == [7, 8, 9]
    assert model.quantize.usage() == pytest.approx(0.3)
    before = model.quantize.codebook_used.clone()
    model.eval()(torch.zeros(1, 3, 8, 8))
    assert torch.equal(model.quantize.codebook_used, before)


def test_perplexity_of_the_window_against_counting():
    """While the window fills, only codes so far count; then the last 65,536, in whatever parts."""
    quantizer = VQModel(tiny_config(codebook_size=10)).quantize
    assert quantizer.usage() == 0
    seen, generator = [], torch.Generator().manual_seed(0)
    for size in (7, 1000, 60_000, 9_000):
        codes = torch.randint(0, 10, (size,), generator=generator).square() // 10
        quantizer.record_usage(codes.view(1, -1))
        seen += codes.tolist()
        window = seen[-USAGE_WINDOW:]
        shares = [window.count(c) / len(window) for c in set(window)]
        assert quantizer.perplexity() == pytest.approx(
            math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-6
        )
        assert quantizer.usage() == pytest.approx(len(shares) / 10)
        expected = (
            [c not in window for c in range(10)] if len(seen) >= USAGE_WINDOW else [False] * 10
        )
        assert quantizer.dead().tolist() == expected


def test_entropy_loss_in_chunks_has_the_gradient_of_the_whole():
    quantizer = fill_from_names(VQModel(tiny_config(entropy_loss_ratio=0.3))).quantize
    z = torch.nn.functional.normalize(torch.randn(50, 4), dim=1).requires_grad_()
    p = (-(z[:, None] - quantizer.codebook()[None]).square().sum(-1) / 0.01).softmax(-1)
    whole = 0.3 * (
        -(p * (p + 1e-30).log()).sum(-1).mean() + (p.mean(0) * (p.mean(0) + 1e-5).log()).sum()
    )
    chunked = quantizer.entropy_loss(z, chunk=16)
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-4)
    expected = torch.autograd.grad(whole, (z, quantizer.embedding.weight))
    for found, want in zip(
        torch.autograd.grad(chunked, (z, quantizer.embedding.weight)), expected, strict=True
    ):
        torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("l2_norm", [True, False])
def test_k_means_finds_clusters_and_data_takes_latents(l2_norm):
    """Eleven tight clusters: k-means ends nearer than its start; data entries are latents."""
    quantizer = VQModel(tiny_config(codebook_l2_norm=l2_norm)).quantize
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(11, 4, generator=generator)
    latents = (centres[:, None] + 0.01 * torch.randn(11, 40, 4, generator=generator)).flatten(0, 1)
    z = latents / latents.norm(dim=1, keepdim=True) if l2_norm else latents

    def error() -> float:
        return torch.cdist(z, quantizer.embedding.weight).min(1).values.square().mean().item()

    quantizer.fit(latents, 0, torch.Generator().manual_seed(1))
    gaps = (quantizer.embedding.weight[:, None] - z[None]).square().sum(-1)
    assert gaps.min(1).values.max() < 1e-12
    assert len(quantizer.embedding.weight.unique(dim=0)) == 11
    at_first = error()
    quantizer.fit(latents, 10, torch.Generator().manual_seed(1))
    assert error() < at_first / 2


def test_dead_entries_move_to_latents_and_others_stay():
    quantizer = fill_from_names(VQModel(tiny_config(codebook_l2_norm=False))).quantize
    before, latents = quantizer.embedding.weight.detach().clone(), torch.randn(20, 4)
    dead = torch.arange(11) % 3 == 0
    quantizer.move(dead, latents, torch.Generator().manual_seed(0))
    after = quantizer.embedding.weight.detach()
    assert torch.equal(after[~dead], before[~dead])
    assert all((row == latents).all(1).any() for row in after[dead])
