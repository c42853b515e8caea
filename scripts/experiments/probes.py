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
    """Logits of one token from its place, the class, and any of: another token, the first four."""

    def __init__(self, vocab_size: int, classes: int, tokens: int):
        super().__init__()
        self.token = nn.Embedding(vocab_size + 1, WIDTH)  # the last row: not shown
        self.start = nn.ModuleList(nn.Embedding(vocab_size + 1, WIDTH) for _ in range(N))
        self.label = nn.Embedding(classes, WIDTH)
        self.place = nn.Embedding(tokens, WIDTH)
        self.offset = nn.Embedding(tokens * tokens + 1, WIDTH)  # the last row: none shown
        self.layers = mlp(WIDTH, 4 * WIDTH, vocab_size)

    def forward(
        self, label: Tensor, place: Tensor, pair: Tensor, token: Tensor, start: Tensor
    ) -> Tensor:
        """(B,), (B,), (B,), (B,), (B, N) -> (B, V)."""
        x = self.label(label) + self.place(place) + self.offset(pair) + self.token(token)  # (B, W)
        for i, table in enumerate(self.start):
            x = x + table(start[:, i])  # (B, W)
        return self.layers(x)  # (B, V)

    def losses(
        self, codes: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return losses (4, B) of a random token of each image, and the pair (B,) of places.

        Rows: shown nothing, another token, the first four, both. codes: (B, T) raster.
        """
        batch, tokens = codes.shape
        hidden = self.token.num_embeddings - 1
        rest = ORDER[N:]  # what is predicted after the first four
        chosen = torch.rand(batch, len(rest), generator=generator).argsort(1)[:, :2]  # (B, 2)
        place, other = rest[chosen].unbind(1)  # (B,) each
        rows = torch.arange(batch)
        target, seen, start = codes[rows, place], codes[rows, other], codes[:, ORDER[:N]]
        pair, none = place * tokens + other, torch.full((batch,), tokens * tokens)  # (B,)
        no_token, no_start = torch.full((batch,), hidden), torch.full((batch, N), hidden)
        shown = ((none, no_token, no_start), (pair, seen, no_start))
        shown += ((none, no_token, start), (pair, seen, start))
        losses = [
            F.cross_entropy(self(labels, place, *given), target, reduction="none")
            for given in shown
        ]
        return torch.stack(losses), pair  # (4, B), (B,)


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
    probe = PairProbe(vocab, classes, SIDE * SIDE)
    fit(probe, lambda x, y: probe.losses(x, y, generator)[0].mean(), codes, PAIR_BATCH, steps)
    gains, far = [], []
    with torch.no_grad():
        for _ in range(max(steps // 10, 10)):
            x, y = draw(held_out, rng.integers(len(held_out), size=PAIR_BATCH), rng)
            losses, pair = probe.losses(x, y, generator)
            a, b = pair // SIDE**2, pair % SIDE**2
            distance = torch.hypot(a // SIDE - b // SIDE + 0.0, a % SIDE - b % SIDE + 0.0)
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
