"""The doctor: the real command, what it says of things broken on purpose, and that one check
stops no other.
"""

import json
import os
import signal
import sys
import time
from argparse import Namespace
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoregressive.decoding.cpu import build
from autoregressive.models.gpt import GPT, GPT_models, GPTConfig
from scripts import requirements
from scripts.diagnosis import examination, files, golden, machine, resume, speed
from scripts.diagnosis.check import (
    BROKEN,
    LEFT_OUT,
    NOT_HERE,
    OK,
    SLOW,
    Check,
    Context,
    Result,
    run_here,
)
from scripts.diagnosis.checks import list_checks
from scripts.diagnosis.examination import examine, report_prefix, run_checks
from scripts.diagnosis.models import fill_from_names
from scripts.diagnosis.report import advice, as_markdown, as_text
from tests.helpers import GOLDEN, ROOT, make_plan, run_command, write_all
from tokenizer.vq_model import VQModel, make_vq_config
from utils.checkpoints.weights_file import state_sha256

FILES = ("gpt_ckpt", "vq_ckpt", "code_path", "data_path")
NO_FILES = dict.fromkeys(FILES)
HINT = "do something about it"


def context(golden_folder: Path = GOLDEN[1], work: Path = ROOT, **options: object) -> Context:
    return Context(Namespace(**NO_FILES | {"quick": True} | options), golden_folder, work)


def result_of(function, **options: object) -> Result:
    return run_here(Check("group", "name", function, HINT), context(**options))


def all_is_well(_: Context) -> Result:
    return Result(OK, "well", figures={"seconds": 2.0})


def all_is_slow(_: Context) -> Result:
    return Result(SLOW, "slow")


def raises(_: Context) -> Result:
    print("what led to it")
    raise RuntimeError("first line\nsecond line")


def crashes(_: Context) -> Result:
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs(_: Context) -> Result:
    time.sleep(60)


def leaves(_: Context) -> Result:
    sys.exit(3)


def tells_what_came_before(now: Context) -> Result:
    return Result(OK, json.dumps(now.earlier))


def test_a_check_that_goes_wrong_stops_no_other():
    """Raised, crashed, hung, left: each is a broken line with a reason; the next check runs."""
    functions = [all_is_well, raises, crashes, hangs, leaves, tells_what_came_before]
    checks = [Check("group", f.__name__, f, HINT, limit=1 if f is hangs else 30) for f in functions]
    rows = run_checks(checks, context(), time.monotonic() + 120)
    found = {check.name: result for check, result in rows}
    assert [r.status for r in found.values()] == [OK, BROKEN, BROKEN, BROKEN, BROKEN, OK]
    assert found["raises"].detail == "RuntimeError: first line"
    assert "what led to it" in found["raises"].log and "in raises" in found["raises"].log
    assert found["crashes"].detail == "its process died (SIGSEGV)"
    assert found["hangs"].detail == "did not end within 1 s"
    assert found["leaves"].detail == "SystemExit: 3"
    assert json.loads(found["tells_what_came_before"].detail)["all_is_well"] == {"seconds": 2.0}
    assert len(advice(rows)) == 4 and all(HINT[1:] in sentence for sentence in advice(rows))
    assert "4 broken" in as_text(rows)


def test_what_there_is_no_time_for_is_left_out():
    checks = [
        Check("group", "late", all_is_well, HINT),
        Check("group", "long", all_is_well, HINT, thorough=True),
    ]
    rows = run_checks(checks, context(), time.monotonic())
    assert [result.status for _, result in rows] == [LEFT_OUT, LEFT_OUT]
    assert "--minutes" in rows[0][1].advice and rows[1][1].detail == "left out by --quick"


@pytest.mark.parametrize(
    "functions, status", [([all_is_well, all_is_slow], 0), ([raises, all_is_well], 1)]
)
def test_exit_status_and_files(monkeypatch, tmp_path, capsys, functions, status):
    """Slow is no failure, broken is one; both files hold every line of the table."""
    checks = [Check("group", f.__name__, f, HINT) for f in functions]
    monkeypatch.setattr(examination, "list_checks", lambda options, devices: checks)
    monkeypatch.setattr(examination, "prepare_environment", lambda: None)
    options = Namespace(
        **NO_FILES, quick=True, minutes=None, output=f"{tmp_path}/", gpt_model="GPT-T"
    )
    options.ar_token_num = options.batch = None
    assert examine(options) is (status == 0)
    text, report = capsys.readouterr().out, json.loads((tmp_path / "doctor.json").read_text())
    markdown = (tmp_path / "doctor.md").read_text()
    assert report["broken"] is (status == 1)
    assert {"Processor", "Memory", "Torch", "C++ compiler", "Code"} <= report["machine"].keys()
    for result in report["results"]:
        assert f"| {result['name']} (cpu) | {result['detail']} |" in markdown
        assert f"{result['name']} (cpu): {result['detail']}" in text
    assert str(tmp_path / "doctor.md") in text


