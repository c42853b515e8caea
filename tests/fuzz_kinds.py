"""The kinds of files that ``tests/fuzz.py`` damages: whole ones, how each is read, and how a wrong
value is written into it under right checksums.
"""

from __future__ import annotations

import json
import struct
import tarfile
import zipfile
from argparse import Namespace
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image

from autoregressive.models.gpt import GPT
from evaluations.c2i import inception
from evaluations.c2i.classifier import ClassifierConfig, SmallClassifier, save_classifier
from scripts.diagnosis.models import fill_from_names
from tests.evaluations.c2i.helpers import attribute, constant, field
from tests.fuzz import WRONG, Kind, damage_json
from tests.fuzz_readers import (
    PLAN,
    WORLD,
    convert,
    evaluate,
    export,
    extract_again,
    graph,
    inspect,
    picture,
    records,
    resume,
    sample_with,
    tokenizer,
    train_on,
    trained_state,
)
from tests.helpers import (
    small_config,
    write_all,
)
from tokenizer.vq_model import VQConfig, VQModel, make_vq_config
from utils.checkpoints.folder import write_meta
from utils.checkpoints.weights_file import _save_safetensors, load_checkpoint, save_checkpoint
from utils.files import sha256_file
from utils.training.run_folder import RunFolder

RNG = np.random.Generator
NO_SUM = "files of other projects carry no checksum"


def reseal_codes_meta(rng: RNG, folder: Path) -> str:
    return _reseal(rng, folder / "meta.json")


def _reseal(rng: RNG, path: Path) -> str:
    facts = json.loads(path.read_text())
    facts.pop("meta_sha256", None)
    what, facts = damage_json(rng, facts)
    write_meta(path.parent, facts)
    return f"{path.parent.name}/{path.name}, sealed: {what}"


def reseal_array(rng: RNG, path: Path) -> str:
    """Give an array of an ``.npz`` another header, and checksums that agree."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = sorted(members)[int(rng.integers(len(members)))]
    data = members[name]
    start = 10 + int.from_bytes(data[8:10], "little")
    header = {"descr": "<u2", "fortran_order": False, "shape": (5, 2, 4)}
    header |= eval(data[10:start], {})  # of a file that we wrote
    which = str(rng.choice(["descr", "shape", "fortran_order", "text"]))
    wrong: list[Any] = {
        "descr": ["|O", "<f4", "<U4", "V8", [("a", "<u2")], *WRONG],
        "shape": [(1 << 36,), (-1,), (1 << 32, 1 << 32), (1 << 36, 0), (), (5,), *WRONG],
        "fortran_order": [w for w in WRONG if w is not True],
        "text": ["{" * 5000, "{'descr': ", "\0" * 64, "(" * 200, " " * 60_000],
    }[which]
    value = wrong[int(rng.integers(len(wrong)))]
    text = value if which == "text" else repr(header | {which: value})
    members[name] = data[:8] + struct.pack("<H", len(text)) + text.encode() + data[start:]
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return f"{path.name}, {name}: {which} = {value!r:.60}"


def reseal_shard(rng: RNG, folder: Path) -> str:
    what = reseal_array(rng, folder / "shards" / "00001.npz")
    meta = json.loads((folder / "meta.json").read_text())
    meta.pop("meta_sha256", None)
    meta["shards"][1]["sha256"] = sha256_file(folder / "shards" / "00001.npz")
    write_meta(folder, meta)
    return what


def reseal_checkpoint(rng: RNG, folder: Path) -> str:
    """Write a wrong value into ``meta.json`` or the header of a shard; sizes and hashes agree."""
    checkpoint = folder / "0000002"
    if rng.random() < 0.6:
        return _reseal(rng, checkpoint / "meta.json")
    (path,) = checkpoint.glob("*.safetensors")
    what = damage_header(rng, path)
    meta = read_meta_unchecked(checkpoint)
    meta["files"][path.name] = path.stat().st_size
    if path.name in meta["sha256"]:
        meta["sha256"][path.name] = sha256_file(path)
    write_meta(checkpoint, meta)
    return what


def read_meta_unchecked(folder: Path) -> dict[str, Any]:
    meta = json.loads((folder / "meta.json").read_text())
    meta.pop("meta_sha256", None)
    return meta


def damage_header(rng: RNG, path: Path) -> str:
    """Write a wrong value into a safetensors header."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    what, header = damage_json(rng, header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return f"{path.name}: header {what}"


