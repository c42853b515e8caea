"""Golden files that the repository ships are there, and a test that lacks one fails."""

import pytest

from tests import helpers
from tests.helpers import GOLDEN, SHIPPED_GOLDEN


def test_shipped_golden_files_are_those_of_the_repository(monkeypatch, golden):
    """Read from tests/golden alone, as in a clone."""
    assert {path.name for path in GOLDEN[1].iterdir()} == SHIPPED_GOLDEN
    monkeypatch.setattr(helpers, "GOLDEN", (GOLDEN[1] / "no such folder", GOLDEN[1]))
    assert all(golden(name) for name in SHIPPED_GOLDEN)


@pytest.mark.parametrize(
    "name, outcome", [("vq16.npz", pytest.fail.Exception), ("vq8.npz", pytest.skip.Exception)]
)
def test_a_missing_golden_file_skips_a_test_only_if_none_is_shipped(
    monkeypatch, tmp_path, golden, name, outcome
):
    monkeypatch.setattr(helpers, "GOLDEN", (tmp_path, tmp_path))
    with pytest.raises(outcome, match=f"golden file {name} is not there"):
        golden(name)
