"""The evaluator's command line: the published lines and figures, and mistakes as one line before
any work.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluations.c2i import evaluator, image_sets, report, self_check, sweep
from evaluations.c2i.classifier import ClassifierConfig, SmallClassifier, save_classifier
from evaluations.c2i.image_sets import open_archive
from evaluations.c2i.metrics import mean_and_covariance
from tests.helpers import recipe_state, run_command

FIVE = ["Inception Score", "FID", "sFID", "Precision", "Recall"]


def numbers(text: str) -> dict[str, float]:
    """``title: value`` lines as a dict."""
    return {
        k: float(v) for k, v in re.findall(r"^([A-Za-z0-9% ]+): ([-+.\de]+)$", text, re.MULTILINE)
    }


@pytest.fixture
def sets(tmp_path):
    """A folder with ref.npz and sam.npz (8 x 8 images with labels) and a classifier for them."""
    generator = np.random.default_rng(0)
    for name, count in (("ref", 30), ("sam", 25)):
        images = generator.integers(0, 256, (count, 8, 8, 3), np.uint8)
        np.savez(tmp_path / f"{name}.npz", arr_0=images, labels=np.arange(count) % 3)
    torch.manual_seed(0)
    save_classifier(tmp_path / "net.pt", SmallClassifier(ClassifierConfig(8, 3)), ["a", "b", "c"])
    return tmp_path


@pytest.fixture
def evaluate(monkeypatch, capsys):
    """``evaluate(folder, *options)`` of ref.npz and sam.npz by the classifier, in-process."""

    def call(
        folder, *options, ref="ref.npz", sam="sam.npz", network=("--feature-network", "net.pt")
    ):
        monkeypatch.chdir(folder)
        words = [ref, sam, *network, "--device", "cpu", *map(str, options)]
        monkeypatch.setattr(sys, "argv", ["evaluator.py", *words])
        evaluator.main()
        return capsys.readouterr()

    return call


# the published evaluator


@pytest.mark.slow
def test_end_to_end_is_the_published_evaluator(golden, tmp_path):
    z = golden("evaluator_end_to_end_tf.npz")
    np.savez(tmp_path / "g_ref.npz", arr_0=z["ref_images"])
    np.savez(tmp_path / "g_sam.npz", arr_0=z["sample_images"])
    torch.save(recipe_state(), tmp_path / "recipe.pth")
    script = "evaluations/c2i/evaluator.py"
    files = (tmp_path / "g_ref.npz", tmp_path / "g_sam.npz")
    weights = ("--inception-weights", tmp_path / "recipe.pth", "--allow-unknown-weights")
    done = run_command(sys.executable, script, *files, *weights, OMP_NUM_THREADS="1")

    expected = numbers(str(z["txt"]))
    written = (tmp_path / "g_sam.txt").read_text()
    found = numbers(written)
    assert list(found) == list(expected) == FIVE
    assert found == {k: found[k] for k in numbers(done.stdout)}
    assert (found["Precision"], found["Recall"]) == (expected["Precision"], expected["Recall"])
    for name in FIVE[:3]:
        assert found[name] == pytest.approx(expected[name], rel=1e-5)

    lines = iter(done.stdout.splitlines())
    for line in str(z["stdout"]).splitlines()[1:]:  # the first warms up TensorFlow
        title = line.split(":")[0].replace("g_sam", str(tmp_path / "g_sam"))
        assert any(found_line.startswith(title) for found_line in lines), line
    assert "float16" in done.stdout
    assert "warning: 40 sample images" in done.stderr


def test_without_weights_nothing_starts(sets, evaluate, monkeypatch, capsys):
    monkeypatch.setattr(evaluator, "PRETRAINED_MODELS", sets / "pretrained_models")
    with pytest.raises(ValueError, match="no Inception weights: expected classify_image") as error:
        evaluate(sets, network=())
    assert "\n" not in str(error.value)
    assert "activations" not in capsys.readouterr().out
    assert not (sets / "sam.txt").exists()


# numbers and files


def test_reports_to_screen_text_and_json(sets, evaluate):
    out = evaluate(sets, "--output", "out/figures.json").out
    text = (sets / "sam.txt").read_text()
    assert list(numbers(text)) == [
        "Inception Score",
        "FID",
        "Precision",
        "Recall",
        "Class accuracy",
    ]  # no sFID
    assert text in out
    written = json.loads((sets / "out" / "figures.json").read_text())
    assert written["metrics"]["fid"] == numbers(text)["FID"]
    assert (written["reference_images"], written["sample_images"]) == (30, 25)
    assert written["distances"] == "float16, as in the TensorFlow evaluator"
    assert len(written["network"]["sha256"]) == 64


def test_a_set_against_itself_is_perfect(sets, evaluate):
    evaluate(sets, ref="sam.npz")
    found = numbers((sets / "sam.txt").read_text())
    assert found["FID"] == pytest.approx(0, abs=1e-9)
    assert (found["Precision"], found["Recall"]) == (1, 1)


def test_exact_distances_are_used_and_said(sets, evaluate, monkeypatch):
    results = []
    compute = evaluator.precision_recall
    monkeypatch.setattr(
        evaluator, "precision_recall", lambda *args: results.append(compute(*args)) or results[-1]
    )
    assert "distances: float16" in evaluate(sets).out
    assert "distances: float32 (--exact-distances)" in evaluate(sets, "--exact-distances").out
    assert [r.float32_blocks for r in results] == [0, 3]


@pytest.mark.parametrize("change", ["batch size", "float64", "compressed", "Fortran order"])
def test_how_images_are_stored_and_read_changes_nothing(sets, evaluate, change):
    evaluate(sets)
    before = numbers((sets / "sam.txt").read_text())
    images, labels = (np.load(sets / "sam.npz")[k] for k in ("arr_0", "labels"))
    if change == "float64":
        images = images.astype(np.float64)
    if change == "Fortran order":
        images = np.asfortranarray(images)
    save = np.savez_compressed if change == "compressed" else np.savez
    save(sets / "sam.npz", arr_0=images, labels=labels)
    evaluate(sets, *(["--batch-size", 7] if change == "batch size" else []))
    assert numbers((sets / "sam.txt").read_text()) == pytest.approx(before, rel=1e-5)


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


# stored statistics


def stored(seed: int, width: int = 64) -> dict[str, np.ndarray]:
    features = np.random.default_rng(seed).standard_normal((200, width)).astype(np.float32)
    return dict(zip(("mu", "sigma"), mean_and_covariance(features), strict=True))


def test_statistics_alone_give_fid_and_sfid_without_a_network(sets, evaluate):
    spatial = {f"{k}_s": v for k, v in stored(3, 20).items()}
    np.savez(sets / "ref.npz", **stored(1, 30), **spatial)
    np.savez(sets / "sam.npz", **stored(2, 30), **spatial)
    err = evaluate(sets, network=()).err
    found = numbers((sets / "sam.txt").read_text())
    assert list(found) == ["FID", "sFID"]
    assert found["FID"] > 0.1
    assert found["sFID"] == pytest.approx(0, abs=1e-9)
    assert "sam.npz holds statistics alone" in err


def test_reference_statistics_are_used_instead_of_its_images(sets, evaluate):
    statistics = stored(1)
    np.savez(sets / "stats.npz", **statistics)
    np.savez(sets / "both.npz", arr_0=np.load(sets / "ref.npz")["arr_0"], **statistics)
    evaluate(sets)
    computed = numbers((sets / "sam.txt").read_text())
    err = evaluate(sets, ref="stats.npz").err
    alone = numbers((sets / "sam.txt").read_text())
    assert "stats.npz holds statistics alone: no Precision" in err
    assert list(alone) == ["Inception Score", "FID", "Class accuracy"]
    evaluate(sets, ref="both.npz")
    both = numbers((sets / "sam.txt").read_text())
    assert both == {**computed, "FID": alone["FID"]}
    assert both["FID"] != pytest.approx(computed["FID"], rel=0.01)


def test_sample_statistics_are_used_instead_of_its_images(sets, evaluate):
    np.savez(sets / "sam.npz", arr_0=np.load(sets / "sam.npz")["arr_0"], **stored(1))
    np.savez(sets / "same.npz", **stored(1))
    evaluate(sets, ref="same.npz")
    assert numbers((sets / "sam.txt").read_text())["FID"] == pytest.approx(0, abs=1e-9)


def test_statistics_of_another_network_are_refused(sets, evaluate):
    np.savez(sets / "ref.npz", **stored(1, width=50))
    with pytest.raises(ValueError, match="do not belong together: pool features of 50 and 64"):
        evaluate(sets)


# mistakes


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


def test_unusable_device_and_files_are_named(sets, evaluate):
    with pytest.raises(ValueError, match="--device: nonsense cannot be used"):
        evaluate(sets, "--device", "nonsense")
    with pytest.raises(ValueError, match="REF: nowhere.npz does not exist"):
        evaluate(sets, ref="nowhere.npz")
    with pytest.raises(ValueError, match="--feature-network: none.pt does not exist"):
        evaluate(sets, network=("--feature-network", "none.pt"))


# several sets, folders, processes, the kept reference


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


def test_several_sets_are_the_single_ones_and_a_table(sets, evaluate):
    np.savez(sets / "more.npz", arr_0=np.load(sets / "ref.npz")["arr_0"][:20, ::-1])
    (sets / "sam.json").write_text(
        json.dumps({"options": {"gpt_model": "GPT-B", "cfg_scale": 1.75}})
    )
    single = {}
    for name in ("sam", "more"):
        evaluate(sets, sam=f"{name}.npz")
        single[name] = (sets / f"{name}.txt").read_text()
        (sets / f"{name}.txt").unlink()
    evaluate(
        sets, "--markdown", "table.md", sam="sam.npz",
        network=("more.npz", "--feature-network", "net.pt"),
    )  # fmt: skip
    assert {n: (sets / f"{n}.txt").read_text() for n in single} == single
    table = [
        [c.strip() for c in line.strip("|\n").split("|")]
        for line in (sets / "table.md").read_text().splitlines()
    ]
    assert [row[0] for row in table] == ["Samples", "---", "sam.npz", "more.npz"]
    fid = table[0].index("FID")
    assert float(table[2][fid]) == pytest.approx(numbers(single["sam"])["FID"], abs=1e-4)
    assert table[2][-1] == "gpt_model GPT-B, cfg_scale 1.75"
    assert json.loads((sets / "sam.metrics.json").read_text())["made_with"]["cfg_scale"] == 1.75
    with pytest.raises(ValueError, match="--output names one file"):
        evaluate(sets, "--output", "x.json", network=("more.npz", "--feature-network", "net.pt"))


def test_the_kept_reference_gives_the_same_numbers(sets, evaluate, monkeypatch):
    first = evaluate(sets).out
    before = (sets / "sam.txt").read_text()
    kept = list(sets.glob("ref.npz.*.features.npz"))
    assert len(kept) == 1
    read = evaluate(sets).out
    assert "read from" in read
    assert "read from" not in first
    assert (sets / "sam.txt").read_text() == before
    kept[0].write_bytes(kept[0].read_bytes()[:1000])
    assert "is not whole" in evaluate(sets).err
    assert (sets / "sam.txt").read_text() == before
    arrays = dict(np.load(kept[0]))
    for name, value in (
        ("pool", arrays["pool"][:10]),
        ("key", np.array("0 a b")),
        ("pool", np.zeros((), np.float32)),
    ):
        np.savez(kept[0], **{**arrays, name: value})
        assert "is made again" in evaluate(sets).err
        assert (sets / "sam.txt").read_text() == before
    torch.manual_seed(1)  # another network keeps its own
    save_classifier(sets / "other.pt", SmallClassifier(ClassifierConfig(8, 3)), ["a", "b", "c"])
    assert "read from" not in evaluate(sets, network=("--feature-network", "other.pt")).out
    assert len(list(sets.glob("*.features.npz"))) == 2
    for path in sets.glob("*.features.npz"):
        path.unlink()
    evaluate(sets, "--no-cache")
    assert not list(sets.glob("*.features.npz"))
    evaluate(sets)
    images = np.load(sets / "ref.npz")["arr_0"]
    # another file of that name is another reference
    np.savez(sets / "ref.npz", arr_0=images[::-1, ::-1])
    assert "read from" not in evaluate(sets).out


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(sets, evaluate):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the two has: more threads may round otherwise
    evaluate(sets, "--batch-size", 4)
    torch.set_num_threads(threads)
    before = (sets / "sam.txt").read_text()
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words += [
        evaluator.__file__, sets / "ref.npz", sets / "sam.npz",
        "--feature-network", sets / "net.pt",
    ]  # fmt: skip
    done = run_command(
        *words, "--batch-size", "4", "--no-cache", "--device", "cpu", OMP_NUM_THREADS="1"
    )
    assert (sets / "sam.txt").read_text() == before
    assert done.stdout.count("computing sample batch activations...") == 1


# warnings


def test_warnings_that_matter(sets, evaluate):
    images = np.load(sets / "sam.npz")["arr_0"]
    np.savez(
        sets / "sam.npz", arr_0=np.concatenate([images, images[:3]]), labels=np.arange(28) // 10
    )
    err = evaluate(sets).err
    assert "3 of 28 images of sam.npz are copies" in err
    assert "samples are sorted by class" in err
    warnings = json.loads((sets / "sam.metrics.json").read_text())["warnings"]
    assert len(warnings) == 3  # and few images
    assert "sorted" not in evaluate(sets, sam="ref.npz").err


def test_other_sizes_are_said(sets):
    reference, samples = (open_archive(sets / "ref.npz", "REF") for _ in range(2))
    assert report.warnings_before(reference, samples)[1:] == []
    np.savez(sets / "small.npz", arr_0=np.zeros((5, 4, 6, 3), np.uint8))
    small = open_archive(sets / "small.npz", "SAMPLES")
    assert "sample images are 6x4, the reference's 8x8" in " ".join(
        report.warnings_before(reference, small)
    )


# further numbers


def test_further_numbers_are_asked_for_and_written(sets, evaluate):
    rng = np.random.default_rng(1)
    for name in ("ref", "sam"):
        images = rng.integers(0, 256, (25, 12, 12, 3), np.uint8)
        np.savez(sets / f"{name}.npz", arr_0=images, labels=np.arange(25) % 3)
    save_classifier(sets / "net.pt", SmallClassifier(ClassifierConfig(12, 3)), ["a", "b", "c"])
    evaluate(sets)
    plain = numbers((sets / "sam.txt").read_text())
    evaluate(sets, "--kid", "--class-fid", "--bootstrap", 5, "--paired", "--frechet", "sqrtm")
    found = numbers((sets / "sam.txt").read_text())
    assert found.keys() - plain.keys() == {
        *(
            "KID",
            "KID standard deviation",
            "FID 95% low",
            "FID 95% high",
            "Mean FID per class",
            "PSNR",
            "SSIM",
        )
    }
    # 25 images: the square root is not exact
    assert found["FID"] == pytest.approx(plain["FID"], rel=1e-3)
    written = json.loads((sets / "sam.metrics.json").read_text())
    assert set(written["fid_of_class"]) == {"0", "1", "2"}
    assert (
        written["metrics"]["fid_low"] < written["metrics"]["fid"] < written["metrics"]["fid_high"]
    )
    assert found["PSNR"] == pytest.approx(7.75, abs=0.3)  # independent uniform pixels: 255^2 / 6


@pytest.mark.parametrize(
    "options", [("--output", "sam.npz"), ("--markdown", "ref.npz"), ("--markdown", "sam.txt")]
)
def test_nothing_is_written_over(sets, evaluate, options):
    before = {p.name: p.read_bytes() for p in sets.iterdir()}
    with pytest.raises(ValueError, match=f"{options[1]} would be written over"):
        evaluate(sets, *options)
    assert {p.name: p.read_bytes() for p in sets.iterdir()} == before
    with pytest.raises(ValueError, match="sam.txt would be written over"):
        evaluate(sets, network=("sam.npz", "--feature-network", "net.pt"))


def test_frechet_method_and_compile_are_used(sets, evaluate, monkeypatch):
    used = []
    compute = evaluator.frechet_distance
    monkeypatch.setattr(evaluator, "frechet_distance", lambda *a: used.append(a[-1]) or compute(*a))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: used.append("compiled"))
    evaluate(sets, "--frechet", "sqrtm")
    evaluate(sets, "--compile")
    assert used == ["sqrtm", "compiled", "symmetric"]


def test_images_below_the_window_of_ssim_are_refused(sets, evaluate):
    np.savez(sets / "ref.npz", arr_0=np.load(sets / "sam.npz")["arr_0"])
    with pytest.raises(
        ValueError, match="--paired: images of sam.npz are smaller than SSIM's window of 11"
    ):
        evaluate(sets, "--paired")


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


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--kid", "--kid needs the images"),
        ("--class-fid", "--class-fid needs labels"),
        ("--paired", "--paired: REF holds"),
    ],
)
def test_further_numbers_without_what_they_need_are_refused(sets, evaluate, option, message):
    np.savez(sets / "ref.npz", **stored(1))
    with pytest.raises(ValueError, match=message):
        evaluate(sets, option)


# self-check


def test_self_check_passes_and_notices_a_change(tmp_path, monkeypatch, capsys):
    torch.save(recipe_state(), tmp_path / "recipe.pth")
    monkeypatch.setattr(sys, "argv", ["evaluator.py", "--self-check", "--allow-unknown-weights"])
    sys.argv += ["--inception-weights", str(tmp_path / "recipe.pth")]
    evaluator.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all(" ok " in line for line in lines)
    resize = self_check.inception.resize_tf1
    monkeypatch.setattr(
        self_check.inception, "resize_tf1", lambda *a: resize(*a).nextafter(torch.tensor(1e9))
    )
    monkeypatch.setattr(self_check, "check_network", lambda: "")
    with pytest.raises(ValueError, match="failed: weights, resize$"):
        self_check.self_check(None, tmp_path, True)


def test_openai_samples_are_compared_with_their_published_figures():
    measured = dict(inception_score=215.8, fid=3.9, sfid=6.1, precision=0.8, recall=0.5)
    table = self_check.compare_with_published("admnet_guided_upsampled_imagenet256.npz", measured)
    assert "fid                 3.942557    3.900000 -1.08e-02" in table
    del measured["sfid"]
    assert "nan" in self_check.compare_with_published(
        "admnet_guided_upsampled_imagenet256.npz", measured
    )
    assert self_check.compare_with_published("samples.npz", measured) is None


def test_a_zip_bomb_is_not_unpacked(sets, evaluate, monkeypatch):
    """Statistics are read whole, so their size is bounded before: 200 kB claim 200 MB here."""
    monkeypatch.setattr(image_sets, "LARGEST_WHOLE", 100_000_000)
    np.savez_compressed(sets / "sam.npz", mu=np.zeros(5000), sigma=np.zeros((5000, 5000)))
    with pytest.raises(ValueError, match="sigma would take 200,000,000 bytes of memory"):
        evaluate(sets)


# the sweep over guidance scales


@pytest.fixture
def swept(sets, monkeypatch):
    """``swept(*options)``: a sweep whose sampler makes noise of a scale's strength, in-process."""

    def call(words, what):
        words = [str(w) for w in words]
        if what == "evaluation":
            monkeypatch.setattr(sys, "argv", words[2:])
            evaluator.main()
            return
        scale = float(words[words.index("--cfg-scale") + 1])
        folder = Path(words[words.index("--sample-dir") + 1])
        assert words[2:4] == ["--gpt-ckpt", "my gpt.pt"]
        folder.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(5).integers(0, int(100 * scale), (25, 8, 8, 3))
        np.savez(folder / f"samples-{scale}.npz", arr_0=noise.astype(np.uint8))

    def run_sweep(*options):
        monkeypatch.setattr(sweep, "call", call)
        words = ["sweep.py", str(sets / "ref.npz"), "--sample", "--gpt-ckpt 'my gpt.pt'", *options]
        words += [
            "--evaluate",
            f"--feature-network {sets / 'net.pt'} --device cpu",
            "--output",
            str(sets / "out"),
        ]
        monkeypatch.setattr(sys, "argv", words)
        sweep.main()

    return run_sweep


def test_a_sweep_names_the_best_scale(sets, swept, capsys):
    """The reference is noise up to 255: 2.55 comes closest."""
    swept("--cfg-scales", "2.55", "1", "1.7")
    assert "best FID" in capsys.readouterr().out.splitlines()[-1]
    written = json.loads((sets / "out" / "sweep.json").read_text())
    assert written["scales"] == [1.0, 1.7, 2.55]
    fids = [m["fid"] for m in written["metrics"]]
    assert fids == sorted(fids, reverse=True)
    assert len((sets / "out" / "sweep.md").read_text().splitlines()) == 5
    picture = np.asarray(Image.open(sets / "out" / "sweep.png").convert("RGB"))
    assert picture.shape == (600, 900, 3)
    assert ((picture == (31, 119, 180)).all(-1)).sum() > 300  # a line in the first colour


def test_a_failed_step_ends_the_sweep(sets):
    with pytest.raises(ValueError, match="the sampling failed with status 3, see above"):
        sweep.call([sys.executable, "-c", "raise SystemExit(3)"], "sampling")
