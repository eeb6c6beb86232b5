"""Predictability: what a policy reaches that tells only part of the reward from its own text (M14, M15).

The policy tilts a latent score s ~ N(0, 1) (under the reference). The reward's normal score is z = ρ s + sqrt(1 - ρ²) e
with e independent, and its rank is u = P(Z <= z). KL is paid on s. The predictability ρ is the correlation of s and z;
with ρ = 1 the policy tilts the rank itself, and everything is as in M9.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt

from infalign.errors import InputError
from infalign.numerics.quadrature import unit_interval
from infalign.numerics.special import log_ndtr, ndtr, ndtri
from infalign.procedures import InferenceProcedure, Standard
from infalign.theory.channel_solver import FINEST, REACH, Grid, Policy, Solved, above, below, solve, wide_enough
from infalign.theory.optimal import OptimalTransform, optimal_transform
from infalign.theory.tilt import TiltedPolicy
from infalign.theory.winrate import Objective
from infalign.transforms import Identity, Log, RewardTransform, Tabulated, check_is_transform, positive_beta

Array = npt.NDArray[np.float64]

SMALLEST_BETA = 1e-6
"""Below it, rounding of R spoils R/β."""

LOWEST, HIGHEST = 0.05, 0.999
"""Predictabilities below 1 that are resolved."""

_TABLE_STEP = 0.02
_Z_END = 20.0
_TABLE_REACH = 8.2  # u is a float64 below 1 up to there


@dataclass(frozen=True, eq=False)
class ChannelPolicy:
    """A tilt of the latent score, seen as a distribution of the reward's rank.

    Attributes:
        predictability: ρ.
        beta: KL coefficient, in units of the reward per nat.
        kl: KL(π‖p), paid on s, in nats per response.
    """

    predictability: float
    beta: float
    kl: float
    _log_tilt: Callable[[Array], Array] = field(repr=False)
    _cdf: Callable[[Array], Array] = field(repr=False)
    _win_rate: Callable[[InferenceProcedure, InferenceProcedure | None], float] = field(repr=False)

    def log_tilt(self, s: npt.ArrayLike) -> Array:
        """The logarithm of t(s), the policy's density of s over the reference's.

        Args:
            s: Latent scores, standard normal under the reference, any shape.
        """
        points = np.asarray(s, dtype=np.float64)
        return self._log_tilt(points.ravel()).reshape(points.shape)

    def cdf(self, u: npt.ArrayLike) -> Array:
        """F(u): the probability that the policy's response has a calibrated reward of at most u.

        Args:
            u: Ranks in [0, 1], any shape.
        """
        points = unit_interval(u, "ChannelPolicy.cdf(u)")
        inside = self._cdf(np.clip(ndtri(points), -REACH, REACH).ravel()).reshape(points.shape)
        return np.where(points <= 0.0, 0.0, np.where(points >= 1.0, 1.0, np.clip(inside, 0.0, 1.0)))

    def win_rate(self, procedure: InferenceProcedure, opponent: InferenceProcedure | None = None) -> float:
        """M8: the chance that the procedure on this policy beats the opponent's procedure on the reference.

        Args:
            procedure: What is done with this policy.
            opponent: What is done with the reference; the same procedure if None.
        """
        return self._win_rate(procedure, opponent)


@dataclass(frozen=True, eq=False)
class ChannelOptimum:
    """The solution of M15 for one procedure, β and predictability; made by `channel_optimum`.

    Attributes:
        procedure: The procedure run on the policy.
        opponent: What is run on the reference; None if it is the same procedure.
        beta: KL coefficient, in units of the transform per nat.
        predictability: ρ.
        kl: KL(π‖p) in nats per response.
        win_rate: W of the procedure against its opponent (M8).
        unique: Whether it is proved that no other policy is stationary.
        policy: The policy.
    """

    procedure: InferenceProcedure
    opponent: InferenceProcedure | None
    beta: float
    predictability: float
    kl: float
    win_rate: float
    unique: bool
    policy: ChannelPolicy = field(repr=False)
    _made: OptimalTransform | Solved = field(repr=False)

    @property
    def standard_win_rate(self) -> float:
        """The chance that one sample of the policy beats one sample of the reference."""
        return self.policy.win_rate(Standard())

    @cached_property
    def transform(self) -> RewardTransform:
        """Φ with Φ' = h(F) h0: rewarding Φ(C) with this β leads such a policy here. Tabulated to about 1e-7."""
        if isinstance(self._made, OptimalTransform):
            return self._made.transform
        standard = Standard()
        objective = self._made.problem.objective
        if all(part == standard and opponent == standard for _, part, opponent in objective.terms):
            return Identity()
        name = f"optimal for {self.procedure.label}, beta={self.beta:.6g}, predictability={self.predictability:g}"
        return _table(objective, self.policy, name)


