"""The list of the doctor's checks."""

from argparse import Namespace

import pytest

from scripts.diagnosis.checks import list_checks


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
