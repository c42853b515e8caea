"""The doctor as a user runs it."""

import json

import pytest

from scripts.diagnosis.check import OK
from tests.helpers import run_command


def test_without_packages_it_says_how_to_get_them():
    done = run_command("python3", "-S", "scripts/doctor.py", check=False)
    assert done.returncode == 1 and not done.stdout
    assert (
        done.stderr.startswith("broken: No module named")
        and "pip install -r requirements.txt" in done.stderr
    )
    assert "Traceback" not in done.stderr


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
