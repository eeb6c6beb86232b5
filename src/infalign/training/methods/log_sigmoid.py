"""log σ(r − r_ref) with r_ref a quantile of the reference's rewards to that prompt.

The log-sigmoid-centred transformation of Wang et al. 2024 (arXiv 2402.00742): rewards far above r_ref count little more
than rewards above it. At the optimum p·σ(r − r_ref)^(1/β)/Z.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import numpy as np

from infalign.calibration.calibrator import RewardCalibrator
from infalign.training.methods._utility import UtilityComparator
from infalign.training.methods.base import comparator, share
from infalign.training.target import Float, Int


@comparator
class LogSigmoidMethod(UtilityComparator):
    """Log-sigmoid of the reward, centred at a `quantile` of the references."""

    kind = "log-sigmoid"
    SETTINGS: ClassVar = {"quantile": share(0.85)}

    def utility(self, references: RewardCalibrator) -> Callable[[Float, Int], Float]:
        """U = log σ(r − r_ref)."""
        centre_P = np.array([np.quantile(row, self.settings["quantile"]) for row in references.ref_rewards_PK])
        return lambda rewards_B, row_B: -np.logaddexp(0.0, centre_P[row_B] - rewards_B)
