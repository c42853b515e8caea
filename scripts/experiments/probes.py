"""Probes: small networks whose gain in held-out loss from seeing more estimates information.

Counting pairs of 1,024 x 1,024 values would take more images than there are. A figure is no bound:
it is too small by what a probe does not find in the tokens it is shown, and too large by what it,
or the GPT it corrects, does not find in what both losses see, if these tokens make up for that.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoregressive.models.gpt import GPT
from autoregressive.models.region_order import RegionOrder
from dataset.codes import Codes

N, SIDE = 4, 8  # regions of the pair probe's order; cells of a row
ORDER = RegionOrder.build(SIDE, N).permutation  # (T,)
WIDTH = 128
PAIR_BATCH, CHAIN_BATCH = 512, 32  # images


def mlp(width: int, inner: int, out: int) -> nn.Sequential:
    """Return a network of two hidden layers over a normed input."""
    layers = (nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU())
    return nn.Sequential(*layers, nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, out))


class PairProbe(nn.Module):
    """Logits of one token from its place, the class, and any of: the first four, another token."""

    def __init__(self, vocab_size: int, classes: int):
        super().__init__()
        self.start = nn.ModuleList(nn.Embedding(vocab_size + 1, WIDTH) for _ in range(N))
        self.label = nn.Embedding(classes, WIDTH)
        self.place = nn.Embedding(SIDE * SIDE, WIDTH)
        self.token = nn.Embedding(vocab_size, WIDTH)
        self.offset = nn.Embedding((2 * SIDE) ** 2, WIDTH)
        self.alone = mlp(WIDTH, 4 * WIDTH, vocab_size)
        self.paired = mlp(3 * WIDTH, 4 * WIDTH, vocab_size)
        nn.init.zeros_(self.paired[-1].weight)  # at first the other token changes nothing
        nn.init.zeros_(self.paired[-1].bias)

    def forward(
        self, label: Tensor, place: Tensor, start: Tensor, token: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B,), (B,), (B, N), (B,), (B,) -> logits (B, V) without and with the other token."""
        x = self.label(label) + self.place(place)  # (B, W)
        for i, table in enumerate(self.start):
            x = x + table(start[:, i])  # (B, W)
        alone = self.alone(x)  # (B, V)
        pair = torch.cat([x, self.token(token), self.offset(offset)], dim=-1)  # (B, 3W)
        return alone, alone + self.paired(pair)

    def losses(
        self, codes: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return losses (4, B) of a random token of each image, and its distance (B,) in cells.

        Rows: shown nothing, another token, the first four, both. codes: (B, T) raster.
        """
        batch, hidden = len(codes), self.token.num_embeddings
        rest = ORDER[N:]  # what is predicted after the first four
        chosen = torch.rand(batch, len(rest), generator=generator).argsort(1)[:, :2]  # (B, 2)
        place, other = rest[chosen].unbind(1)  # (B,) each
        rows = torch.arange(batch)
        target, seen, start = codes[rows, place], codes[rows, other], codes[:, ORDER[:N]]
        down, right = other // SIDE - place // SIDE, other % SIDE - place % SIDE  # (B,) each
        offset = (down + SIDE) * 2 * SIDE + right + SIDE  # (B,)
        logits = [
            each
            for shown in (torch.full_like(start, hidden), start)
            for each in self(labels, place, shown, seen, offset)
        ]
        losses = [F.cross_entropy(each, target, reduction="none") for each in logits]
        return torch.stack(losses), torch.hypot(down.float(), right.float())  # (4, B), (B,)


class ChainProbe(nn.Module):
    """Corrects a frozen GPT's prediction of a token by those of its group that come before it.

    The chain rule over a group: its total correlation, given the GPT's hidden states, is what
    seeing the tokens before saves. It is also that given all before the group only if the GPT uses
    all of it: of a GPT that sees nothing, copies have (n - 1) log V instead of 0.
    """

    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt = gpt.eval().requires_grad_(False)
        groups = [step for step in gpt.order.steps if step.end - step.first > 1]
        self.groups = torch.tensor([list(range(s.first, s.end)) for s in groups])  # (G, n)
        self.n, dim = self.groups.shape[1], gpt.config.dim
        rows = self.n * (gpt.config.vocab_size + 1)  # the last row of each slot: not shown
        self.token = nn.Embedding(rows, dim)
        self.slot = nn.Embedding(self.n, dim)
        self.layers = mlp(2 * dim, 2 * dim, dim)
        nn.init.zeros_(self.layers[-1].weight)  # at first the GPT's own prediction
        nn.init.zeros_(self.layers[-1].bias)

    def losses(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Return losses (2, B, G, n): shown none, shown those before. codes: (B, T) raster."""
        ordered, vocab = codes[:, self.gpt.permutation], self.gpt.config.vocab_size  # (B, T)
        with torch.no_grad():
            hidden = self.gpt.hidden(ordered, labels)[:, self.groups]  # (B, G, n, D)
        tokens = ordered[:, self.groups]  # (B, G, n)
        offset = torch.arange(self.n) * (vocab + 1)  # (n,)
        none = self.token(vocab + offset)  # (n, D)
        change = (self.token(tokens + offset) - none).cumsum(2)  # (B, G, n, D)
        before = F.pad(change, (0, 0, 1, -1)) + none.sum(0)  # (B, G, n, D)
        losses = []
        for seen in (none.sum(0).expand_as(before), before):
            x = torch.cat([hidden, seen + self.slot.weight], dim=-1)  # (B, G, n, 2D)
            logits = self.gpt.output(hidden + self.layers(x))  # (B, G, n, V)
            losses.append(F.cross_entropy(logits.movedim(-1, 1), tokens, reduction="none"))
        return torch.stack(losses)  # (2, B, G, n)


def draw(codes: Codes, images: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return codes (B, T) and labels (B,) of random crops."""
    x, y = codes.batch(images, rng.integers(codes.num_crops, size=len(images)))
    return torch.from_numpy(x), torch.from_numpy(y)


def fit(
    probe: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], codes: Codes, batch: int, steps: int
) -> None:
    """Train what of ``probe`` is not frozen on random images."""
    rng = np.random.default_rng(0)
    trained = [p for p in probe.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    decay = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        value = loss(*draw(codes, rng.integers(len(codes), size=batch), rng))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        decay.step()


def mutual_information(codes: Codes, held_out: Codes, steps: int) -> dict[str, list[float]]:
    """Return nats of mutual information of two tokens by distance, and their standard errors.

    Given the class, and given the first four tokens too; distance in cells, rounded.
    """
    torch.manual_seed(0)
    rng, generator = np.random.default_rng(1), torch.Generator().manual_seed(0)
    vocab, classes = codes.meta["codebook_size"], len(codes.meta["classes"])
    probe = PairProbe(vocab, classes)
    fit(probe, lambda x, y: probe.losses(x, y, generator)[0].mean(), codes, PAIR_BATCH, steps)
    gains, far = [], []
    with torch.no_grad():
        for _ in range(max(steps // 10, 10)):
            x, y = draw(held_out, rng.integers(len(held_out), size=PAIR_BATCH), rng)
            losses, distance = probe.losses(x, y, generator)
            gains.append(torch.stack([losses[0] - losses[1], losses[2] - losses[3]]))
            far.append(distance.round().long())
    gain, bins = torch.cat(gains, 1), torch.cat(far)  # (2, pairs), (pairs,)
    found: dict[str, list[float]] = {"distance": sorted(set(bins.tolist()))}
    for row, name in enumerate(("given the class", "given the first four too")):
        parts = [gain[row, bins == d] for d in found["distance"]]
        found[name] = [part.mean().item() for part in parts]
        errors = [part.std(correction=0) / len(part) ** 0.5 for part in parts]
        found[f"{name}, error"] = [error.item() for error in errors]
    return found


def total_correlation(
    gpt: GPT, codes: Codes, held_out: Codes, images: np.ndarray, steps: int
) -> np.ndarray:
    """Return nats (I, G): of each held-out image what each group's tokens tell of one another."""
    torch.manual_seed(0)
    probe = ChainProbe(gpt)
    fit(probe, lambda x, y: probe.losses(x, y).mean(), codes, CHAIN_BATCH, steps)
    found = []
    with torch.no_grad():
        for part in np.array_split(images, -(-len(images) // 100)):
            x, y = map(torch.from_numpy, held_out.batch(part, np.zeros_like(part)))
            alone, chained = probe.losses(x, y)  # (b, G, n) each
            found.append((alone - chained).sum(-1))  # (b, G)
    return torch.cat(found).numpy()
