"""Baselines: what others maximise or fit, on the same rollouts and with the same solvers.

Two kinds. A reward that is not calibrated, to be used as the `reward` of `online.align`; and a loss on stored rollouts,
for `offline.align_offline`. Calibrated RLHF is the transform `Identity`, distillation of Best-of-n (BOND, Sessa et al.
2024, arXiv 2407.14622; vBoN, Amini et al. 2024, arXiv 2407.06057) the transform `Log` with β = 1/(n − 1): both go with
every solver.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import logsumexp

from infalign.calibration import RewardCalibrator
from infalign.errors import InputError
from infalign.procedures import InferenceProcedure
from infalign.rollouts.rewards import RewardSource
from infalign.training.losses import Examples, single_examples, squared_residual
from infalign.training.pool import Float, RolloutPool
from infalign.training.ranked import RankedRollouts
from infalign.training.reward import TransformedReward
from infalign.transforms import Identity

# --- rewards -----------------------------------------------------------------------------------------------------


class UncalibratedReward(TransformedReward):
    """u(r)/β of raw rewards r, in nats; the calibrator only measures, and says what the reference's rewards are.

    Args:
        source: Scores responses.
        calibrator: Fitted on the reference policy's rewards, one row per prompt.
        prompt_ids: The prompt id of each of the calibrator's rows.
        beta: β > 0, in units of u per nat.
        procedure: As for `TransformedReward`.
    """

    label = ""

    def __init__(
        self,
        source: RewardSource,
        calibrator: RewardCalibrator,
        prompt_ids: Sequence[str],
        beta: float,
        *,
        procedure: InferenceProcedure | None = None,
    ) -> None:
        super().__init__(source, calibrator, prompt_ids, Identity(), beta, procedure=procedure)
        self.__name__ = f"{self.label} reward"
        self._prompt_ids = list(prompt_ids)
        self._ref_rewards_PK = calibrator.ref_rewards_PK

    @abstractmethod
    def utility(self, rewards: Float, prompt_id: Sequence[str]) -> Float:
        """What is maximised, shape (B,)."""

    def tilt(self, rewards: Float, prompt_id: Sequence[str], ranked: RankedRollouts | None = None) -> Float:
        """u(r)/β in nats, times `strength`, shape (B,); ranks play no part."""
        return self.strength * self.utility(rewards, prompt_id) / self.beta

    def ref_utilities(self, rows: Iterable[int] | None = None) -> list[Float]:
        """U of the references of some of the calibrator's rows, of all by default, one array of shape (K,) per row."""
        chosen = range(len(self._prompt_ids)) if rows is None else rows
        rewards_of = {row: np.asarray(self._ref_rewards_PK[row], dtype=np.float64) for row in chosen}
        return [
            self.utility(rewards_K, [self._prompt_ids[row]] * len(rewards_K)) for row, rewards_K in rewards_of.items()
        ]

    def log_normalizer(self, prompt_id: Sequence[str]) -> Float:
        """Log of the mean of exp(u/β) over each prompt's references, in nats, shape (B,): an estimate of log Z."""
        rows_U, which_B = np.unique(self.rows(prompt_id), return_inverse=True)
        per_nat = self.strength / self.beta
        log_z_U = np.array([logsumexp(per_nat * u_K) - np.log(len(u_K)) for u_K in self.ref_utilities(rows_U)])
        return log_z_U[which_B]


class RawReward(UncalibratedReward):
    """The reward model's score as it is: standard RLHF, p·exp(r/β)/Z at the optimum."""

    label = "raw"

    def utility(self, rewards: Float, prompt_id: Sequence[str]) -> Float:
        """R."""
        return rewards


