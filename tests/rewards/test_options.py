"""The options of the reward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rewards.options import Custom, LengthBand, Overlong
from rewards.parse import RewardError


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        (LengthBand, {"weight": -1}, "length.weight: expected a number from 0 to 1e6, found -1"),
        (LengthBand, {"weight": np.nan}, "length.weight"),
        (LengthBand, {"min": 9, "max": 8}, "0 <= min <= max, found 9 and 8"),
        (LengthBand, {"right": 0.0}, "length.right: expected more than 0"),
        (Overlong, {"weight": np.inf}, "overlong.weight"),
        (Overlong, {"cache": 0}, "at least 1 token, found 0"),
        (Custom, {"function": "f", "kind": "host"}, "expected module:function.*found 'f'"),
        (Custom, {"function": "a.b:c.d", "kind": "host"}, "expected module:function"),
        (Custom, {"function": "../a:f", "kind": "host"}, "expected module:function"),
        (Custom, {"function": "a:f", "kind": "host", "low": 1.0}, "low < high.*1.0 and 1.0"),
        (Custom, {"function": "a:f", "kind": "host", "high": np.nan}, "low < high"),
    ],
)
def test_an_option_out_of_range_is_named(
    section: Any, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(RewardError, match=message):
        section(**fields)
