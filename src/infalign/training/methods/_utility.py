"""What comparators share that maximise a function of raw rewards."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp

from infalign.calibration.calibrator import RewardCalibrator
from infalign.calibration.combined import CombinedCalibrator
from infalign.errors import InputError
from infalign.procedures import InferenceProcedure
from infalign.training.methods.base import Comparator
from infalign.training.target import Float, Int, Utility

if TYPE_CHECKING:
    from infalign.rewards.source import RewardSource
    from infalign.training.reward import TransformedReward


class UtilityComparator(Comparator):
    """Online training on u(r)/β of raw rewards r; the calibrator says what the reference's rewards are, and measures.

    A subclass gives `utility`. The β for a KL is found by tilting the stored references by exp(u/β).
    """

    online = True
    single_reward = True

    @abstractmethod
    def utility(self, references: RewardCalibrator) -> Callable[[Float, Int], Float]:
        """What is maximised.

        Args:
            references: The reference's rewards, one row per prompt.

        Returns:
            A function of raw rewards, shape (B,), and the row of each one's prompt, shape (B,); its values have
            shape (B,).
        """

    def utility_on(self, calibrator: RewardCalibrator | CombinedCalibrator | None) -> Utility:
        """The utility with the references that belong to it.

        Raises:
            InputError: If there are several rewards: raw ones have no common scale.
        """
        if not isinstance(calibrator, RewardCalibrator):
            raise InputError(
                f"{self.kind} needs one reward: raw rewards of several sources have no common scale",
                where="compare_with",
                hint="Leave it out, or give one reward",
            )
        return Utility(self.kind, self.utility(calibrator), calibrator)

    def beta_for_kl(self, kl: float, calibrator: RewardCalibrator | CombinedCalibrator | None = None) -> float:
        """The β at which tilting each prompt's stored references by exp(u/β) has this mean KL in nats."""
        return beta_for_kl(self.utility_on(calibrator), kl)

    def reward(
        self,
        source: RewardSource,
        calibrator: RewardCalibrator | CombinedCalibrator,
        prompt_ids: Sequence[str],
        beta: float,
        *,
        procedure: InferenceProcedure | None = None,
        mixture_weight: float = 1.0,
    ) -> TransformedReward:
        """u(r)/β."""
        from infalign.training.reward import TransformedReward

        assert mixture_weight == 1.0, "only the recipe's own transform is trained inside a mixture"
        return TransformedReward(source, calibrator, prompt_ids, self.utility_on(calibrator), beta, procedure=procedure)


def beta_for_kl(utility: Utility, kl: float) -> float:
    """The β at which tilting each prompt's stored references by exp(u/β) has this mean KL in nats.

    Raises:
        InputError: If the references cannot spend that KL: log K is the most there is.
    """
    utilities = utility.of_references()

    def spent(log_beta: float) -> float:
        total = 0.0
        for u_K in utilities:
            logits_K = u_K / np.exp(log_beta)
            log_weights_K = logits_K - logsumexp(logits_K)
            total += float(np.exp(log_weights_K) @ log_weights_K) + np.log(len(u_K))
        return total / len(utilities)

    scale = float(np.mean([u_K.std() for u_K in utilities]))
    low, high = np.log(scale) - 12.0, np.log(scale) + 12.0
    if not spent(low) > kl:
        raise InputError(
            f"the references can spend {spent(low):.3g} nats on this reward, not {kl:.3g}",
            where=utility.label,
            hint="Use more reference rollouts per prompt (rollouts.num_ref), or a smaller KL",
        )
    found: Any = brentq(lambda log_beta: spent(log_beta) - kl, low, high, xtol=1e-9)
    return float(np.exp(found))
