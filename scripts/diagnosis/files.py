"""The user's files: whether checkpoints, codes and images are whole, sane and belong together."""

from __future__ import annotations

import hashlib
import os
import time
from argparse import Namespace
from collections import Counter
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path

import numpy as np
from torch import Tensor

from autoregressive.models.config import GPTConfig
from autoregressive.models.load import load_gpt
from dataset.codes import open_codes
from dataset.imagenet import list_images, open_image
from dataset.interface import Codes
from dataset.shards import finished_damage
from scripts.diagnosis.check import BROKEN, OK, Context, NotHere, Result, reason_of
from tokenizer.load import load_vq
from utils.checkpoints.folder import read_meta, read_sharded
from utils.checkpoints.weights_file import state_sha256
from utils.records import build

SAMPLED_IMAGES = 64  # files that are opened
SAMPLED_CODES = 20_000  # images whose codes are counted
VERIFYING_SECONDS = 40.0  # shards are verified for as long
LEAST_USAGE = 0.01  # share of the codebook that occurs; less is a dead codebook
FEW_IMAGES = 10  # of a class
SPLITS = {"train", "val", "valid", "validation", "test"}  # folders of classes, not classes


@dataclass(frozen=True)
class GPTFile:
    """What a GPT's checkpoint says."""

    config: GPTConfig
    name: str
    facts: dict
    state: dict[str, Tensor]


def open_gpt(path: str) -> GPTFile:
    """Return what a file of weights, or the folder of a training checkpoint, holds."""
    if (Path(path) / "meta.json").is_file():
        meta = read_meta(Path(path))
        config = meta.get("config")
        if not isinstance(config, dict) or config.keys() != {f.name for f in fields(GPTConfig)}:
            raise ValueError(f"{path} is a checkpoint of another model, not of a GPT")
        return GPTFile(
            build(GPTConfig, config, f"{path}: its config"),
            str(meta.get("gpt_model")),
            meta,
            read_sharded(Path(path), "model."),
        )
    model, name, facts = load_gpt(path, None)
    return GPTFile(model.config, name, facts, model.state_dict())


def not_finite(state: dict[str, Tensor]) -> list[str]:
    """Return the names of tensors that hold a NaN or an infinity."""
    return [
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and not tensor.isfinite().all()
    ]


def check_gpt(context: Context) -> Result:
    """Check that ``--gpt-ckpt`` loads whole and that every weight is a finite number."""
    path = context.options.gpt_ckpt
    gpt = open_gpt(path)
    if bad := not_finite(gpt.state):
        return Result(
            BROKEN, f"{path}: {len(bad)} of its tensors hold NaN or infinity, the first is {bad[0]}"
        )
    config, count = gpt.config, sum(t.numel() for t in gpt.state.values())
    if not gpt.state["output.weight"].any():
        return Result(
            BROKEN, f"{path}: the output layer is all zeros, as before the first step of training"
        )
    detail = (
        f"{gpt.name}, {count / 1e6:,.1f}M parameters, n = {config.ar_token_num}, "
        f"{config.num_classes} classes, {config.grid_height}x{config.grid_width} codes "
        f"of {config.vocab_size}"
    )
    if "steps" in gpt.facts:
        detail += f", after {gpt.facts['steps']:,} steps"
    return Result(OK, detail, figures={"parameters": count})


def check_vq(context: Context) -> Result:
    """Check that ``--vq-ckpt`` loads whole, its weights, and how much of its codebook was used."""
    path = context.options.vq_ckpt
    vq, name = load_vq(path, None)
    if bad := not_finite(vq.state_dict()):
        return Result(
            BROKEN, f"{path}: {len(bad)} of its tensors hold NaN or infinity, the first is {bad[0]}"
        )
    config = vq.config
    detail = f"{name}, {config.downsample} pixels per code, codebook of {config.codebook_size}"
    usage = vq.quantize.usage()
    if usage == 0.0:
        return Result(OK, f"{detail}; it does not say which codes it used in training")
    detail += f", {usage:.0%} of it used by the latest codes of training"
    return Result(OK if usage >= LEAST_USAGE else BROKEN, detail, figures={"codebook usage": usage})