def test_where_the_report_goes(tmp_path):
    assert report_prefix(str(tmp_path)) == tmp_path / "doctor"
    assert report_prefix(f"{tmp_path}/new/") == tmp_path / "new" / "doctor"
    assert (
        report_prefix(f"{tmp_path}/mine")
        == report_prefix(f"{tmp_path}/mine.json")
        == tmp_path / "mine"
    )
    assert report_prefix(f"{tmp_path}/main.v2") == tmp_path / "main.v2"


def test_without_packages_it_says_how_to_get_them():
    done = run_command("python3", "-S", "scripts/doctor.py", check=False)
    assert done.returncode == 1 and not done.stdout
    assert (
        done.stderr.startswith("broken: No module named")
        and "pip install -r requirements.txt" in done.stderr
    )
    assert "Traceback" not in done.stderr


@pytest.fixture
def damaged(tmp_path):
    """``damaged(name, **changes)``: golden files; functions change arrays of one of them."""

    def damage(name: str, **changes: object) -> Path:
        for path in GOLDEN[1].glob("*.npz"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
        arrays = dict(np.load(tmp_path / name))
        np.savez(
            tmp_path / name,
            **arrays | {key: change(arrays[key]) for key, change in changes.items()},
        )
        return tmp_path

    return damage


EAGER = partial(golden.check_greedy, way="eager")
BF16 = partial(golden.check_training, precision="bf16")
# what is compared, the file, and how its arrays are changed
GOLDEN_CHECKS = {
    "forward": (golden.check_forward, "gpt_tiny_n9.npz", {"train_logits": lambda x: x + 2e-4}),
    "loss": (golden.check_forward, "gpt_tiny_n4.npz", {"train_loss": lambda x: x + 2e-4}),
    "not a number": (
        golden.check_forward,
        "gpt_tiny_n4.npz",
        {"train_logits": lambda x: x * np.nan},
    ),
    "greedy": (
        partial(golden.check_greedy, way="eager"),
        "gpt_tiny_n16.npz",
        {"greedy_raster_cfg1.75": lambda x: x + 1},
    ),
    "bfloat16": (
        partial(golden.check_training, precision="bf16"),
        "gpt_tiny_n4.npz",
        {"train_loss": lambda x: x + 0.1},
    ),
    "filters": (golden.check_sampling, "sampling.npz", {"probs_k5_p1.0": lambda x: x + 1e-5}),
    "pixels": (golden.check_sampling, "sampling.npz", {"pixels_uint8_64": lambda x: x ^ 1}),
    "tokenizer": (golden.check_tokenizer, "vq16.npz", {"codes": lambda x: x ^ (x == x.max())}),
}


@pytest.mark.parametrize("function, name, changes", GOLDEN_CHECKS.values(), ids=list(GOLDEN_CHECKS))
def test_other_numbers_than_the_published_are_broken(damaged, function, name, changes):
    assert result_of(function).status == OK
    result = result_of(function, golden_folder=damaged(name, **changes))
    assert result.status == BROKEN and result.advice == HINT


@pytest.mark.parametrize("function", [
    partial(golden.check_greedy, way="kernels"),
    partial(golden.check_stored, way="kernels", precision="bf16"),
    partial(golden.check_stored, way="eager", precision="fp16"),
    partial(golden.check_training, precision="fp16"),
])  # fmt: skip
def test_every_way_of_computing_agrees_here(function):
    assert result_of(function).status in (OK, NOT_HERE)


def test_a_damaged_golden_file_is_one_broken_line(damaged):
    folder = damaged("gpt_tiny_n1.npz")
    (folder / "gpt_tiny_n1.npz").write_bytes(b"PK nonsense")
    result = result_of(golden.check_forward, golden_folder=folder)
    assert result.status == BROKEN and "\n" not in result.detail and result.advice == HINT


def test_no_compiler_is_slow_and_its_kernels_are_not_here(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load.cache_clear()
    try:
        check = next(
            c for c in list_checks(Namespace(**NO_FILES), ["cpu"]) if c.name == "C++ compiler"
        )
        result = run_here(check, context())
        assert (
            result.status == SLOW
            and "no-such-compiler" in result.detail
            and "apt install g++" in result.advice
        )
        assert result_of(partial(golden.check_greedy, way="kernels")).status == NOT_HERE
        assert machine.describe_machine({"here": tmp_path})["C++ compiler"] == "none"
    finally:
        build.load.cache_clear()


def test_missing_and_old_packages_are_named(monkeypatch):
    versions = {"torch": "1.13.0", "timm": "missing"}
    monkeypatch.setattr(requirements, "version_of", lambda package: versions.get(package, "99.1"))
    result = result_of(machine.check_packages)
    assert (
        result.status == BROKEN
        and "torch>=2.7 (1.13.0)" in result.detail
        and "timm>=1.0 (missing)" in result.detail
    )
    versions.clear()
    assert result_of(machine.check_packages).status == OK


def test_too_little_memory_or_disk_is_broken(monkeypatch, tmp_path):
    assert result_of(machine.check_memory, gpt_model="GPT-T").status == OK
    monkeypatch.setattr(machine, "memory", lambda: (2**33, 2**33))
    assert result_of(machine.check_memory, gpt_model="GPT-3B").status == BROKEN
    assert result_of(machine.check_disk, places={"kernels": tmp_path}).status == OK
    monkeypatch.setattr(machine, "LEAST_DISK", 1 << 60)
    result = result_of(machine.check_disk, places={"kernels": tmp_path})
    assert result.status == BROKEN and str(tmp_path) in result.detail


def test_a_busy_machine_and_a_gpu_that_torch_cannot_use(monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0, 0))
    assert result_of(machine.check_idle).status == SLOW
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0, 0))
    assert result_of(machine.check_idle).status == OK
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "first_line", lambda *command: "GPU 0: NVIDIA H100 (UUID: GPU-1)")
    result = result_of(machine.check_gpu)
    assert result.status == BROKEN and "GPU 0: NVIDIA H100 is there" in result.detail
    monkeypatch.setattr(machine, "first_line", lambda *command: None)
    assert result_of(machine.check_gpu).status == NOT_HERE


