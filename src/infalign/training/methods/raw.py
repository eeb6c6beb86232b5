"""The reward model's score as it is: standard RLHF, p·exp(r/β)/Z at the optimum."""

from __future__ import annotations

from collections.abc import Callable

from infalign.calibration.calibrator import RewardCalibrator
from infalign.training.methods._utility import UtilityComparator
from infalign.training.methods.base import comparator
from infalign.training.target import Float, Int


@comparator
class RawMethod(UtilityComparator):
    """The reward itself."""

    kind = "raw"

    def utility(self, references: RewardCalibrator) -> Callable[[Float, Int], Float]:
        """U = r."""
        return lambda rewards_B, row_B: rewards_B
