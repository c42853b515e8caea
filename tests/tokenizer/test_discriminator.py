"""The discriminators of the GAN loss."""

import pytest
import torch

from tokenizer import vq_loss
from tokenizer.discriminator import PatchGAN, StyleGAN, make_discriminator


def test_discriminators_are_the_published_ones():
    """Parameters counted from the papers' tables; 70 pixels reach each logit of PatchGAN."""
    with torch.device("meta"):
        patch, style = PatchGAN(), StyleGAN(256)
    convs = [(3, 64), (64, 128), (128, 256), (256, 512), (512, 1)]
    expected = sum(16 * a * b for a, b in convs) + 64 + 1 + 2 * (128 + 256 + 512)
    assert sum(p.numel() for p in patch.parameters()) == expected == 2_765_633
    widths = [64, 128, 256, 512, 512, 512, 512]  # at sides 256 ... 4
    blocks = sum(
        a * b + b + 9 * a * b + b + 2 * (9 * b * b + b)
        for a, b in zip(widths[:-1], widths[1:], strict=True)
    )
    ends = 27 * 64 + 64 + 9 * 512 * 512 + 512 + 16 * 512 * 512 + 512 + 512 + 1
    assert sum(p.numel() for p in style.parameters()) == blocks + ends
    assert patch(torch.zeros(2, 3, 256, 256, device="meta")).shape == (2, 1, 30, 30)
    assert style(torch.zeros(2, 3, 256, 256, device="meta")).shape == (2, 1)

    images = torch.zeros(1, 3, 128, 128, requires_grad=True)
    patch = make_discriminator("patchgan", 128)
    for norm in patch.norms:  # statistics over the whole image would reach further
        norm.forward = lambda x: x
    patch(images)[0, 0, 7, 7].backward()
    rows = images.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == 70


def test_style_blur_is_binomial():
    x = torch.zeros(1, 16, 5, 5)
    x[..., 2, 2] = 16.0
    from tokenizer.discriminator import StyleBlock

    expected = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])
    assert torch.equal(StyleBlock(4, 16).blur(x)[0, 3, 1:4, 1:4], expected)


@pytest.mark.parametrize("kind, size", [("patchgan", 16), ("stylegan", 48), ("stylegan", 4)])
def test_sizes_no_discriminator_takes_are_refused(kind, size):
    with pytest.raises(ValueError, match=f"--disc-type {kind}.*--image-size {size}"):
        vq_loss.make_discriminator(kind, size)