@pytest.mark.parametrize("devices", [["cpu"], ["cuda:0", "cuda:1", "cpu"], ["mps", "cpu"]])
def test_checks_of_every_kind_of_machine_have_names_of_their_own_and_advice(devices):
    """Names are what a measurement finds the ones it is compared with by."""
    given = Namespace(gpt_ckpt="a", vq_ckpt="b", code_path="c", data_path="d")
    checks = list_checks(given, devices)
    names = [(check.name, check.device) for check in checks]
    assert len(set(names)) == len(names) and all(check.advice for check in checks)
    for check in checks:
        others = getattr(check.function, "keywords", {}).get("others", {})
        assert set(others.values()) <= {c.name for c in checks[: checks.index(check)]}
    measured = [check for check in checks if check.group == checks[-1].group]
    assert {check.device for check in measured} == {devices[0]}
    assert any("FlexAttention" in name for name, _ in names) is ("cuda:0" in devices)


@pytest.mark.parametrize("share, other, status, reason", [
    (0.5, 3.0, OK, None),
    (0.5, None, OK, None),
    (0.1, 3.0, SLOW, "below 30% of a ceiling"),
    (0.5, 1.0, SLOW, "slower than the published way"),
])  # fmt: skip
def test_what_is_slow(share, other, status, reason):
    others = {"the published way": {} if other is None else {"seconds": other}}
    result = speed.judge("2 s", {"seconds": 2.0}, share, 0.3, others)
    assert result.status == status and (reason or "2 s") in result.detail
    assert ("speed relative to the published way" in result.figures) is (other is not None)


