"""What the demo page can do: models ready to decode, and the work of its requests.

Pictures come from the functions of sample_c2i.py and edit_c2i.py, so their command lines, which
every answer names, make the same bytes.
"""

from __future__ import annotations

import base64
import io
import math
import shlex
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from autoregressive.decoding.decoder import Decoder, Way, make_decoder, place_for_decoding
from autoregressive.decoding.generate import Generator
from autoregressive.decoding.sampling import SamplingOptions
from autoregressive.sample.canvas import mask_of_codes, open_canvas
from autoregressive.sample.classes import class_labels, class_names
from autoregressive.sample.edit import Edit, complete, encode
from autoregressive.sample.options import (
    JACOBI_STEPS,
    add_model_options,
    add_sampling_options,
    parse_sampler,
)
from autoregressive.sample.page.jobs import Job
from autoregressive.sample.pipeline import Pipeline, load_pipeline
from autoregressive.sample.trace import Trace
from utils.distributed import World
from utils.images import encode_gif, encode_png, enlarge_small, image_grid, labelled_rows, to_uint8

MOST_IMAGES = 16
MOST_CANDIDATES = 8
MOST_PIXELS = 1024  # side of an uploaded image
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # decoders that visitors can reach
FRAMES = 48  # of an animation, and told one by one
Work = Callable[[Job], None]
Body = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """One GPT with its tokenizer, ready to decode."""

    name: str
    words: list[str]  # of the command line that select it
    args: Namespace  # all options, resolved
    pipeline: Pipeline
    decoder: Decoder
    labels: list[str]  # of the classes
    way: Way  # of decoding

    def describe(self) -> dict[str, Any]:
        """Return what the page shows and offers."""
        order = self.pipeline.gpt.order
        return {
            "name": self.name,
            "classes": self.labels,
            "size": self.pipeline.image_size,
            "grid": order.grid,
            "n": order.n,
            "schedule": order.schedule,
            "layout": self.pipeline.gpt.config.order,
            "steps": len(order.steps),
            "vocabulary": self.pipeline.gpt.config.vocab_size,
            "defaults": {k: getattr(self.args, k) for k in ("cfg_scale", "top_k", "top_p")},
        }


def load_model(name: str, words: list[str], world: World, way: Way | None = None) -> Model:
    """Load the model that ``words`` of a sampler's command line select.

    way: of decoding (None: the fastest), so that models beside one another decode alike.
    """
    parser = ArgumentParser()
    add_model_options(parser)
    add_sampling_options(parser, cfg_scale=4.0, top_k=2000, compiled=False)
    args = parse_sampler(parser, words)
    args.compile = False if world.device.type == "cuda" else None  # every step is looked at
    pipeline = load_pipeline(args, world, compiled=False)
    if way is None or way not in pipeline.ways:
        way, _ = pipeline.choose_way(1)
    gpt = place_for_decoding(pipeline.gpt, way.dtype, world.device)
    decoder = make_decoder(gpt, way, 2 * MOST_IMAGES * gpt.order.n)
    labels = class_labels(list(range(gpt.config.num_classes)), class_names(pipeline))
    return Model(name, words, args, pipeline, decoder, labels, way)


def number(body: Body, name: str, low: float, high: float, default: float) -> float:
    """Return a number of a request; ``ValueError`` unless it is in [low, high]."""
    value = body.get(name, default)
    if type(value) not in (int, float) or not low <= value <= high:
        raise ValueError(f"{name}: expected a number from {low:,} to {high:,}")
    return value


def whole(body: Body, name: str, low: int, high: int, default: int) -> int:
    """Return a whole number of a request."""
    value = number(body, name, low, high, default)
    if value != int(value):
        raise ValueError(f"{name}: expected a whole number")
    return int(value)


def data_url(pixels: np.ndarray) -> str:
    """Return uint8 (H, W, 3) as a PNG in a URL."""
    return f"data:image/png;base64,{base64.b64encode(encode_png(pixels)).decode()}"


