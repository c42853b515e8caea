"""Seconds per image of each stage on this machine, from a few steps of each model."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from autoregressive.models.config import GPT_models, GPTConfig
from autoregressive.models.gpt import GPT
from evaluations.c2i.classifier import ClassifierConfig, SmallClassifier
from evaluations.c2i.inception import Inception2015
from scripts.own_images.choices import Tokenizer
from tokenizer.load import load_vq
from tokenizer.vq_loss import find_vgg, load_lpips
from tokenizer.vq_model import VQModel, make_vq_config
from utils.distributed import init_distributed
from utils.performance import usable_cores
from utils.precision import autocast, resolve_precision

COMMANDS = 11  # Python programs that are started
KERNELS = 12.0  # seconds to build and time the kernels that a CPU samples with


def open_tokenizer(path: str) -> Tokenizer:
    """Return the tokenizer of a file; ``ValueError`` if it holds none."""
    vq, name = load_vq(path, None)
    return Tokenizer(path, name, vq.config.downsample, vq.config.codebook_size)


class Machine:
    """Measures once what the plan asks for; all results are seconds per image."""

    def __init__(self, started: float, startup: float) -> None:
        """started: when this program began, by ``time.time()``; startup: seconds to start one."""
        self.started, self.startup = started, startup
        self.device = init_distributed(connect=False).device
        self.cores = usable_cores()
        self.precision = resolve_precision("auto", self.device)[0]
        fast = self.device.type == "cuda"
        self.vq_batch, self.gpt_batch = (64, 64) if fast else (8, 16)
        # LPIPS costs a CPU more than the tokenizer
        self.perceptual = fast and find_vgg(None) is not None

    def overhead(self) -> float:
        """Return the seconds spent until now and those that starting the programs will take."""
        return time.time() - self.started + COMMANDS * self.startup + KERNELS

    @cache  # noqa: B019 - one object per program
    def train_tokenizer(self, vq: Tokenizer, size: int) -> float:
        """A training step without discriminator."""
        model = self._tokenizer(vq).train()
        model.requires_grad_(True)
        x = self._pictures(self.vq_batch, size)
        lpips = load_lpips(None).to(self.device) if self.perceptual else None

        def loss() -> torch.Tensor:
            y, losses, _ = model(x)
            return (y - x).square().mean() + sum(losses) + (lpips(x, y).mean() if lpips else 0)

        return self._train(model, loss, self.vq_batch)

    @cache  # noqa: B019
    def code(self, vq: Tokenizer, size: int) -> tuple[float, float]:
        """To encode, to decode."""
        model, x = self._tokenizer(vq).eval(), self._pictures(self.vq_batch, size)
        with torch.inference_mode():
            codes = model.encode(x)
            encode = self._time(lambda: model.encode(x), self.vq_batch)
            return encode, self._time(lambda: model.decode_code(codes), self.vq_batch)

    @cache  # noqa: B019
    def train_gpt(self, name: str, grid: int, codebook: int, n: int, dropout: float) -> float:
        """A training step."""
        config = GPTConfig(
            **GPT_models[name],
            vocab_size=codebook,
            grid_height=grid,
            grid_width=grid,
            ar_token_num=n,
            token_dropout_p=dropout,
            attn_dropout_p=0.0,
            resid_dropout_p=dropout,
            ffn_dropout_p=dropout,
        )
        model = GPT(config).to(self.device)
        model.init_weights()
        codes = torch.randint(codebook, (self.gpt_batch, grid * grid), device=self.device)
        labels = torch.zeros(self.gpt_batch, dtype=torch.int64, device=self.device)
        return self._train(model, lambda: model(codes, labels)[0], self.gpt_batch)

    @cache  # noqa: B019
    def train_classifier(self, size: int) -> float:
        """A training step of the classifier."""
        model, x = (
            SmallClassifier(ClassifierConfig(size, 10)).to(self.device),
            self._pictures(64, size),
        )
        return self._train(model, lambda: model.logits(x).square().mean(), 64)

    @cache  # noqa: B019
    def inception(self, size: int) -> float:
        """To compute the features of the Inception network."""
        model = Inception2015().to(self.device).eval()
        x = torch.zeros(16, size, size, 3, dtype=torch.uint8, device=self.device)
        with torch.inference_mode():
            return self._time(lambda: model(x), 16)

    def _tokenizer(self, vq: Tokenizer) -> VQModel:
        if vq.path:
            model = load_vq(vq.path, None)[0]
        else:
            model = VQModel(make_vq_config(vq.name, codebook_size=vq.codebook))
            model.init_weights()
        return model.to(self.device)

    def _pictures(self, batch: int, size: int) -> torch.Tensor:
        return torch.rand(batch, 3, size, size, device=self.device) * 2 - 1  # (B, 3, S, S)

    def _train(self, model: nn.Module, loss: Callable[[], torch.Tensor], images: int) -> float:
        model.train()
        optimizer = torch.optim.AdamW(model.parameters())

        def step() -> None:
            with autocast(self.device, self.precision):
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()

        return self._time(step, images)

    def _time(self, work: Callable[[], object], images: int) -> float:
        """Return the seconds per image of ``work``, after one call to warm up: one second or two
        calls."""
        work()
        self._wait()
        calls, started = 0, time.perf_counter()
        while calls < 2 or time.perf_counter() - started < 1.0:
            work()
            self._wait()
            calls += 1
        return (time.perf_counter() - started) / calls / images

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