@pytest.mark.slow
def test_a_gpu_far_below_its_data_sheet_is_slow(monkeypatch):
    monkeypatch.setattr(speed, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(speed, "peak_flops", lambda device, precision: (1e15, "data sheet"))
    assert result_of(partial(speed.check_products, precision="bf16")).status == SLOW


def save_vq(path: Path, another: bool = False) -> str:
    """Write a tokenizer for codes of ``make_plan``, or another one; return its hash."""
    vq = fill_from_names(VQModel(make_vq_config("VQ-4", codebook_size=70)))
    if another:
        torch.nn.init.constant_(vq.quant_conv.bias, 0.5)
    torch.save({"model": vq.state_dict(), "vq_model": "VQ-4", "config": asdict(vq.config)}, path)
    return state_sha256(vq.weights())


def save_gpt(path: Path, tokenizer_sha256: str, **changes: object) -> GPT:
    sizes = GPT_models["GPT-T"] | dict(
        vocab_size=70, num_classes=3, grid_height=2, grid_width=2, ar_token_num=2
    )
    model = fill_from_names(GPT(GPTConfig(**sizes | changes)))
    facts = dict(
        config=asdict(model.config),
        gpt_model="GPT-T",
        tokenizer_sha256=tokenizer_sha256,
        classes=["a", "b", "c"],
    )
    torch.save({"model": model.state_dict(), **facts}, path)
    return model


@pytest.fixture
def given(tmp_path) -> dict[str, str]:
    """A tokenizer, codes and a GPT that belong together."""
    sha256 = save_vq(tmp_path / "vq.pt")
    write_all(tmp_path / "codes", make_plan(tokenizer_sha256=sha256))
    save_gpt(tmp_path / "gpt.pt", sha256)
    return {
        "vq_ckpt": str(tmp_path / "vq.pt"),
        "code_path": str(tmp_path / "codes"),
        "gpt_ckpt": str(tmp_path / "gpt.pt"),
    }


def test_files_that_belong_together(given):
    for function in (files.check_gpt, files.check_vq, files.check_codes, files.check_together):
        assert result_of(function, **given).status == OK, function
    assert "tokenizer" in result_of(files.check_together, **given).detail
    codes = result_of(files.check_codes, **given)
    assert "10 images x 2 crops, all 3 shards whole; 3 classes of 3 to 4 images" in codes.detail


def test_files_that_do_not_belong_together(given, tmp_path):
    save_vq(tmp_path / "vq.pt", another=True)
    result = result_of(files.check_together, **given)
    assert result.status == BROKEN and result.advice == HINT
    assert "tokenizer of --vq-ckpt and --code-path" in result.detail
    assert "tokenizer of --vq-ckpt and --gpt-ckpt" in result.detail
    save_gpt(tmp_path / "gpt.pt", "t", vocab_size=71, num_classes=4, grid_width=4)
    result = result_of(files.check_together, **given | {"vq_ckpt": None})
    assert "codebook size of --gpt-ckpt and --code-path (71, 70)" in result.detail
    assert "number of classes of --gpt-ckpt and --code-path (4, 3)" in result.detail
    assert "code grid of --gpt-ckpt and --code-path ([2, 4], [2, 2])" in result.detail


def test_damaged_codes_are_named(given, tmp_path):
    path = tmp_path / "codes" / "shards" / "00001.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    result = result_of(files.check_codes, **given)
    assert result.status == BROKEN and "shards/00001.npz" in result.detail and result.advice == HINT
    path.unlink()
    result = result_of(files.check_codes, **given)
    assert result.status == BROKEN and "00001.npz is missing or damaged" in result.detail


def test_codes_that_cannot_be(given, tmp_path):
    """Beyond the codebook; of a class that has no image."""
    path = tmp_path / "codes" / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"codebook_size": 60}))
    result = result_of(files.check_codes, **given)
    assert result.status == BROKEN and "of 60" in result.detail
    path.write_text(json.dumps(meta | {"classes": ["a", "b", "c", "d"]}))
    result = result_of(files.check_codes, **given)
    assert result.status == BROKEN and "1 classes have no image" in result.detail