class StandardisedReward(UncalibratedReward):
    """Each prompt's group of rollouts at mean 0 and standard deviation 1, as GRPO does.

    GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2, outcome supervision) divides the rewards alone, not the KL;
    with the KL inside the reward, exact, its fixed point is p·exp(r/(β σ))/Z with σ the standard deviation of r under
    the *trained* policy, prompt by prompt: the surer a policy is of itself, the smaller β becomes in effect.
    A group is what one call holds of a prompt's rollouts.
    """

    label = "standardised"
    EPSILON = 1e-4  # for groups whose rewards are all equal

    def utility(self, rewards: Float, prompt_id: Sequence[str]) -> Float:
        """(r − mean) / (standard deviation + 1e-4) over the rollouts of the same prompt."""
        _, group_B = np.unique(np.asarray(prompt_id), return_inverse=True)
        count_G = np.bincount(group_B)
        centred_B = rewards - (np.bincount(group_B, rewards) / count_G)[group_B]
        std_G = np.sqrt(np.bincount(group_B, centred_B**2) / np.maximum(count_G - 1, 1))
        return centred_B / (std_G + self.EPSILON)[group_B]


class LogSigmoidReward(UncalibratedReward):
    """log σ(r − r_ref) with r_ref a quantile of the reference's rewards to that prompt.

    The log-sigmoid-centred transformation of Wang et al. 2024 (arXiv 2402.00742): rewards far above r_ref count little
    more than rewards above it. At the optimum p·σ(r − r_ref)^(1/β)/Z.

    Args:
        source: As for `UncalibratedReward`.
        calibrator: As for `UncalibratedReward`.
        prompt_ids: As for `UncalibratedReward`.
        beta: As for `UncalibratedReward`.
        procedure: As for `UncalibratedReward`.
        quantile: Which quantile of the references is the centre.
    """

    label = "log-sigmoid"

    def __init__(
        self,
        source: RewardSource,
        calibrator: RewardCalibrator,
        prompt_ids: Sequence[str],
        beta: float,
        *,
        procedure: InferenceProcedure | None = None,
        quantile: float = 0.85,
    ) -> None:
        super().__init__(source, calibrator, prompt_ids, beta, procedure=procedure)
        if not 0.0 <= quantile <= 1.0:
            raise InputError(f"quantile is {quantile}", where="LogSigmoidReward", hint="Give a number in [0, 1]")
        self._centre_P = np.array([np.quantile(row, quantile) for row in self._ref_rewards_PK])

    def utility(self, rewards: Float, prompt_id: Sequence[str]) -> Float:
        """Log σ(r − r_ref)."""
        return -np.logaddexp(0.0, self._centre_P[self.rows(prompt_id)] - rewards)


def beta_for_kl(reward: UncalibratedReward, kl: float) -> float:
    """The β at which tilting each prompt's stored references by exp(u/β) has this mean KL in nats.

    Raises:
        InputError: If the references cannot spend that KL: log K is the most there is.
    """
    utilities = reward.ref_utilities()

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
            where=reward.label,
            hint="Use more reference rollouts per prompt (rollouts.num_ref), or a smaller KL",
        )
    found: Any = brentq(lambda log_beta: spent(log_beta) - kl, low, high, xtol=1e-9)
    return float(np.exp(found))


