"""What training aims at: how many nats a response is paid, and the log of what that sums to under the reference.

A target is a pure function of ranked rollouts. It holds one β, one strength, one cap and, where the reward follows the
policy, one estimate of that policy; when any of these changes there is a new target (`target_of`), and the old one
still says what it said. So what was paid and its log Z belong together, whatever is asked first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from infalign.calibration.calibrator import RewardCalibrator
from infalign.calibration.combined import CombinedCalibrator
from infalign.theory.finite_k import tilt_at_ranks
from infalign.training.mixture import mixture_log_partition
from infalign.training.rank_value import RankTable
from infalign.training.ranked import RankedRollouts
from infalign.training.self_consistent import SelfConsistentTransform
from infalign.training.tilt import tilt_by_rank, tilt_of_reward
from infalign.transforms import RewardTransform

Float = NDArray[np.float64]
Int = NDArray[np.int64]
Levels: TypeAlias = Callable[[int], Int | None]


@dataclass(frozen=True)
class Scale:
    """How what is maximised becomes nats.

    Attributes:
        beta: KL coefficient, in units of what is maximised per nat.
        strength: Share of the tilt that is in force, in (0, 1]; below 1 while training anneals.
        cap: Most nats that a tilt may lie above log Z (`tilt.py`); None for no cap. Rewards that are not calibrated
            have none.
        weight: The policy's share of the mixture that it is trained in (M19); 1 where it is used alone.
    """

    beta: float
    strength: float = 1.0
    cap: float | None = None
    weight: float = 1.0


class Target(Protocol):
    """What a policy is trained towards: p·exp(nats)/Z on every prompt."""

    def nats(self, ranked: RankedRollouts) -> Float:
        """What each rollout is paid, in nats, shape (B,)."""
        ...

    def log_partition(self, row_B: Int) -> Float:
        """Log Z = log E_p exp(nats) on these rows of the calibrator, in nats, shape (B,)."""
        ...


class FixedTarget:
    """Φ_K(b)/β of a transform that stays as it is: the rank-conditional tilt (M6). One table for each K.

    Args:
        transform: Φ.
        num_ref_P: K of each of the calibrator's rows.
        scale: β, strength, cap and mixture weight.
    """

    def __init__(self, transform: RewardTransform, num_ref_P: Int, scale: Scale) -> None:
        self._transform, self._num_ref_P, self._scale = transform, num_ref_P, scale
        self._table_of: dict[int, Float] = {}  # by K, each made when it is first needed

    def nats(self, ranked: RankedRollouts) -> Float:
        """Φ_K(b)/β times the strength, shape (B,); a tie has the log-mean-exp of the ranks that it leaves open."""
        out_B = np.empty(len(ranked))
        for num_ref in np.unique(ranked.num_ref_B):
            of_K = ranked.num_ref_B == num_ref
            out_B[of_K] = tilt_at_ranks(self._table(int(num_ref)), 1.0, ranked.rank_B[of_K], ranked.tied_B[of_K])
        return out_B

    def log_partition(self, row_B: Int) -> Float:
        """Log Z of each row (M6; inside a mixture M19), shape (B,)."""
        return np.array(
            [mixture_log_partition(self._table(int(k)), self._scale.weight) for k in self._num_ref_P[row_B]]
        )

    def _table(self, num_ref: int) -> Float:
        if num_ref not in self._table_of:
            table = tilt_by_rank(self._transform, self._scale.beta, num_ref, self._scale.cap)
            self._table_of[num_ref] = self._scale.strength * table
        return self._table_of[num_ref]


class SelfConsistentTarget:
    """R/β at one estimate of the policy (M17). One table for each prompt.

    Args:
        estimate: What is known of the policy. It must not change any more: give `transform.frozen()`.
        num_ref_P: K of each of the calibrator's rows.
        levels: Of a row, how many of its references are equal (`RankScale.reward`); None where the tie rule leaves no
            ties.
        scale: β, strength, cap and mixture weight.
    """

    def __init__(self, estimate: SelfConsistentTransform, num_ref_P: Int, levels: Levels, scale: Scale) -> None:
        self._estimate, self._num_ref_P, self._levels, self._scale = estimate, num_ref_P, levels, scale
        self._table_of: dict[int, RankTable] = {}  # by row, each made when it is first needed

    def nats(self, ranked: RankedRollouts) -> Float:
        """R/β times the strength, shape (B,)."""
        out_B = np.empty(len(ranked))
        for row in np.unique(ranked.prompt_B):
            of_row = ranked.prompt_B == row
            out_B[of_row] = self._table(int(row)).at(ranked.first_B[of_row], ranked.tied_B[of_row])
        return out_B

    def log_partition(self, row_B: Int) -> Float:
        """Log Z of each row (M17; inside a mixture M19), shape (B,)."""
        return np.array([mixture_log_partition(self._table(int(row)).half_cells, self._scale.weight) for row in row_B])

    def _table(self, row: int) -> RankTable:
        if row not in self._table_of:
            reward = self._estimate.reward(int(self._num_ref_P[row]), row, self._levels(row))
            scale = self._scale
            self._table_of[row] = tilt_of_reward(reward, scale.beta, scale.cap).times(scale.strength)
        return self._table_of[row]


@dataclass(frozen=True, eq=False)
class Utility:
    """What a comparator maximises: a function u of raw rewards, which no calibration has touched.

    Attributes:
        label: A short name.
        of: Raw rewards, shape (B,), and the calibrator's row of each one's prompt → u, shape (B,).
        references: The calibrator that holds each row's reference rewards.
    """

    label: str
    of: Callable[[Float, Int], Float]
    references: RewardCalibrator

    def of_references(self, rows: Iterable[int] | None = None) -> list[Float]:
        """U of the references of some rows, of all by default: one array of shape (K,) per row."""
        ref_rewards_PK = self.references.ref_rewards_PK
        chosen = range(self.references.num_prompts) if rows is None else rows
        refs_of = {row: np.asarray(ref_rewards_PK[row], dtype=np.float64) for row in chosen}
        return [self.of(refs_K, np.full(len(refs_K), row)) for row, refs_K in refs_of.items()]


class UtilityTarget:
    """u(r)/β of raw rewards; ranks play no part.

    Args:
        utility: u.
        scale: β and strength; there is no cap, and no mixture.
    """

    def __init__(self, utility: Utility, scale: Scale) -> None:
        self._utility, self._scale = utility, scale

    def nats(self, ranked: RankedRollouts) -> Float:
        """u(r)/β times the strength, shape (B,)."""
        assert ranked.raw_B is not None, "a comparison with references keeps what was compared"
        return self._scale.strength * self._utility.of(ranked.raw_B, ranked.prompt_B) / self._scale.beta

    def log_partition(self, row_B: Int) -> Float:
        """Log of the mean of exp(u/β) over each row's references, shape (B,): an estimate of log Z."""
        rows_U, which_B = np.unique(row_B, return_inverse=True)
        per_nat = self._scale.strength / self._scale.beta
        utilities = self._utility.of_references(rows_U)
        return np.array([logsumexp(per_nat * u_K) - np.log(len(u_K)) for u_K in utilities])[which_B]