def test_weights_that_cannot_be(given, tmp_path):
    model = save_gpt(tmp_path / "gpt.pt", "t")
    checkpoint = torch.load(tmp_path / "gpt.pt", weights_only=True)
    checkpoint["model"]["layers.3.feed_forward.w2.weight"][5, 5] = torch.nan
    torch.save(checkpoint, tmp_path / "gpt.pt")
    result = result_of(files.check_gpt, **given)
    assert (
        result.status == BROKEN and "the first is layers.3.feed_forward.w2.weight" in result.detail
    )
    torch.nn.init.zeros_(model.output.weight)
    torch.save(checkpoint | {"model": model.state_dict()}, tmp_path / "gpt.pt")
    assert "all zeros" in result_of(files.check_gpt, **given).detail
    (tmp_path / "vq.pt").write_bytes((tmp_path / "vq.pt").read_bytes()[:1000])
    result = result_of(files.check_vq, **given)
    assert result.status == BROKEN and "--vq-ckpt" in result.detail
    assert result_of(files.check_gpt, gpt_ckpt=str(tmp_path / "none.pt")).status == BROKEN


def test_folders_of_images(tmp_path):
    root = tmp_path / "images"
    for name in ("ape", "bee"):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(root / name / "0.png")
    result = result_of(files.check_images, data_path=str(root))
    assert (
        result.status == OK
        and "2 images in 2 classes of 1" in result.detail
        and "30 to 30 pixels" in result.detail
    )
    (root / "cat").mkdir()
    result = result_of(files.check_images, data_path=str(root))
    assert result.status == BROKEN and "such as cat" in result.detail and "delete" in result.advice
    (root / "cat" / "1.jpg").write_bytes(b"no picture")
    result = result_of(files.check_images, data_path=str(root))
    assert (
        result.status == BROKEN
        and "1 of 3 opened files fail: " in result.detail
        and "1.jpg" in result.detail
    )
    for name in ("ape", "bee", "cat"):
        (root / "train" / name).mkdir(parents=True)
        (root / name).rename(root / "train" / name)
    result = result_of(files.check_images, data_path=str(root))
    assert result.status == BROKEN and f"--data-path {root}/train" in result.advice


@pytest.mark.slow
def test_a_training_folder_is_checked_as_it_is(trained, work):
    folder = str(trained.with_suffix(""))
    result = result_of(files.check_gpt, gpt_ckpt=folder)
    assert result.status == OK and "GPT-T" in result.detail and "after 15 steps" in result.detail
    together = dict(
        gpt_ckpt=folder,
        vq_ckpt=str(work / "vq.pt"),
        code_path=str(work / "codes"),
        data_path=str(work / "images"),
    )
    result = result_of(files.check_together, **together)
    assert (
        result.status == OK and "list of images" in result.detail and "class names" in result.detail
    )
    (work / "images" / "ape" / "more.png").write_bytes(
        (work / "images" / "ape" / "0.png").read_bytes()
    )
    try:
        assert (
            "list of images of --code-path and --data-path"
            in result_of(files.check_together, **together).detail
        )
    finally:
        (work / "images" / "ape" / "more.png").unlink()


@pytest.mark.slow
def test_quick_ends_well_on_this_machine(given, tmp_path):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    output = tmp_path / "report"
    done = run_command(
        "python3", "scripts/doctor.py", "--quick", "--gpt-model", "GPT-T", "--output", output,
        *options,
    )  # fmt: skip
    report = json.loads(output.with_suffix(".json").read_text())
    assert not report["broken"] and "0 broken" not in done.stdout and " ok, " in done.stdout
    statuses = {r["name"]: r["status"] for r in report["results"]}
    for name in (
        "Checkpoint and resume",
        "Sharded weights (FSDP)",
        "Files together",
        "Tokenizer, codes and images",
    ):
        assert statuses[name] == OK
    figures = {r["name"]: r["figures"] for r in report["results"]}
    assert figures["Sampling, the default"]["speed relative to the published way"] > 0
    assert 0 < figures["Training step, ours"]["MFU"] < 2
    markdown = output.with_suffix(".md").read_text()
    assert all(f"| {name} (" in markdown or f"| {name} |" in markdown for name in statuses)


@pytest.mark.slow
def test_sharding_over_two_processes(tmp_path):
    result = run_here(
        Check("g", "n", partial(resume.check_sharded, processes=2), HINT), context(work=tmp_path)
    )
    assert result.status == OK and "over 2 processes" in result.detail


def test_markdown_is_a_table_whatever_a_check_says():
    rows = [(Check("group", "name", all_is_well, HINT), Result(BROKEN, "a | b", "mend it"))]
    markdown = as_markdown("today", {"Processor": "one"}, rows)
    assert (
        "| **broken** | name (cpu) | a \\| b | 0.0 |" in markdown
        and "- broken: name (cpu). Mend it." in markdown
    )