def uploaded(body: Body, name: str) -> Image.Image:
    """Return a picture of a request, its header read; ``ValueError`` if it is none or too large."""
    _, _, content = str(body.get(name, "")).partition(",")
    try:
        raw = base64.b64decode(content, validate=True)
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
    except (ValueError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: not a picture that can be read") from error
    if max(image.size) > MOST_PIXELS:
        raise ValueError(f"{name}: expected a picture of at most {MOST_PIXELS} pixels a side")
    return image


def as_file(image: Image.Image, name: str) -> io.BytesIO:
    """Decode a picture of a request and return it as a PNG file."""
    content = io.BytesIO()
    try:
        ImageOps.exif_transpose(image).convert("RGB").save(content, format="PNG")
    except Exception as error:  # a damaged picture may break its decoder in any way
        raise ValueError(f"{name}: not a picture that can be read") from error
    content.seek(0)
    return content


class Studio:
    """The models by name, and what can be asked of them."""

    def __init__(self, models: list[Model]):
        self.models = {model.name: model for model in models}

    def list_models(self, _: dict[str, str]) -> dict[str, Any]:
        """Answer with the models and the limits."""
        models = [model.describe() for model in self.models.values()]
        return {"models": models, "images": MOST_IMAGES, "candidates": MOST_CANDIDATES}

    def _model(self, name: object) -> Model:
        if not isinstance(name, str) or name not in self.models:
            raise ValueError(f"model: expected one of {', '.join(self.models)}")
        return self.models[name]

    def _options(self, body: Body, model: Model) -> tuple[Pipeline, dict[str, Any]]:
        """Return the model's pipeline with the request's sampling, and that by option names."""
        defaults = model.args
        options: dict[str, Any] = {
            "cfg_scale": number(body, "cfg_scale", 1, 20, defaults.cfg_scale),
            "temperature": number(body, "temperature", 0, 10, 1.0),
            "top_k": whole(body, "top_k", 0, 1 << 20, defaults.top_k),
            "top_p": number(body, "top_p", 0.001, 1, defaults.top_p),
            "seed": whole(body, "seed", 0, 2**31 - 1, 0),
        }
        jacobi = body.get("jacobi") is True
        sampling = {k: v for k, v in options.items() if k != "seed"}
        noise = "gumbel" if jacobi else "uniform"
        window = JACOBI_STEPS if jacobi else 1
        pipeline = replace(
            model.pipeline, options=SamplingOptions(**sampling, noise=noise), window=window
        )
        return pipeline, options | ({"jacobi": JACOBI_STEPS} if jacobi else {})

    def generate(self, body: Body) -> Work:
        """Return the work of a request for images of one class, by one model or two."""
        names = body.get("models")
        if not isinstance(names, list) or not 1 <= len(names) <= 2:
            raise ValueError("models: expected one name or two")
        models = [self._model(name) for name in names]
        count = whole(body, "images", 1, MOST_IMAGES, 4)
        most = min(len(model.labels) for model in models) - 1
        label = whole(body, "class", 0, most, 0)
        drawn = [Drawing(m, *self._options(body, m), label, count) for m in models]

        def work(job: Job) -> None:
            for i, drawing in enumerate(drawn):
                drawing.run(job, i)
            job.tell("finished")

        return work

    def edit(self, body: Body) -> Work:
        """Return the work of a request to make a part of an image anew."""
        model = self._model(body.get("model"))
        pipeline, options = self._options(body, model)
        image, mask = uploaded(body, "image"), uploaded(body, "mask")
        if image.size != mask.size:
            raise ValueError(f"mask: its size {mask.size} is not the image's, {image.size}")
        candidates = whole(body, "candidates", 1, MOST_CANDIDATES, 1)
        label = whole(body, "class", 0, len(model.labels) - 1, 0)
        size, order = pipeline.image_size, pipeline.gpt.order

        def work(job: Job) -> None:
            files = as_file(image, "image"), as_file(mask, "mask")
            pixels, masked = open_canvas(files[0], size, files[1])
            anew = mask_of_codes(masked, order.grid)  # (h, w)
            if not anew.any():
                raise ValueError("mask: nothing is painted, so there is nothing to draw again")
            generator = Generator(
                model.decoder, order, pipeline.options, candidates, True, pipeline.window
            )
            edit = Edit(pixels, encode(pipeline, pixels), anew, generator)
            randomness = pipeline.randomness(options["seed"], range(candidates))
            job.tell("start", steps=len(order.steps), anew=int(anew.sum()), codes=anew.size)
            trace, started = Trace(pipeline, FRAMES), time.perf_counter()
            made = complete(pipeline, edit, label, randomness, candidates, 0, trace)
            seconds = time.perf_counter() - started
            shown = np.concatenate([made.results, made.candidates[0]])  # (1 + K, S, S, 3)
            job.files["edit.png"] = "image/png", encode_png(made.results[0])
            job.files["image.png"] = "image/png", encode_png(pixels)
            job.files["mask.png"] = "image/png", encode_png(masked.astype(np.uint8) * 255)
            frames = [image_grid(enlarge_small(frame), candidates) for frame in trace.frames]
            job.files["edit.gif"] = "image/gif", encode_gif(frames)
            words = {"image": "image.png", "mask": "mask.png", "classes": label, "trace": None}
            words |= {"candidates": candidates} if candidates > 1 else {}
            command = command_line("edit_c2i.py", model, words | options, "edit.png")
            job.tell(
                "done",
                images=[data_url(image) for image in shown],
                covered=data_url(edit.covered()),
                likelihoods=made.likelihoods[0].tolist(),
                seconds=seconds,
                calls=generator.calls,
                files=list(job.files),
                command=command,
            )
            job.tell("finished")

        return work


def command_line(script: str, model: Model, options: dict[str, Any], output: str) -> str:
    """Return the command line that makes the same picture."""
    way = model.way
    words = ["python3", f"autoregressive/sample/{script}", *model.words]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}"] + ([] if value is None else [str(value)])
    words += ["--precision", way.precision, "--compile" if way.compiled else "--no-compile"]
    return shlex.join([*words, "--output", output])