Maximised: TypeAlias = RewardTransform | SelfConsistentTransform | Utility
"""What a reward is made of, in units of β per nat: Φ of calibrated rewards, or a comparator's u of raw ones."""


def follower_of(maximised: Maximised) -> SelfConsistentTransform | None:
    """The part that follows the policy as it trains; None where nothing does."""
    return maximised if isinstance(maximised, SelfConsistentTransform) else None


def target_of(
    maximised: Maximised,
    calibrator: RewardCalibrator | CombinedCalibrator,
    scale: Scale,
    levels: Levels | None = None,
) -> Target:
    """The target of a transform, at its present estimate of the policy if it has one, or of a comparator's utility.

    Args:
        maximised: Φ or u.
        calibrator: Holds the references, row by row.
        scale: How it becomes nats.
        levels: `levels_of(calibrator)`, for callers that make one target after another; by default a new one.
    """
    if isinstance(maximised, Utility):
        return UtilityTarget(maximised, scale)
    following = follower_of(maximised)
    if following is not None:
        return SelfConsistentTarget(following.frozen(), calibrator.num_ref_P, levels or levels_of(calibrator), scale)
    assert isinstance(maximised, RewardTransform), "neither a utility nor one that follows"
    return FixedTarget(maximised, calibrator.num_ref_P, scale)


def levels_of(calibrator: RewardCalibrator | CombinedCalibrator) -> Levels:
    """How many of a row's references have its lowest reward, the next, …; each row is looked at once.

    A tie rule that decides ties leaves no levels: every rank is then its own, and the answer is None.
    """
    return cache(lambda row: calibrator.level_counts(row) if calibrator.ties == "midrank" else None)