def channel_optimum(
    procedure: InferenceProcedure, beta: float, predictability: float, opponent: InferenceProcedure | None = None
) -> ChannelOptimum:
    """Solve M15: the policy of limited predictability that maximises W - β KL for a procedure.

    Args:
        procedure: What is done with the aligned policy.
        beta: KL coefficient, in units of win rate per nat.
        predictability: ρ, the correlation of what the policy can tilt with the reward's normal score.
        opponent: What is done with the reference; the same procedure if None.

    Raises:
        InputError: If beta is not positive or below 1e-6, the predictability is out of range, or no solution is found.
    """
    predictability = check_predictability(predictability)
    if predictability == 1.0:
        return ideal(optimal_transform(procedure, beta, opponent))
    beta = positive_beta(beta)
    if beta < SMALLEST_BETA:
        raise InputError(
            f"beta = {beta:g} is too small to be resolved", where="beta", hint=f"Use {SMALLEST_BETA:g} or more"
        )
    return of_solved(procedure, opponent, solve(Objective.of(procedure, opponent), beta, predictability))


def ideal(optimum: OptimalTransform) -> ChannelOptimum:
    """An optimum of M9, in the words of a channel with predictability 1."""
    return ChannelOptimum(
        procedure=optimum.procedure,
        opponent=optimum.opponent,
        beta=optimum.beta,
        predictability=1.0,
        kl=optimum.kl,
        win_rate=optimum.win_rate,
        unique=optimum.unique,
        policy=_ideal_policy(optimum.tilt, optimum.kl),
        _made=optimum,
    )


def of_solved(procedure: InferenceProcedure, opponent: InferenceProcedure | None, solved: Solved) -> ChannelOptimum:
    """An optimum of the channel, from what the solver found."""
    grid, objective = solved.problem.grid, solved.problem.objective
    slope = solved.problem.slope(solved.policy)
    return ChannelOptimum(
        procedure=procedure,
        opponent=opponent,
        beta=solved.problem.beta,
        predictability=grid.predictability,
        kl=solved.policy.kl,
        win_rate=solved.policy.win_rate(objective),
        unique=objective.concave,
        policy=_policy(solved.policy, solved.problem.beta, lambda s: slope @ above(grid.z, s, grid.predictability)),
        _made=solved,
    )


def channel_tilt(transform: RewardTransform, beta: float, predictability: float) -> ChannelPolicy:
    """Where RL on a given transform of the calibrated reward leads such a policy: t(s) ∝ exp(E[Φ(U) | s] / β).

    Args:
        transform: Φ.
        beta: KL coefficient, in units of Φ per nat.
        predictability: ρ.

    Raises:
        InputError: If beta is not positive, or the predictability is out of range.
    """
    check_is_transform(transform, "channel_tilt")
    beta, predictability = positive_beta(beta), check_predictability(predictability)
    if predictability == 1.0:
        tilt = TiltedPolicy(transform, beta)
        return _ideal_policy(tilt, tilt.kl)
    return tilt_by(reward_of(transform, predictability), beta, predictability)


def reward_of(transform: RewardTransform, predictability: float) -> Callable[[Array], Array]:
    """E[Φ(U) | s] as a function of s."""
    width = math.sqrt(1.0 - predictability**2)
    if isinstance(transform, Identity):
        return lambda s: ndtr(predictability * s / math.sqrt(1.0 + width**2))
    # Gauss-Hermite in e would miss a sharp Φ: the trapezoidal rule on a fine grid of z does not.
    z = np.arange(-_Z_END, _Z_END + 1e-9, min(0.5 * width, 0.05))
    step = z[1] - z[0]
    values = log_ndtr(z) if isinstance(transform, Log) else transform(np.clip(ndtr(z), 0.0, 1.0))

    def reward(s: Array) -> Array:
        kernel = np.exp(-0.5 * ((z - predictability * s[:, None]) / width) ** 2)
        return kernel @ values * (step / (width * math.sqrt(2.0 * math.pi)))

    return reward


