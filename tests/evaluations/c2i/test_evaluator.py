"""The evaluator's command line: the published lines and figures, and further metrics."""

from __future__ import annotations

import json
import os
import re
import signal
import sys

import numpy as np
import pytest
import torch

from evaluations.c2i import evaluator
from evaluations.c2i.classifier import ClassifierConfig, SmallClassifier, save_classifier
from evaluations.c2i.metrics import mean_and_covariance
from tests.helpers import hold_in_fork, recipe_state, run_command

FIVE = ["Inception Score", "FID", "sFID", "Precision", "Recall"]


def numbers(text: str) -> dict[str, float]:
    """``title: value`` lines as a dict."""
    return {
        k: float(v) for k, v in re.findall(r"^([A-Za-z0-9% ]+): ([-+.\de]+)$", text, re.MULTILINE)
    }


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
    text = (sets / "out" / "figures.txt").read_text()
    assert not (sets / "sam.txt").exists()
    assert list(numbers(text)) == [
        "Class score",
        "Frechet distance",
        "Precision",
        "Recall",
        "Class accuracy",
    ]  # no sFID
    assert text in out
    written = json.loads((sets / "out" / "figures.json").read_text())
    assert written["metrics"]["frechet_distance"] == numbers(text)["Frechet distance"]
    assert (written["reference_images"], written["sample_images"]) == (30, 25)
    assert written["distances"] == "float16, as in the TensorFlow evaluator"
    assert len(written["network"]["sha256"]) == 64


def test_a_set_against_itself_is_perfect(sets, evaluate):
    evaluate(sets, ref="sam.npz")
    found = numbers((sets / "sam.txt").read_text())
    assert found["Frechet distance"] == pytest.approx(0, abs=1e-9)
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


def taken(sets) -> str:
    """Text of the metrics of sam.npz, which are then not there any more."""
    (sets / "sam.metrics.json").unlink()
    text = (sets / "sam.txt").read_text()
    (sets / "sam.txt").unlink()
    return text


def test_other_settings_do_not_write_over_what_is_there(sets, evaluate):
    evaluate(sets)
    before = [(sets / name).read_bytes() for name in ("sam.txt", "sam.metrics.json")]
    evaluate(sets)  # the same settings: written again
    out = evaluate(sets, "--exact-distances").out
    assert "sam.metrics.json was made otherwise and is kept" in out
    assert [(sets / name).read_bytes()[:40] for name in ("sam.txt",)] == [before[0][:40]]
    (other,) = sets.glob("sam.metrics.*.json")
    assert json.loads(other.read_text())["evaluation"]["distances"] == "float32"
    assert len(list(sets.glob("sam.*.txt"))) == 1


def test_a_second_evaluation_is_told_who_holds_the_numbers(sets, evaluate):
    """It does not touch them; another output is free."""
    evaluate(sets)
    before = (sets / "sam.metrics.json").read_bytes()
    pid = hold_in_fork(sets / "sam.metrics.json.lock")
    with pytest.raises(ValueError, match=rf"sam.metrics.json is in use .* process {pid} on"):
        evaluate(sets, "--exact-distances")
    assert (sets / "sam.metrics.json").read_bytes() == before
    evaluate(sets, "--output", "other.json")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    evaluate(sets)
    assert not list(sets.glob("*.lock"))


@pytest.mark.parametrize(
    "accuracy, said",
    [(None, "warning: .*is not recorded"), (0.2, "warning: .*too weak"), (0.97, "note: .*97.0%")],
)
def test_features_of_ones_own_are_called_so(sets, evaluate, accuracy, said):
    facts = {} if accuracy is None else {"test_accuracy": accuracy}
    network = SmallClassifier(ClassifierConfig(8, 3))
    save_classifier(sets / "net.pt", network, ["a", "b", "c"], **facts)
    result = evaluate(sets)
    assert re.search(f"{said}", result.err)
    assert "FID" not in result.out and "Inception Score" not in result.out


