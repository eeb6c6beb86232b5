"""Each prompt's group of rollouts at mean 0 and standard deviation 1, as GRPO does.

GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2, outcome supervision) divides the rewards alone, not the KL;
with the KL inside the reward, exact, its fixed point is p·exp(r/(β σ))/Z with σ the standard deviation of r under the
*trained* policy, prompt by prompt: the surer a policy is of itself, the smaller β becomes in effect.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from infalign.calibration.calibrator import RewardCalibrator
from infalign.training.methods._utility import UtilityComparator
from infalign.training.methods.base import comparator
from infalign.training.target import Float, Int

EPSILON = 1e-4  # for groups whose rewards are all equal


@comparator
class StandardisedMethod(UtilityComparator):
    """Rewards standardised in groups; a group is what one call holds of a prompt's rollouts."""

    kind = "standardised"

    def utility(self, references: RewardCalibrator) -> Callable[[Float, Int], Float]:
        """U = (r − mean) / (standard deviation + 1e-4) over the rollouts of the same prompt."""
        return partial(standardised, epsilon=EPSILON)


def standardised(rewards_B: Float, row_B: Int, *, epsilon: float) -> Float:
    """(r − mean) / (standard deviation + ε) over the rewards of the same row, shape (B,)."""
    _, group_B = np.unique(row_B, return_inverse=True)
    count_G = np.bincount(group_B)
    centred_B = rewards_B - (np.bincount(group_B, rewards_B) / count_G)[group_B]
    std_G = np.sqrt(np.bincount(group_B, centred_B**2) / np.maximum(count_G - 1, 1))
    return centred_B / (std_G + epsilon)[group_B]
