"""Options that must agree with a GPT's checkpoint."""

import pytest

from autoregressive.models.load import resolve_parallelism


def test_special_tokens_are_one_fewer():
    assert resolve_parallelism(16, 15) == resolve_parallelism(16, None) == 16
    with pytest.raises(ValueError, match="--spe-token-num 3 contradicts --ar-token-num 16"):
        resolve_parallelism(16, 3)
