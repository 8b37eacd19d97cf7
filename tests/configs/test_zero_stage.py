"""ZeRO stages that expert layers do not allow are refused, in one line that says what to choose."""

import pytest

from configs.errors import UserError
from configs.load import load_config


def test_stage_3_is_refused_with_what_to_choose() -> None:
    with pytest.raises(UserError) as refused:
        load_config("quickstart", ["parallel.zero_stage=3"])
    message = str(refused.value)
    assert "parallel.zero_stage: stage 3 does not take expert layers: choose 1 or 2" in message
    assert "\n" not in message


def test_other_numbers_are_refused_too() -> None:
    with pytest.raises(UserError, match=r"parallel\.zero_stage: Input should be 0, 1 or 2"):
        load_config("quickstart", ["parallel.zero_stage=4"])
