"""Codes in the layouts of RandAR and RAR, and files that only look like them."""

import io
import json
import tarfile

import numpy as np
import pytest

from dataset.codes import open_codes
from dataset.other_codes import MAX_IMAGE_BYTES, JsonlCodes, TarCodes
from scripts import convert_codes
from tests.helpers import quietly
from utils.npz import parse_npy

RNG = np.random.default_rng(0)
CODES = RNG.integers(0, 1024, (7, 2, 16))  # (images, crops, tokens)
LABELS = [3, 0, 3, 1, 1, 0, 3]


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def write_tar(path, entries: dict[str, bytes]):
    """A tar as RandAR's writer makes it, with a folder's entry among the files."""
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("imagenet_codes/")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in entries.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture
def tar(tmp_path):
    pairs = enumerate(zip(LABELS, CODES, strict=True))
    entries = {f"imagenet_codes/{label}/{i}.npy": npy(codes) for i, (label, codes) in pairs}
    return write_tar(tmp_path / "adm.tar", entries)


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "maskgitvq.jsonl"
    with open(path, "w") as f:
        for label, codes in zip(LABELS, CODES, strict=True):
            f.write(json.dumps({"class_id": label, "tokens": codes[0].tolist()}) + "\n")
    return path


def convert(capfd, monkeypatch, path, output, *options):
    command = ("--code-path", path, "--output", output, "--shard-size", 3, *options)
    return quietly(capfd, monkeypatch, *command, main=convert_codes.main)


def test_a_tar_of_randar_becomes_shards(tar, tmp_path, capfd, monkeypatch):
    said = convert(capfd, monkeypatch, tar, tmp_path / "codes", "--codebook-size", 1024)
    assert "codes of 7 images in 3 shards" in said
    codes = open_codes(tmp_path / "codes")
    assert codes.labels.tolist() == LABELS and codes.num_classes == 4
    assert codes.meta["grid"] == [4, 4] and codes.meta["image_size"] == 64
    assert codes.meta["crops"] == ["center", "center_of_flipped"]
    for crop in range(2):
        assert np.array_equal(codes.gather(np.arange(7), np.full(7, crop)), CODES[:, crop])


def test_lines_of_rar_become_shards(jsonl, tmp_path, capfd, monkeypatch):
    convert(capfd, monkeypatch, jsonl, tmp_path / "codes", "--codebook-size", 1024)
    codes = open_codes(tmp_path / "codes")
    assert codes.labels.tolist() == LABELS and codes.num_crops == 1
    assert np.array_equal(codes.gather(np.arange(7), np.zeros(7, int)), CODES[:, 0])
    shard = tmp_path / "codes/shards/00001.npz"
    before = shard.read_bytes()
    shard.unlink()
    convert(capfd, monkeypatch, jsonl, tmp_path / "codes", "--codebook-size", 1024)
    assert shard.read_bytes() == before  # a rerun makes what is missing


def test_classes_with_names_are_numbered_in_sorted_order(tmp_path):
    entries = {f"a_codes/{name}/0.npy": npy(CODES[0]) for name in ("n02", "n01", "n03")}
    reader = TarCodes(write_tar(tmp_path / "a.tar", entries))
    assert reader.classes == ["n01", "n02", "n03"] and reader.labels.tolist() == [1, 0, 2]


def test_options_that_do_not_fit_the_codes(tar, tmp_path, capfd, monkeypatch):
    def said(*options):
        return convert(capfd, monkeypatch, tar, tmp_path / "codes", *options)

    assert "error: give either --vq-ckpt or --codebook-size" in said()
    assert (
        "hold code 1" in said("--codebook-size", 50) and not (tmp_path / "codes/meta.json").exists()
    )
    text = said("--codebook-size", 1024, "--image-size", 384)
    assert "holds 4x4 codes, which another tokenizer makes of 64 pixels" in text


SHORT = npy(CODES[0])[:-8]


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a_codes/0/../../../etc/x.npy", b"", "expected only ANY_codes/LABEL/INDEX.npy"),
        ("a_codes/0/0.txt", b"", "expected only"),
        ("a_codes/0/9.npy", bytes(MAX_IMAGE_BYTES + 1), "of at most"),
        ("a_codes/0/9.npy", SHORT, "is damaged: 248 bytes for int64 of shape"),
        ("a_codes/0/9.npy", npy(CODES[0]).replace(b"(2, 16)", b"(9**9,)"), "not a readable array"),
        ("a_codes/0/9.npy", npy(CODES[0]).replace(b"(2, 16)", b"(99999,"), "array"),
        ("a_codes/0/9.npy", npy(CODES[0].astype(float)), "has float64 of shape"),
        (
            "a_codes/0/9.npy",
            npy(CODES[0][:1]),
            "of shape \\(1, 16\\), expected integers \\(2, 16\\)",
        ),
        ("a_codes/0/9.npy", npy(np.array([None])), "holds Python objects"),
        ("a_codes/9999999/9.npy", npy(CODES[0]), "which is no label"),
    ],
)
def test_a_tar_that_is_none_of_theirs(tmp_path, name, data, message):
    path = write_tar(tmp_path / "a.tar", {"a_codes/0/0.npy": npy(CODES[0]), name: data})
    with pytest.raises(ValueError, match=message):
        reader = TarCodes(path)
        reader.image(1)


def test_links_and_compressed_tars_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        entry = tarfile.TarInfo("a_codes/0/0.npy")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(entry)
    with pytest.raises(ValueError, match="expected only"):
        TarCodes(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "b.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a_codes/0/0.npy"))
    with pytest.raises(ValueError, match="not a whole, uncompressed tar"):
        TarCodes(tmp_path / "b.tar")


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"tokens": [1, 2]}', "line 8 has no class_id"),
        ('{"class_id": 1}', "line 8 has no tokens"),
        ('{"class_id": 1, "tokens": [1, 2]}', "line 8 has 2 tokens, the first has 16"),
        ('{"class_id": 1, "tokens": [-1]}', "line 8: tokens are not all codes"),
        ('{"class_id": 1, "tokens": ["1"]}', "line 8: tokens are not all codes"),
        ('{"class_id": 1, "tokens": ' + "[" * 9999, "line 8 has no tokens"),
        ('{"class_id": 1, "tokens": [' + "1," * MAX_IMAGE_BYTES, "line 8 is too long"),
        ('{"class_id": 7777777, "tokens": [1]}', "which is no label"),
    ],
)
def test_lines_that_are_none_of_theirs(jsonl, line, message):
    with open(jsonl, "a") as f:
        f.write(line)
    with pytest.raises(ValueError, match=message):
        JsonlCodes(jsonl).image(7)


def test_an_array_of_a_header_s_word_alone_is_not_allocated():
    data = npy(np.zeros(3)).replace(b"(3,)", b"(10**15,)"[:4])
    with pytest.raises(ValueError, match="an image"):
        parse_npy(data, "an image")
    big = io.BytesIO()
    header = {"descr": "<i8", "fortran_order": False, "shape": (1 << 50,)}
    np.lib.format.write_array_header_1_0(big, header)
    with pytest.raises(ValueError, match="an image is damaged: 0 bytes for int64 of shape"):
        parse_npy(big.getvalue(), "an image")