# --- losses on stored rollouts -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class QRPO:
    """Quantile Reward Policy Optimization as published (Matrenok et al. 2025, arXiv 2507.08068).

    The quantile is the share of the K references that a reward is at least equal to, the rollout itself among them;
    log Z = log β + 1/β is that of K = ∞, simplified (eq. 11). Our `Regression` with the identity leaves the rollout out
    of its own comparison and knows the normaliser for finite K.
    """

    beta: float
    label: str = "qrpo"
    any_distribution: bool = False  # the quantile counts the rollout itself among the references

    def examples(self, pool: RolloutPool) -> Examples:
        """Each rollout by itself."""
        quantile_R = (pool.ranks_R + pool.ties_R / 2.0 + 1.0) / (pool.num_ref_R + 1.0)
        return single_examples(quantile_R / self.beta - np.log(self.beta) - 1.0 / self.beta)

    def __call__(self, log_ratios_NM: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """(quantile − β log Z − β (log π − log p))², over β²: nats²."""
        return squared_residual(log_ratios_NM[:, 0], targets_N)


def best_and_worst(pool: RolloutPool, n: int, target: float = 0.0) -> Examples:
    """The best and the worst of every n of a prompt's rollouts, in the order they were drawn; ties give no pair.

    Args:
        pool: The rollouts.
        n: Size of the groups.
        target: What the loss of a pair compares with.

    Raises:
        InputError: If no prompt has n rollouts of different rewards, or n is less than 2.
    """
    if n < 2:
        raise InputError(f"the best and the worst of {n}", where="n", hint="Use at least 2")
    pairs: list[tuple[int, int]] = []
    for prompt in range(len(pool.prompts)):
        rows = np.flatnonzero(pool.prompt_R == prompt)
        for start in range(0, len(rows) - n + 1, n):
            group = rows[start : start + n]
            ranks = pool.ranks_R[group]
            if ranks.max() > ranks.min():
                pairs.append((int(group[ranks.argmax()]), int(group[ranks.argmin()])))
    if not pairs:
        raise InputError(f"no prompt has {n} rollouts of different rewards", where="best and worst",
                         hint="Draw more reference rollouts per prompt (rollouts.num_ref), or lower n")  # fmt: skip
    return Examples(np.array(pairs, dtype=np.int64), np.full(len(pairs), target), np.ones(len(pairs)))


def lead(log_ratios_NM: torch.Tensor) -> torch.Tensor:
    """Log-ratio of the best less that of the worst of each pair, shape (N,)."""
    return log_ratios_NM[:, 0] - log_ratios_NM[:, 1]


@dataclass(frozen=True)
class DPO:
    """Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) on best-and-worst pairs.

    Where preferences follow Bradley and Terry's model of a reward r the optimum is p·exp(r/β)/Z. Here the better one
    always wins, and there is no optimum: the margin grows with training, which the number of steps and a KL budget
    bound.

    Attributes:
        beta: β.
        n: Size of the groups that the best and the worst are taken from.
    """

    beta: float = 0.1
    n: int = 2
    label: str = "dpo"
    any_distribution: bool = False

    def examples(self, pool: RolloutPool) -> Examples:
        """Best and worst of every n."""
        return best_and_worst(pool, self.n)

    def __call__(self, log_ratios_NM: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """−log σ(β (log-ratio of the best − log-ratio of the worst))."""
        return -torch.nn.functional.logsigmoid(self.beta * lead(log_ratios_NM))


@dataclass(frozen=True)
class IPO:
    """IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17) on best-and-worst pairs, with sums over whole sequences.

    On pairs of independent draws (n = 2) the optimum is p·exp(C/τ)/Z: calibrated RLHF at β = τ.

    Attributes:
        beta: The paper's τ.
        n: Size of the groups that the best and the worst are taken from.
    """

    beta: float = 0.1
    n: int = 2
    label: str = "ipo"
    any_distribution: bool = False

    def examples(self, pool: RolloutPool) -> Examples:
        """Best and worst of every n; the target is 1/(2τ)."""
        return best_and_worst(pool, self.n, target=0.5 / self.beta)

    def __call__(self, log_ratios_NM: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """(log-ratio of the best − log-ratio of the worst − 1/(2τ))²."""
        return squared_residual(lead(log_ratios_NM), targets_N)


@dataclass(frozen=True)
class BoNBoN:
    """BoNBoN (Gui et al. 2024, arXiv 2406.00832): imitate the best of n, and put the worst of n as far behind.

    α times maximum likelihood on the best of n, and 1 − α times an IPO loss whose target is the expected difference of
    log-ratios, under Best-of-n, between the best and the worst of n: (n − 1) Σ_{k<n} 1/k.

    Attributes:
        n: The n of Best-of-n.
        alpha: Share of the likelihood part.
    """

    n: int = 4
    alpha: float = 0.005
    label: str = "bonbon"
    any_distribution: bool = False

    @property
    def beta(self) -> float:
        """The β of the IPO part: 1 / (2 (n − 1) Σ_{k<n} 1/k)."""
        return 0.5 / ((self.n - 1) * sum(1.0 / k for k in range(1, self.n)))

    @property
    def ipo(self) -> IPO:
        """The IPO part."""
        return IPO(self.beta, self.n)

    def examples(self, pool: RolloutPool) -> Examples:
        """Best and worst of every n; the target is that of the IPO part."""
        return self.ipo.examples(pool)

    def __call__(self, log_ratios_NM: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """−α (log π − log p of the best) + (1 − α) (difference − target)²."""
        return -self.alpha * log_ratios_NM[:, 0] + (1.0 - self.alpha) * self.ipo(log_ratios_NM, targets_N)
