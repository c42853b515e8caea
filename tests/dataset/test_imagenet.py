"""Image files of every mode become upright 8-bit RGB."""

import logging
import struct

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from dataset.imagenet import list_images, open_image, say_if_enlarged

GREY = np.tile(np.linspace(0, 255, 16, dtype=np.uint8), (16, 1))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA", "LA", "PA", "1", "I;16", "F"])
def test_modes(tmp_path, mode):
    path, expected = tmp_path / "image.png", GREY
    if mode == "I;16":
        image = Image.fromarray(GREY.astype(np.uint16) * 257)
    elif mode == "F":
        image, path = Image.fromarray(GREY.astype(np.float32)), tmp_path / "image.tif"
    elif mode in ("P", "PA"):
        image = Image.fromarray(GREY).convert("RGB").quantize(256)
        if mode == "PA":
            image.info["transparency"] = 0
    elif mode == "1":
        image = Image.fromarray(GREY).convert("1")
        expected = np.asarray(image.convert("L"))
    elif mode == "CMYK":
        image, path = Image.fromarray(GREY).convert("RGB").convert("CMYK"), tmp_path / "image.tif"
    else:
        image = Image.fromarray(GREY).convert("RGB" if mode == "RGBA" else mode).convert(mode)
    image.save(path)
    pixels = np.asarray(open_image(path))
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
    # a palette has 256 of 2^24 colours
    assert np.abs(pixels.astype(int) - expected[..., None]).max() <= 3


def test_exif_rotation_is_applied(tmp_path):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    upright = np.asarray(open_image(tmp_path / "turned.png"))
    assert upright.shape == (16, 8, 3)
    assert upright[:8].min() == 255 and upright[8:].max() == 0


@pytest.mark.parametrize("content", [b"", b"this is text", b"\x89PNG\r\n\x1a\n broken"])
def test_unreadable_files_are_named(tmp_path, content):
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.jpg is not a readable image"):
        open_image(tmp_path / "bad.jpg")


def test_listing_is_sorted_by_class_and_names_what_is_missing(tmp_path):
    for name in ("b/1.png", "a/2.png", "a/1 with space.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    listing = list_images(tmp_path)
    assert listing.classes == ["a", "b"]
    assert [label for _, label in listing.samples] == [0, 0, 1]
    with pytest.raises(ValueError, match="no class folders"):
        list_images(tmp_path / "a")
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(ValueError, match="no images"):
        list_images(tmp_path / "empty")
    with pytest.raises(ValueError, match="--data-path: .*nowhere does not exist"):
        list_images(tmp_path / "nowhere")


def test_enlarging_is_said(tmp_path, caplog):
    (tmp_path / "a").mkdir()
    for i, side in enumerate((32, 40, 64)):
        Image.new("RGB", (side, 70)).save(tmp_path / "a" / f"{i}.png")
    (tmp_path / "a" / "3.png").write_text("no image")
    samples, logger = list_images(tmp_path).samples, logging.getLogger("enlarged")
    with caplog.at_level("WARNING", "enlarged"):
        say_if_enlarged(samples, 32, logger)
        assert not caplog.messages
        say_if_enlarged(samples, 48, logger)
    (message,) = caplog.messages
    assert message.startswith(
        "2 of 3 images looked at are smaller than 48 pixels (the smallest 32)"
    )


def test_listing_is_torchvisions(tmp_path):
    """Sub-folders, links, endings in capitals, other files, an empty class, a hidden folder."""
    for name in (
        *("b/1.png", "b/.hidden.png", "b/2.JPEG", "b/10.webp", "b/notes.txt", "b/old.png.bak"),
        *("a b/x/z.tif", "a b/x.ppm", "a b/B/1.bmp", "A/1.jpg", ".cache/1.png", "loose.png"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "c").symlink_to(tmp_path / "b")
    (tmp_path / "A" / "link").symlink_to(tmp_path / "a b")
    for root in (tmp_path, str(tmp_path), f"{tmp_path}/"):
        expected = ImageFolder(str(root), allow_empty=True)
        assert list_images(root) == (expected.classes, expected.samples)
    assert len(expected.samples) == 16


def twelve_bit_tiff(values: np.ndarray) -> bytes:
    """A grey TIFF with two pixels in three bytes, as scanners and microscopes write."""
    high, low = values.reshape(-1, 2).T.astype(int)
    packed = np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], 1).astype(np.uint8)
    height, width = values.shape
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    tags[279] = packed.size
    directory = struct.pack("<H", len(tags))
    directory += b"".join(struct.pack("<HHII", k, 4, 1, v) for k, v in sorted(tags.items()))
    head = struct.pack("<2sHI", b"II", 42, 8 + packed.size)
    return head + packed.tobytes() + directory + bytes(4)


@pytest.mark.parametrize("bits", [12, 16, 32])
def test_grey_of_many_bits_keeps_its_highest(tmp_path, bits):
    values = GREY.astype(np.int64) << bits - 8 | 5
    path = tmp_path / "grey.tif"
    if bits == 12:
        path.write_bytes(twelve_bit_tiff(values))
    elif bits == 16:
        Image.fromarray(values.astype(np.uint16)).save(path)
    else:
        values = values >> 1  # PIL writes signed ones
        Image.fromarray(values.astype(np.int32)).save(path)
    expected = GREY if bits < 32 else GREY >> 1
    assert np.array_equal(np.asarray(open_image(path))[..., 1], expected)
