"""Sets of images: archives and folders, and unusable ones as one line before any work."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from evaluations.c2i import image_sets, report
from evaluations.c2i.image_sets import open_archive, open_images


def test_images_are_read_one_batch_at_a_time(sets, monkeypatch):
    images = torch.from_numpy(np.load(sets / "ref.npz")["arr_0"])
    sizes = []
    read = zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda f, n=-1: sizes.append(n) or read(f, n))
    batches = list(open_archive(sets / "ref.npz", "REF").batches(4))
    assert [len(b) for b in batches] == [4] * 7 + [2]
    assert torch.equal(torch.cat(batches), images)
    assert max(sizes) == 4 * 8 * 8 * 3  # headers and labels are smaller here
    assert min(sizes) >= 0  # -1 would be all there is


IMAGES = np.full((5, 8, 8, 3), 9, np.uint8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": IMAGES}, "holds neither images .*found images"),
        ({"arr_0": IMAGES.astype(object)}, "Python objects"),
        ({"arr_0": IMAGES.astype(np.int64)}, "arr_0 is int64, expected uint8"),
        ({"arr_0": IMAGES[..., :1]}, r"shape \(5, 8, 8, 1\), expected images"),
        ({"arr_0": IMAGES[:0]}, r"shape \(0, 8, 8, 3\)"),
        ({"arr_0": IMAGES[:3]}, "holds 3 images, at least 4"),
        ({"arr_0": IMAGES - 20.0}, r"values in -11..-11, expected 0..255"),
        ({"arr_0": IMAGES / 255.0}, "no value above .*expected values in 0..255"),
        ({"arr_0": IMAGES // 9}, "first images have no value above 1, expected values in 0..255"),
        (
            {"arr_0": np.broadcast_to(np.uint8(3), (4, 9000, 9000, 3))[:1]},
            "images of 9000x9000 pixels are too large",
        ),
        ({"mu": np.zeros(3), "sigma": -np.eye(3)}, "sigma is not a covariance"),
        (
            {"mu": np.zeros(2), "sigma": np.array([[1.0, 9.0], [0.0, 1.0]])},
            "sigma is not a covariance",
        ),
        ({"arr_0": IMAGES * np.nan}, "values in nan"),
        ({"arr_0": IMAGES[:, :4, :4]}, "trained on 8x8x3 images, these are 4x4x3"),
        ({"arr_0": IMAGES, "labels": np.zeros(4, int)}, "labels are .*expected 5 integers"),
        ({"arr_0": IMAGES, "labels": np.full(5, 3)}, "labels lie in 3..3, the network knows 0..2"),
        ({"mu": np.zeros(3)}, "mu without its partner"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, "expected floats"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.inf)}, "not finite"),
    ],
)
def test_unusable_arrays_are_one_line(sets, evaluate, content, message):
    np.savez(sets / "sam.npz", **content)
    with pytest.raises(ValueError, match=message) as error:
        evaluate(sets)
    assert "\n" not in str(error.value)
    assert not (sets / "sam.txt").exists()


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip_a_pixel(data: bytes) -> bytes:
    return data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]


def shorten_the_header(data: bytes) -> bytes:
    return data.replace(b"'shape': (25, 8, 8, 3)", b"'shape': (24, 8, 8, 3)")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda _: b"no zip at all", "is not a whole .npz file"),
        (truncate, "is not a whole .npz file"),
        (flip_a_pixel, "is not a whole .npz file: Bad CRC"),
        (shorten_the_header, "should have 4608 bytes of values and has 4800"),
    ],
)
def test_damaged_files_are_one_line(sets, evaluate, damage, message):
    path = sets / "sam.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        evaluate(sets)
    assert "\n" not in str(error.value)
    assert not (sets / "sam.txt").exists()


def test_a_pickle_inside_an_archive_is_never_run(sets, evaluate):
    with zipfile.ZipFile(sets / "sam.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(ValueError, match="arr_0 is not a readable array"):
        evaluate(sets)
    assert not (sets / "ran").exists()


def test_an_archive_of_other_things_is_refused(sets, evaluate):
    with zipfile.ZipFile(sets / "sam.npz", "w") as archive:
        archive.writestr("arr_0", b"")
    with pytest.raises(ValueError, match="holds neither images.*found nothing"):
        evaluate(sets)


def test_a_name_without_npz_is_refused(sets, evaluate):
    """The published evaluator writes its text over such a file."""
    (sets / "sam.npz").rename(sets / "samples")
    before = (sets / "samples").read_bytes()
    with pytest.raises(ValueError, match="does not end in .npz"):
        evaluate(sets, sam="samples")
    assert (sets / "samples").read_bytes() == before


def save_images(folder, images: np.ndarray) -> None:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}.png")


def test_a_folder_of_images_is_a_set(sets, evaluate):
    images = np.load(sets / "sam.npz")["arr_0"]
    np.savez(sets / "sam.npz", arr_0=images)  # without labels, as a folder has none
    evaluate(sets)
    before = (sets / "sam.txt").read_text()
    save_images(sets / "pictures", images)
    evaluate(sets, sam="pictures")
    assert (sets / "pictures.txt").read_text() == before
    Image.fromarray(images[0, :4]).save(sets / "pictures" / "zzz.png")
    with pytest.raises(
        ValueError, match="zzz.png has 8x4 pixels, the first image of .*pictures has 8x8"
    ):
        evaluate(sets, sam="pictures")
    (sets / "empty").mkdir()
    with pytest.raises(ValueError, match="SAMPLES: no images in empty"):
        evaluate(sets, sam="empty")


def test_labels_of_guided_diffusion_are_found(sets):
    images = np.zeros((5, 8, 8, 3), np.uint8)
    np.savez(sets / "a.npz", images, np.arange(5))
    np.savez(sets / "b.npz", images, np.zeros((5, 2)))
    assert open_archive(sets / "a.npz", "REF").labels.tolist() == [0, 1, 2, 3, 4]
    assert open_archive(sets / "b.npz", "REF").labels is None


def test_names_are_ordered_by_number_and_settings_found_beside_a_folder(sets):
    save_images(
        sets / "cfg-1.75-seed-0", np.arange(12, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    )
    for i in range(12):
        (sets / "cfg-1.75-seed-0" / f"{i:03}.png").rename(sets / "cfg-1.75-seed-0" / f"{i}.png")
    images = image_sets.open_images(sets / "cfg-1.75-seed-0", "SAMPLES")
    assert torch.cat(list(images.batches(5)))[:, 0, 0, 0].tolist() == list(range(12))
    (sets / "cfg-1.75-seed-0.json").write_text(json.dumps({"options": {"cfg_scale": 1.75}}))
    assert report.settings_of(images.path) == {"cfg_scale": 1.75}


def test_a_zip_bomb_is_not_unpacked(sets, evaluate, monkeypatch):
    """Statistics are read whole, so their size is bounded before: 200 kB claim 200 MB here."""
    monkeypatch.setattr(image_sets, "LARGEST_WHOLE", 100_000_000)
    np.savez_compressed(sets / "sam.npz", mu=np.zeros(5000), sigma=np.zeros((5000, 5000)))
    with pytest.raises(ValueError, match="sigma would take 200,000,000 bytes of memory"):
        evaluate(sets)


def test_a_class_folder_has_its_labels(tmp_path):
    for name in ("b/1.png", "a/2.png", "a/10.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert open_images(tmp_path, "REF").labels.tolist() == [0, 0, 1]
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    assert open_images(tmp_path, "REF").labels is None


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_ranks_read_their_own_part_and_all_parts_are_checked(sets, monkeypatch, save):
    """The file has 9.8 GB for 50,000 images; its CRC is put together from those of all batches."""
    pixels = np.load(sets / "ref.npz")["arr_0"]
    save(sets / "sam.npz", arr_0=pixels)
    images, sizes, read = open_archive(sets / "sam.npz", "SAMPLE"), [], zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda f, n=-1: sizes.append(n) or read(f, n))
    crcs = [[], [], []]
    parts = [list(images.batches(4, rank, 3, crcs[rank])) for rank in range(3)]
    batches = [parts[i % 3][i // 3] for i in range(8)]
    assert np.array_equal(torch.cat(batches).numpy(), pixels)
    mapped = save is np.savez
    assert (max(sizes) < pixels[:4].nbytes) == mapped
    assert sorted(map(len, crcs)) == ([2, 3, 3] if mapped else [0, 0, 0])
    images.check(crcs)
    if mapped:
        crcs[1][1] = (crcs[1][1][0] ^ 1, crcs[1][1][1])
        with pytest.raises(ValueError, match="sam.npz is not a whole .npz file: Bad CRC-32"):
            images.check(crcs)