@dataclass(frozen=True)
class Drawing:
    """Images of one class by one model, told step by step."""

    model: Model
    pipeline: Pipeline
    options: dict[str, Any]
    label: int
    count: int

    def run(self, job: Job, place: int) -> None:
        """Draw; ``place`` tells the models of a request apart."""
        pipeline, count = self.pipeline, self.count
        order, device = pipeline.gpt.order, pipeline.world.device
        job.tell("start", place=place, count=count, **self.model.describe())
        generator = Generator(
            self.model.decoder, order, pipeline.options, count, window=pipeline.window
        )
        trace, shown = Trace(pipeline, FRAMES), [0.0]  # seconds spent on showing

        def show(tokens: Tensor, decoded: int) -> None:
            began = time.perf_counter()
            before = len(trace.frames)
            trace(tokens, decoded)
            if len(trace.frames) > before:
                strip = data_url(image_grid(trace.frames[-1], count, padding=0))
                facts = {"decoded": decoded, "call": generator.calls, "strip": strip}
                job.tell("step", place=place, **facts)
            shown[0] += time.perf_counter() - began

        cond = torch.full((count,), self.label, device=device)  # (B,)
        randomness = pipeline.randomness(self.options["seed"], range(count))  # (B, T)
        began = time.perf_counter()
        codes = generator(cond, randomness, show)  # (B, T)
        seconds = time.perf_counter() - began - shown[0]

        images = to_uint8(pipeline.decode(codes)).cpu().numpy()  # (B, S, S, 3)
        name = f"{self.model.name}.png"
        picture = labelled_rows(images[None], [self.model.labels[self.label]])
        job.files[name] = "image/png", encode_png(picture)
        grids = [image_grid(enlarge_small(frame), count) for frame in trace.frames]
        job.files[f"{self.model.name}.gif"] = "image/gif", encode_gif(grids)
        words: dict[str, Any] = {"classes": self.label, "images_per_class": count}
        words |= {"trace": None, "trace_frames": FRAMES}
        job.tell(
            "done",
            place=place,
            seconds=seconds,
            calls=generator.calls,
            decoder=str(self.model.way),
            files=[name, f"{self.model.name}.gif"],
            command=command_line("sample_c2i.py", self.model, words | self.options, name),
            **self.certainty(generator, cond, codes),
        )

    def certainty(self, generator: Generator, cond: Tensor, codes: Tensor) -> dict[str, Any]:
        """Return, per image and raster cell, the entropy in bits before its code was drawn, and
        the probability that it had: of the guided logits, at temperature 1, nothing cut off.
        """
        inverse, permutation = generator.inverse, generator.permutation
        entropies, probabilities = [], []
        for i in range(len(cond)):  # one at a time: (T, V) numbers each
            log_p = generator.logits(cond[i : i + 1], codes[i : i + 1])[0].log_softmax(-1)  # (T, V)
            entropy = -(log_p.exp() * log_p).nan_to_num().sum(-1) / math.log(2)  # (T,)
            drawn = log_p.gather(-1, codes[i, permutation][:, None])[:, 0].exp()  # (T,)
            entropies.append([round(x, 3) for x in entropy[inverse].tolist()])
            probabilities.append([round(x, 4) for x in drawn[inverse].tolist()])
        return {"entropy": entropies, "probability": probabilities}
