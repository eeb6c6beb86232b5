"""What a step's rollouts say about the training: KL with its error, and how far along the frontier the policy is."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from infalign.estimators import mean_estimate, moved
from infalign.theory.plan import frontier
from infalign.training.mixture import mixture_kl
from infalign.training.ranked import mean_per_prompt
from infalign.training.reward import TransformedReward

_FURTHEST_KL = 8.0  # nats; what is beyond counts as having the frontier's last win rate


class StepReport:
    """Turns the log-ratios of one step's rollouts into numbers for the log.

    Args:
        reward: The reward of the training: it knows how the rollouts rank and which procedure they are for.
    """

    def __init__(self, reward: TransformedReward) -> None:
        self._reward = reward
        self._frontier = None if reward.procedure is None else frontier(reward.procedure, _FURTHEST_KL, 40)

    def __call__(self, log_ratio_B: NDArray[np.float64]) -> dict[str, float]:
        """Sequence KL in nats with its standard error, clustered by prompt, and the share of the possible gain.

        Args:
            log_ratio_B: log π(y) − log p(y) of the rollouts that the reward has ranked last, in their order.

        Returns:
            `sequence_kl`; `sequence_kl_error` where there are at least two prompts; `frontier_share`, that is
            (W − ½)/(limit(KL) − ½), where the win rate can be estimated and the policy has moved: its KL is two
            standard errors above zero and at least `estimators.divergence.LEAST_KL`.
        """
        ranked = self._reward.ranked
        assert ranked is not None, "rollouts are scored before they are reported"
        if not np.isfinite(log_ratio_B).all():
            return {"sequence_kl": math.nan}
        weight = self._reward.mixture_weight
        kl = mean_estimate(mean_per_prompt(mixture_kl(log_ratio_B, weight), ranked.prompt_B))
        report = {"sequence_kl": kl.estimate}
        error = kl.standard_error
        if weight < 1.0:
            report["aligned_kl"] = float(mean_per_prompt(log_ratio_B, ranked.prompt_B).mean())
        if kl.num_prompts > 1:
            report["sequence_kl_error"] = error
        win_rate = self._reward.win_rate
        # A step has too few prompts for an interval; two standard errors keep ratios to noise out of the log.
        if self._frontier is not None and win_rate is not None and moved(kl.estimate, kl.estimate - 2 * error):
            limit = float(self._frontier.at(min(kl.estimate, float(self._frontier.kl[-1]))))
            report["frontier_share"] = (win_rate - 0.5) / (limit - 0.5)
        return report
