"""The doctor's checks of checkpoints."""

from functools import partial

import pytest

from scripts.diagnosis import resume
from scripts.diagnosis.check import OK, Check, run_here
from tests.scripts.diagnosis.helpers import HINT, context


@pytest.mark.slow
def test_sharding_over_two_processes(tmp_path):
    result = run_here(
        Check("g", "n", partial(resume.check_sharded, processes=2), HINT), context(work=tmp_path)
    )
    assert result.status == OK and "over 2 processes" in result.detail