def reseal_weights(rng: RNG, folder: Path, name: str) -> str:
    """Write a wrong fact into a file of weights, with a hash that agrees."""
    path = folder / name
    content = load_checkpoint(path, "")
    weights = content.pop("model")
    what, facts = damage_json(rng, content)
    if path.suffix == ".safetensors":
        _save_safetensors(weights, facts, path)
    else:
        save_checkpoint({"model": weights, **facts}, path)
    return f"{name}, sealed: {what}"


class Weights:
    """Stands for the state of a training of which only the weights matter."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        self.weights = weights

    def tensors(self) -> dict[str, torch.Tensor]:
        return {f"model.{name}": value for name, value in self.weights.items()}

    def scalars(self) -> dict[str, Any]:
        return {"guard": [0.0] * 4}


def write_other_codes(folder: Path) -> None:
    """Write codes of 6 images in the layouts of other projects."""
    for kind in ("codes", "labels"):
        (folder / "npy" / f"x_{kind}").mkdir(parents=True)
    rows = []
    with tarfile.open(folder / "codes.tar", "w") as tar:
        for i in range(6):
            codes = np.arange(i, i + 16)[None]
            np.save(folder / "npy" / "x_codes" / f"{i}.npy", codes[None])
            np.save(folder / "npy" / "x_labels" / f"{i}.npy", np.array([i % 3]))
            np.save(folder / "one.npy", codes)
            tar.add(folder / "one.npy", f"x_codes/{i % 3}/{i}.npy")
            rows.append(json.dumps({"class_id": i % 3, "tokens": codes[0].tolist()}) + "\n")
    (folder / "codes.jsonl").write_text("".join(rows))


def reseal_cache(rng: RNG, folder: Path) -> str:
    (path,) = folder.glob("ref.npz.*")
    return reseal_array(rng, path)


def make_kinds(work: Path) -> dict[str, Kind]:
    """Write a whole file of each kind below ``work`` and return the kinds."""
    torch.manual_seed(0)
    work.mkdir(parents=True, exist_ok=True)
    for name in ("whole codes", "codes"):
        write_all(work / name, PLAN)

    small = VQConfig(32, (1, 1), num_res_blocks=1, z_channels=32, codebook_size=19)
    vq = fill_from_names(VQModel(small))
    facts = {"vq_model": "VQ-4", "config": asdict(vq.config), "run": {"image_size": 16}}
    (work / "tokenizer").mkdir()
    for path in (work / "vq.pt", work / "tokenizer" / "vq.pt"):
        save_checkpoint({"model": vq.state_dict(), **facts}, path)

    gpt = GPT(small_config(ar_token_num=4))
    gpt.init_weights()
    weights = gpt.state_dict()
    facts = {"gpt_model": "GPT-S", "config": asdict(gpt.config), "classes": ["a", "b", "c"]}
    facts |= {"steps": 2, "run": {"epochs": 3}, "git": "0"}
    for name in ("pt", "safetensors", "released"):
        (work / name).mkdir()
    save_checkpoint({"model": weights, **facts}, work / "pt" / "gpt.pt")
    _save_safetensors(weights, facts, work / "safetensors" / "gpt.safetensors")
    vq = fill_from_names(VQModel(make_vq_config("VQ-4", codebook_size=19)))
    torch.save({"model": vq.state_dict(), "args": Namespace(a=1)}, work / "released" / "vq.pt")

    for name, state_of in (("resume", trained_state), ("old", trained_state), ("export", None)):
        place = RunFolder(WORLD, work / name, (work / name,), 9, 0)
        place.make()
        for step in (1, 2):
            state = state_of(step) if state_of else Weights(weights)
            place.save(step, state, facts)
            place.wait()
    for checkpoint in (work / "old").iterdir():
        (path,) = checkpoint.glob("*.safetensors")
        dcp.save(trained_state(int(checkpoint.name)).tensors(), checkpoint_id=checkpoint)
        path.unlink()
        sizes = {p.name: p.stat().st_size for p in checkpoint.iterdir() if p.name != "meta.json"}
        write_meta(checkpoint, read_meta_unchecked(checkpoint) | {"files": sizes, "sha256": {}})

    rng = np.random.default_rng(0)
    sets = work / "sets"
    sets.mkdir()
    for name, count in (("ref", 30), ("sam", 25)):
        images = rng.integers(0, 256, (count, 8, 8, 3), np.uint8)
        arrays = {"arr_0": images, "labels": np.arange(count) % 3}
        if name == "ref":
            features = rng.random((200, 8))
            arrays |= {"mu": features.mean(0), "sigma": np.cov(features.T)}
        np.savez(sets / f"{name}.npz", **arrays)
    net = SmallClassifier(ClassifierConfig(8, 3, 8))
    save_classifier(sets / "net.pt", net, ["a", "b", "c"], test_accuracy=0.9)
    evaluate(sets)
    (sets / ".lock").write_text('{"host": "a", "machine": "b", "process": 1, "launcher": 1}')
    (sets / "sam.json").write_text('{"options": {"gpt_model": "GPT-B", "cfg_scale": 1.5}}')

    pictures = work / "pictures"
    pictures.mkdir()
    pixels = rng.integers(0, 256, (24, 20, 3), np.uint8)
    kinds = ("png", "jpg", "webp", "bmp", "tif", "ppm")
    for kind in kinds:
        Image.fromarray(pixels).save(pictures / f"a.{kind}")

    pb = work / "graph" / "graph.pb"
    pb.parent.mkdir()
    nodes = [constant(f"conv_{i}", rng.random((3, 3, i + 1, 2), np.float32)) for i in range(4)]
    switch = attribute("scale_after_normalization", field(5, 1))
    nodes.append(field(1, field(1, b"norm") + field(2, b"BatchNorm") + switch))
    pb.write_bytes(b"".join(nodes))
    known = inception.WeightsFile(pb.name, pb.stat().st_size, sha256_file(pb), "")

    others = work / "others"
    write_other_codes(others)

    def sample(folder: Path, name: str) -> object:
        return sample_with(folder / name, work / "vq.pt")

    of_codes = partial(Kind, work / "codes")
    of_sets = partial(Kind, sets, evaluate)
    no_hash = "only with --allow-unknown-weights: nothing says what the file should hold"
    made: dict[str, Kind] = {
        "shard, training": of_codes(train_on, ("shards/*",), reseal_shard),
        "shard, inspect": of_codes(inspect, ("shards/*",), reseal_shard),
        "shard, extraction again": of_codes(extract_again, ("shards/*",), reseal_shard),
        "codes meta.json, training": of_codes(train_on, ("meta.json",), reseal_codes_meta),
        "codes meta.json, inspect": of_codes(inspect, ("meta.json",), reseal_codes_meta),
        "plan.json": of_codes(extract_again, ("plan.json",)),
        "records of shards": of_codes(extract_again, ("records.jsonl",)),
        "checkpoint, resume": Kind(work / "resume", resume, ("0000002/*",), reseal_checkpoint),
        "checkpoint, export": Kind(work / "export", export, ("0000002/*",), reseal_checkpoint),
        "old checkpoint, resume": Kind(
            work / "old", resume, ("0000002/*", "0000002/.metadata"),
            unsealed="folders of earlier versions have no hashes of their shards",
        ),
        "tokenizer .pt": Kind(
            work / "tokenizer", tokenizer, ("vq.pt",), partial(reseal_weights, name="vq.pt")
        ),
        "released .pt": Kind(
            work / "released", partial(tokenizer, vq_model="VQ-4", size=19), ("vq.pt",),
            unsealed=NO_SUM,
        ),
        "exported .pt": Kind(
            work / "pt", partial(sample, name="gpt.pt"), ("gpt.pt",),
            partial(reseal_weights, name="gpt.pt"),
        ),
        "exported .safetensors": Kind(
            work / "safetensors", partial(sample, name="gpt.safetensors"), ("gpt.safetensors",),
            partial(reseal_weights, name="gpt.safetensors"),
        ),
        "samples .npz": of_sets(
            ("sam.npz",), lambda rng, folder: reseal_array(rng, folder / "sam.npz")
        ),
        "reference .npz": of_sets(
            ("ref.npz",), lambda rng, folder: reseal_array(rng, folder / "ref.npz")
        ),
        "feature cache": of_sets(("ref.npz.*",), reseal_cache),
        "classifier": of_sets(("net.pt",), partial(reseal_weights, name="net.pt")),
        "graph .pb": Kind(work / "graph", partial(graph, known=known), ("graph.pb",)),
        "graph .pb, unknown": Kind(
            work / "graph", graph, ("graph.pb",), unsealed=no_hash
        ),
        "records": Kind(
            sets, records, (".lock", "sam.json", "sam.metrics.json")
        ),
    }  # fmt: skip
    for kind in kinds:
        name = f"a.{kind}"
        read = partial(picture, name=name)
        made[f"image .{kind}"] = Kind(pictures, read, (name,), unsealed=NO_SUM, memory=1 << 30)
    for name, damaged in (("codes.tar", "codes.tar"), ("codes.jsonl", "codes.jsonl")):
        made[f"other codes, {name}"] = Kind(
            others, partial(convert, name=name), (damaged,), unsealed=NO_SUM
        )
    made["other codes, .npy"] = Kind(
        others, partial(convert, name="npy"), ("npy/*/*.npy",), unsealed=NO_SUM
    )
    return made
