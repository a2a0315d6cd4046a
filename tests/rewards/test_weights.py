"""The weights of the reward's components."""

from __future__ import annotations

import numpy as np
import pytest

from rewards.parse import RewardError
from rewards.weights import RewardWeights


@pytest.mark.parametrize("weight", [-0.1, np.nan, np.inf, 1e300])
def test_weights_are_bounded(weight: float) -> None:
    with pytest.raises(RewardError, match="weight 'iou': expected a number from 0 to 1e6"):
        RewardWeights(iou=weight)