def tilt_by(reward: Callable[[Array], Array], beta: float, predictability: float) -> ChannelPolicy:
    """The tilt of s by exp(reward(s)/β), on a grid fine and wide enough for it."""
    grid = Grid.first(predictability)
    policy = Policy.of(grid, reward(grid.s) / beta)
    while True:
        offset = float((reward(grid.s[:1]) / beta - policy.log_tilt[:1])[0])
        other = wide_enough(policy, partial(_log_tilt, reward, beta, offset))
        if other is grid:
            other = grid.finer()
        better = Policy.of(other, reward(other.s) / beta)
        if abs(better.kl - policy.kl) <= 1e-9 * max(1.0, policy.kl) and other.reach == grid.reach:
            return _policy(policy, beta, reward)
        if other.step < FINEST:
            raise InputError("the policy is too sharp to be resolved", where="channel_tilt", hint="Use a larger beta")
        grid, policy = other, better


def check_predictability(predictability: float) -> float:
    """ρ as a float.

    Raises:
        InputError: If it is not a number that can be resolved.
    """
    try:
        value = float(predictability)
    except (TypeError, ValueError) as error:
        raise InputError(f"{predictability!r} is not a number", where="predictability") from error
    if value == 1.0 or LOWEST <= value <= HIGHEST:
        return value
    if HIGHEST < value < 1.0:
        hint = f"Use {HIGHEST} or 1, which differ by less than 0.003 in win rate"
    else:
        hint = f"Give a correlation from {LOWEST} to 1; small models have about 0.5 to 0.7"
    raise InputError(f"a predictability of {value:g} is out of range", where="predictability", hint=hint)


def _ideal_policy(tilt: TiltedPolicy, kl: float) -> ChannelPolicy:
    log_partition = tilt.log_partition
    return ChannelPolicy(
        predictability=1.0,
        beta=tilt.beta,
        kl=kl,
        _log_tilt=lambda s: tilt.transform(ndtr(s)) / tilt.beta - log_partition,
        _cdf=lambda z: tilt.cdf(ndtr(z)),
        _win_rate=tilt.win_rate,
    )


def _policy(policy: Policy, beta: float, reward: Callable[[Array], Array]) -> ChannelPolicy:
    grid = policy.grid
    # `Policy.of` took the partition off R/β as it was given.
    offset = float((reward(grid.s[:1]) / beta - policy.log_tilt[:1])[0])
    return ChannelPolicy(
        predictability=grid.predictability,
        beta=beta,
        kl=policy.kl,
        _log_tilt=partial(_log_tilt, reward, beta, offset),
        _cdf=lambda z: below(z, grid.s, grid.predictability) @ policy.masses,
        _win_rate=lambda procedure, opponent: policy.win_rate(Objective.of(procedure, opponent)),
    )


def _log_tilt(reward: Callable[[Array], Array], beta: float, offset: float, s: Array) -> Array:
    return reward(s) / beta - offset


def _table(objective: Objective, policy: ChannelPolicy, name: str) -> Tabulated:
    """Φ = ∫ h(F) h0 du, as a cubic Hermite table at even steps of z."""
    z = np.arange(-_TABLE_REACH, _TABLE_REACH + 1e-9, _TABLE_STEP)
    # Simpson's rule between neighbours: Φ and Φ' are smooth in z.
    fine = np.arange(-_TABLE_REACH, _TABLE_REACH + 1e-9, _TABLE_STEP / 2)[: 2 * z.size - 1]
    u = ndtr(fine)
    slopes = objective.reward_slope(policy.cdf(u), objective.opponent_densities(u))
    steep = slopes * np.exp(-0.5 * fine**2) / math.sqrt(2.0 * math.pi)
    pieces = _TABLE_STEP / 6.0 * (steep[:-2:2] + 4.0 * steep[1:-1:2] + steep[2::2])
    values = np.concatenate([[0.0], np.cumsum(pieces)])
    ends = np.array([0.0, 1.0])
    end_slopes = objective.reward_slope(ends, objective.opponent_densities(ends))
    points = np.concatenate([[0.0], u[::2], [1.0]])
    keep = np.insert(np.diff(points) > 0.0, 0, True) & (points < 1.0)
    keep[-1] = True
    values = np.maximum.accumulate(np.concatenate([[0.0], values, values[-1:]]))[keep]
    slopes = np.concatenate([end_slopes[:1], slopes[::2], end_slopes[1:]])[keep]
    points = points[keep]
    limit = 3.0 * np.diff(values) / np.diff(points)
    slopes = np.minimum(slopes, np.minimum(np.append(limit, np.inf), np.insert(limit, 0, np.inf)))
    return Tabulated(points, values, slopes, name=name)