def damaged_shards(folder: str, codes: Codes) -> tuple[list[str], int]:
    """Verify shards in random order while there is time; return what is wrong, and their count."""
    order = np.random.default_rng(0).permutation(len(codes.meta["shards"]))
    damaged, ended, started = [], 0, time.monotonic()
    for shard in order:
        if damage := finished_damage(folder, codes.meta, int(shard)):
            damaged.append(f"{codes.meta['shards'][shard]['file']} ({damage})")
        ended += 1
        if time.monotonic() - started > VERIFYING_SECONDS:
            break
    return damaged, ended


def count_codes(codes: Codes) -> np.ndarray:
    """Return how often each code occurs in ``SAMPLED_CODES`` images, one crop of each: (V,)."""
    spread = np.linspace(0, len(codes) - 1, min(SAMPLED_CODES, len(codes)))
    images = np.unique(spread.astype(np.int64))  # (N,)
    counts = np.zeros(0, np.int64)
    for part in np.array_split(images, -(-len(images) // 1024)):
        more = np.bincount(
            codes.gather(part, part % codes.num_crops).ravel(), minlength=len(counts)
        )
        more[: len(counts)] += counts
        counts = more
    return counts


def check_codes(context: Context) -> Result:
    """Check that ``--code-path`` is whole, and how codes and classes are spread."""
    folder = context.options.code_path
    codes = open_codes(folder)
    verified = "published layout, without checksums"
    if codes.meta:
        damaged, ended = damaged_shards(folder, codes)
        if damaged:
            return Result(
                BROKEN,
                f"{len(damaged)} of {ended} verified shards are damaged, such as {damaged[0]}",
            )
        total = len(codes.meta["shards"])
        verified = (
            f"all {total} shards whole"
            if ended == total
            else f"{ended} of {total} shards verified, all whole"
        )
    size, counts = codes.meta.get("codebook_size", 16384), count_codes(codes)
    per_class = np.bincount(codes.labels, minlength=codes.num_classes)  # (K,)
    if len(counts) > size or len(per_class) > codes.num_classes:
        largest = (
            f"code {len(counts) - 1} of {size}, class {len(per_class) - 1} of {codes.num_classes}"
        )
        return Result(BROKEN, f"a code or class is beyond the last one: {largest} (counted from 0)")
    probability = counts[counts > 0] / counts.sum()
    perplexity = float(np.exp(-(probability * np.log(probability)).sum()))
    usage = len(probability) / size
    detail = (
        f"{len(codes):,} images x {codes.num_crops} crops, {verified}; {codes.num_classes} classes "
        f"of {per_class.min():,} to {per_class.max():,} images; {usage:.0%} of {size:,} codes "
        f"occur, perplexity {perplexity:,.0f}"
    )
    figures = {
        "images": len(codes),
        "classes": codes.num_classes,
        "codebook usage": usage,
        "perplexity": perplexity,
    }
    empty = int((per_class == 0).sum())
    if empty:
        return Result(BROKEN, f"{detail}: {empty} classes have no image", figures=figures)
    dead = usage < LEAST_USAGE and counts.sum() > 4 * size
    return Result(BROKEN if dead else OK, detail + ": a dead codebook" * dead, figures=figures)


def check_images(context: Context) -> Result:
    """Check the class folders of ``--data-path`` and open some of the files."""
    root = context.options.data_path
    listing = list_images(root)
    names, counts = listing.classes, Counter(label for _, label in listing.samples)
    if set(names) <= SPLITS:
        advice = f"give the folder of classes itself, such as --data-path {Path(root) / names[0]}"
        return Result(BROKEN, f"{', '.join(names)} would be the classes", advice)
    if empty := [name for i, name in enumerate(names) if not counts[i]]:
        advice = "fill these folders or delete them: each would count as a class"
        return Result(
            BROKEN,
            f"{len(empty)} of {len(names)} class folders hold no image, such as {empty[0]}",
            advice,
        )
    chosen = np.unique(np.linspace(0, len(listing.samples) - 1, SAMPLED_IMAGES).astype(int))
    unreadable, sides = [], []
    for i in chosen:
        try:
            sides.append(min(open_image(listing.samples[i][0]).size))
        except (ValueError, OSError) as error:
            unreadable.append(reason_of(error))
    if unreadable:
        advice = "replace or delete such files; extraction would leave them out (skipped.json)"
        return Result(
            BROKEN, f"{len(unreadable)} of {len(chosen)} opened files fail: {unreadable[0]}", advice
        )
    smallest = min(counts.values())
    few = f" (fewer than {FEW_IMAGES} are hard to learn from)" if smallest < FEW_IMAGES else ""
    detail = (
        f"{len(listing.samples):,} images in {len(names)} classes of {smallest:,}{few} to "
        f"{max(counts.values()):,}; {len(chosen)} of them opened, shorter sides {min(sides)} "
        f"to {max(sides)} pixels"
    )
    return Result(OK, detail, figures={"images": len(listing.samples), "classes": len(names)})


def facts_of(options: Namespace) -> dict[str, dict[str, object]]:
    """Return what each given file says of the others, as option -> name of a fact -> its value."""
    facts: dict[str, dict[str, object]] = {}
    if options.vq_ckpt is not None:
        vq = load_vq(options.vq_ckpt, None)[0]
        sha256, size = state_sha256(vq.weights()), vq.config.codebook_size
        facts["--vq-ckpt"] = {"tokenizer": sha256, "codebook size": size}
    if options.gpt_ckpt is not None:
        gpt = open_gpt(options.gpt_ckpt)
        facts["--gpt-ckpt"] = {
            "tokenizer": gpt.facts.get("tokenizer_sha256"),
            "codebook size": gpt.config.vocab_size,
            "number of classes": gpt.config.num_classes,
            "class names": gpt.facts.get("classes"),
        }
        if "config" in gpt.facts:  # a released file does not say its grid
            facts["--gpt-ckpt"]["code grid"] = [gpt.config.grid_height, gpt.config.grid_width]
    if options.code_path is not None and (meta := open_codes(options.code_path).meta):
        facts["--code-path"] = {
            "tokenizer": meta["tokenizer_sha256"],
            "codebook size": meta["codebook_size"],
            "number of classes": len(meta["classes"]),
            "class names": list(meta["classes"]),
            "code grid": list(meta["grid"]),
            "list of images": meta.get("source_sha256"),
        }
    if options.data_path is not None:
        listing = list_images(options.data_path)
        relative = [os.path.relpath(path, options.data_path) for path, _ in listing.samples]
        facts["--data-path"] = {
            "number of classes": len(listing.classes),
            "class names": list(listing.classes),
            # as extract_codes_c2i.py records it
            "list of images": hashlib.sha256(b"\n".join(map(os.fsencode, relative))).hexdigest(),
        }
    return facts


def check_together(context: Context) -> Result:
    """Check that the given files belong together: tokenizer, codebook, classes, grid, images."""
    facts, equal, different = facts_of(context.options), set(), []
    for (a, facts_a), (b, facts_b) in combinations(facts.items(), 2):
        for name in facts_a.keys() & facts_b.keys():
            if facts_a[name] is None or facts_b[name] is None:
                continue
            if facts_a[name] == facts_b[name]:
                equal.add(name)
                continue
            numbers = isinstance(facts_a[name], int) or name == "code grid"
            values = f" ({facts_a[name]}, {facts_b[name]})" if numbers else ""
            different.append(f"{name} of {a} and {b}{values}")
    if different:
        return Result(BROKEN, f"these differ: {'; '.join(sorted(different))}")
    if not equal:
        raise NotHere("the given files say nothing of each other")
    return Result(OK, f"the files agree in {', '.join(sorted(equal))}")