def test_reference_statistics_are_used_instead_of_its_images(sets, evaluate):
    statistics = stored(1)
    np.savez(sets / "stats.npz", **statistics)
    np.savez(sets / "both.npz", arr_0=np.load(sets / "ref.npz")["arr_0"], **statistics)
    evaluate(sets)
    computed = numbers(taken(sets))
    err = evaluate(sets, ref="stats.npz").err
    alone = numbers(taken(sets))
    assert "stats.npz holds statistics alone: no Precision" in err
    assert list(alone) == ["Class score", "Frechet distance", "Class accuracy"]
    evaluate(sets, ref="both.npz")
    both = numbers((sets / "sam.txt").read_text())
    assert both == {**computed, "Frechet distance": alone["Frechet distance"]}
    assert both["Frechet distance"] != pytest.approx(computed["Frechet distance"], rel=0.01)


def test_sample_statistics_are_used_instead_of_its_images(sets, evaluate):
    np.savez(sets / "sam.npz", arr_0=np.load(sets / "sam.npz")["arr_0"], **stored(1))
    np.savez(sets / "same.npz", **stored(1))
    evaluate(sets, ref="same.npz")
    assert numbers((sets / "sam.txt").read_text())["Frechet distance"] == pytest.approx(0, abs=1e-9)


def test_statistics_of_another_network_are_refused(sets, evaluate):
    np.savez(sets / "ref.npz", **stored(1, width=50))
    with pytest.raises(ValueError, match="do not belong together: pool features of 50 and 64"):
        evaluate(sets)


def test_unusable_device_and_files_are_named(sets, evaluate):
    with pytest.raises(ValueError, match="--device: nonsense cannot be used"):
        evaluate(sets, "--device", "nonsense")
    with pytest.raises(ValueError, match="REF: nowhere.npz does not exist"):
        evaluate(sets, ref="nowhere.npz")
    with pytest.raises(ValueError, match="--feature-network: none.pt does not exist"):
        evaluate(sets, network=("--feature-network", "none.pt"))


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
    fid = table[0].index("Frechet distance")
    assert float(table[2][fid]) == pytest.approx(
        numbers(single["sam"])["Frechet distance"], abs=1e-4
    )
    assert table[2][-2] == "gpt_model GPT-B, cfg_scale 1.75"
    sha256 = json.loads((sets / "sam.metrics.json").read_text())["network"]["sha256"]
    settings = f"reference ref.npz, network {sha256[:16]}, distances float16"
    assert table[2][-1].startswith(settings) and f"torch {torch.__version__}" in table[2][-1]
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


# further numbers


def test_further_numbers_are_asked_for_and_written(sets, evaluate):
    rng = np.random.default_rng(1)
    for name in ("ref", "sam"):
        images = rng.integers(0, 256, (25, 12, 12, 3), np.uint8)
        np.savez(sets / f"{name}.npz", arr_0=images, labels=np.arange(25) % 3)
    save_classifier(sets / "net.pt", SmallClassifier(ClassifierConfig(12, 3)), ["a", "b", "c"])
    evaluate(sets)
    plain = numbers(taken(sets))
    evaluate(sets, "--kid", "--class-fid", "--bootstrap", 5, "--paired", "--frechet", "sqrtm")
    found = numbers((sets / "sam.txt").read_text())
    assert found.keys() - plain.keys() == {
        *(
            "KID",
            "KID standard deviation",
            "Frechet distance 95% low",
            "Frechet distance 95% high",
            "Mean Frechet distance per class",
            "PSNR",
            "SSIM",
        )
    }
    # 25 images: the square root is not exact
    assert found["Frechet distance"] == pytest.approx(plain["Frechet distance"], rel=1e-3)
    written = json.loads((sets / "sam.metrics.json").read_text())
    assert set(written["fid_of_class"]) == {"0", "1", "2"}
    assert (
        written["metrics"]["frechet_low"]
        < written["metrics"]["frechet_distance"]
        < written["metrics"]["frechet_high"]
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
