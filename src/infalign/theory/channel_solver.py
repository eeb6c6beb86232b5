"""The optimum of a policy that sees the reward through a Gaussian channel (M14, M15), on a uniform grid.

A latent score s ~ N(0, 1) is all that the policy can tilt; the reward's normal score is z = ρ s + sqrt(1 - ρ²) e. All
integrands are analytic and fall off like a Gaussian: the trapezoidal rule converges faster than any power of its step.
The kernel P(Z <= z | s) is sqrt(1 - ρ²) wide: that is the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import numpy.typing as npt

from infalign.errors import InputError
from infalign.numerics.special import log_ndtr, ndtr
from infalign.theory.winrate import Objective

Array = npt.NDArray[np.float64]

REACH = 8.6
"""The reference's scores are cut off there: what is left out is 8e-18 of it."""

FURTHEST = 120.0
"""Furthest score that the policy may use: where ρ is small and N large, the rarest of responses are worth their KL."""

_COARSEST = 0.18
FINEST = 0.009
_J_TOLERANCE = 2e-9
_MOST_STEPS = 200
_EASY_BETA = 0.3
_NEARLY = 1e-11
_NO_MASS = math.log(1e-14)
_LONGEST_STEP = 6.0


@dataclass(frozen=True, eq=False)
class Grid:
    """Where scores s of the policy and normal scores z of the reward are evaluated.

    Attributes:
        predictability: ρ, in (0, 1).
        step: Distance between neighbours, of s and of z alike.
        reach: Highest s; the lowest is -`REACH`, as no reward falls with s, and so is it for z, as the opponent is the
            reference.
    """

    predictability: float
    step: float
    reach: float = REACH

    @classmethod
    def first(cls, predictability: float) -> Grid:
        """The coarsest grid that resolves the kernel."""
        return cls(predictability, min(0.8 * math.sqrt(1 - predictability**2) / predictability, _COARSEST))

    @cached_property
    def s(self) -> Array:
        """Scores, shape (S,)."""
        return _even(self.step, self.reach)

    @cached_property
    def z(self) -> Array:
        """Normal scores of the reward, shape (Z,)."""
        return _even(self.step, REACH)

    @cached_property
    def log_weights(self) -> Array:
        """Logarithm of the reference's probability of each s, shape (S,)."""
        return log_normal(self.s) + math.log(self.step)

    @cached_property
    def rank_weights(self) -> Array:
        """The length du of each z, shape (Z,)."""
        return np.exp(log_normal(self.z)) * self.step

    @cached_property
    def below(self) -> Array:
        """P(Z <= z | s), shape (Z, S)."""
        return below(self.z, self.s, self.predictability)

    def finer(self) -> Grid:
        """The same with half the step."""
        return Grid(self.predictability, self.step / 2, self.reach)


@dataclass(frozen=True, eq=False)
class Policy:
    """A tilt of s on a grid.

    Attributes:
        grid: Where it is known.
        log_tilt: log t(s), normalised, shape (S,).
        cdf: P(Z <= z) under the policy, shape (Z,).
        log_partition: What was taken off to normalise.
    """

    grid: Grid
    log_tilt: Array
    cdf: Array
    log_partition: float

    @classmethod
    def of(cls, grid: Grid, log_tilt: Array) -> Policy:
        """Normalise a tilt."""
        masses = grid.log_weights + log_tilt
        top = masses.max()
        log_partition = float(top + np.log(np.sum(np.exp(masses - top))))
        normalised = log_tilt - log_partition
        cdf = np.clip(grid.below @ np.exp(grid.log_weights + normalised), 0.0, 1.0)
        return cls(grid, normalised, cdf, log_partition)

    @cached_property
    def masses(self) -> Array:
        """The policy's probability of each s, shape (S,)."""
        return np.exp(self.grid.log_weights + self.log_tilt)

    @cached_property
    def kl(self) -> float:
        """KL in nats: a sum of terms that are not negative, so nothing is lost when it is tiny."""
        terms = self.masses * self.log_tilt - self.masses + np.exp(self.grid.log_weights)
        return max(float(terms.sum()), 0.0)

    def win_rate(self, objective: Objective) -> float:
        """M8, with the CDF of the reward's rank under this policy."""
        opponents = objective.opponent_densities(ndtr(self.grid.z))
        return 1.0 - float(self.grid.rank_weights @ objective.loss_density(self.cdf, opponents))


@dataclass(frozen=True, eq=False)
class Problem:
    """W - β KL on one grid."""

    objective: Objective
    beta: float
    grid: Grid

    @cached_property
    def opponents(self) -> list[Array]:
        """Densities of the opponent's output, times du."""
        return [density * self.grid.rank_weights for density in self.objective.opponent_densities(ndtr(self.grid.z))]

    def value(self, policy: Policy) -> float:
        """J = W - β KL."""
        return 1.0 - float(self.objective.loss_density(policy.cdf, self.opponents).sum()) - self.beta * policy.kl

    def slope(self, policy: Policy) -> Array:
        """R'(u) du at every z, shape (Z,)."""
        return self.objective.reward_slope(policy.cdf, self.opponents)

    def reward(self, policy: Policy) -> Array:
        """R(s) = ∫ h(F) h0 P(U > u | s) du, shape (S,)."""
        return self.slope(policy) @ (1.0 - self.grid.below)

    def newton(self, policy: Policy, gap: Array) -> Array:
        """Newton's step of log t, where `gap` is R/β - log t without its mean under the policy."""
        masses, below = policy.masses, self.grid.below
        curvature = self.objective.reward_slope_by_cdf(policy.cdf, self.opponents)
        use = np.abs(curvature) > 1e-17 * max(float(np.abs(curvature).max()), 1e-300)
        if not use.any():
            return gap
        rows = below[use]
        centred = rows - policy.cdf[use, None]
        weighted = centred * masses
        spread = (weighted @ rows.T) * (curvature[use] / self.beta)
        moved = np.linalg.solve(np.eye(int(use.sum())) + spread, weighted @ gap)
        step = gap - (curvature[use] / self.beta * moved) @ rows
        return step - float(masses @ step)

    def climb(self, start: Array) -> tuple[Policy, bool]:
        """Go up J from a tilt: Newton's step where it goes up, else a step of the natural gradient.

        Returns:
            The policy, and whether it is stationary.
        """
        policy = Policy.of(self.grid, start)
        value = self.value(policy)
        for _ in range(_MOST_STEPS):
            gap, rise = self.gap(policy)
            if rise <= _NEARLY:
                policy = self._polished(policy, gap, rise)
                # R/β has the right values also where this policy has no mass; only a true optimum stays where it is.
                exact = Policy.of(self.grid, self.reward(policy) / self.beta)
                reached = self.value(exact)
                if abs(reached - self.value(policy)) <= 1e-10 + 1e-14 * self.beta:
                    return exact, True
                if reached < value:
                    return policy, False
                policy, value = exact, reached
                continue
            found = None
            for direction in (self.newton(policy, gap), gap):
                ascent = self.beta * float(policy.masses @ (gap * direction))
                if not np.isfinite(ascent) or ascent <= 0:
                    continue
                found = self._along(policy, value, direction, ascent)
                if found is not None:
                    break
            if found is None:
                return policy, False
            policy, value = found
        return policy, False

    def gap(self, policy: Policy) -> tuple[Array, float]:
        """R/β - log t without its mean under the policy, and about how much J could rise by closing it."""
        gap = self.reward(policy) / self.beta - policy.log_tilt
        gap = gap - float(policy.masses @ gap)
        return gap, 0.5 * self.beta * float(policy.masses @ gap**2)

    def _polished(self, policy: Policy, gap: Array, rise: float) -> Policy:
        """Newton's steps as long as they bring the gap down, to where J itself is lost in rounding."""
        for _ in range(8):
            other = Policy.of(self.grid, policy.log_tilt + self.newton(policy, gap))
            other_gap, other_rise = self.gap(other)
            if not other_rise < 0.25 * rise:
                break
            policy, gap, rise = other, other_gap, other_rise
        return policy

    def _along(self, policy: Policy, value: float, direction: Array, ascent: float) -> tuple[Policy, float] | None:
        spread = math.sqrt(float(policy.masses @ direction**2))
        length = min(1.0, _LONGEST_STEP / max(spread, 1e-300))
        while length > 1e-4:
            other = Policy.of(self.grid, policy.log_tilt + length * direction)
            reached = self.value(other)
            if reached >= value + 1e-4 * length * ascent - 4e-16:
                return other, reached
            length *= 0.35
        return None

    def on(self, s: Array, policy: Policy) -> Array:
        """R/β for a policy of this grid, at any scores: its log tilt but for a constant."""
        return self.slope(policy) @ above(self.grid.z, s, self.grid.predictability) / self.beta


@dataclass(frozen=True, eq=False)
class Solved:
    """An optimum: a stationary policy of a problem."""

    problem: Problem
    policy: Policy

    @property
    def value(self) -> float:
        """J = W - β KL."""
        return self.problem.value(self.policy)

    def start(self, problem: Problem) -> Array:
        """The log tilt by the same reward on another problem's grid, at its β."""
        return self.problem.on(problem.grid.s, self.policy) * (self.problem.beta / problem.beta)


def solve(
    objective: Objective, beta: float, predictability: float, near: Sequence[Solved] = (), thorough: bool = True
) -> Solved:
    """The best stationary policy (M15) that several starts lead to, on a grid fine and wide enough for it.

    Args:
        objective: The win rate.
        beta: KL coefficient.
        predictability: ρ, in (0, 1).
        near: Optima at other β to start from; without any, the optimum is followed down from a large β.
        thorough: Where the objective is not concave, also start from shapes of every kind (M18).

    Raises:
        InputError: If none of the starts leads to a stationary policy, or it needs scores beyond `FURTHEST`.
    """
    starts: list[Callable[[Problem], Array]] = [solved.start for solved in near]
    if not near:
        higher = [solve(objective, 4.0 * beta, predictability, thorough=False)] if beta < _EASY_BETA else []
        starts = [solved.start for solved in higher] or [lambda problem: np.zeros_like(problem.grid.s)]
    if near and not objective.concave:
        starts.append(lambda problem: np.zeros_like(problem.grid.s))
    if thorough and not objective.concave:
        starts += [partial(_shape, shape) for shape in shapes()]
    problem = Problem(objective, beta, near[0].problem.grid if near else Grid.first(predictability))
    climbed = [problem.climb(start(problem)) for start in starts]
    found = sorted((policy for policy, stationary in climbed if stationary), key=problem.value, reverse=True)
    failure = _unsolved(beta, predictability)
    for policy in found:
        try:
            return refined(problem, policy)
        except InputError as error:
            failure = error
    raise failure


def refined(problem: Problem, policy: Policy) -> Solved:
    """The policy on a grid fine and wide enough: halving the step changes J by less than 2e-9 and KL by 1e-8."""
    while True:
        offset = float((problem.on(problem.grid.s, policy) - policy.log_tilt)[0])
        grid = wide_enough(policy, partial(_reaching, problem, policy, offset))
        if grid is not problem.grid:
            better = Problem(problem.objective, problem.beta, grid)
        else:
            better = Problem(problem.objective, problem.beta, grid.finer())
            known = Policy.of(better.grid, problem.on(better.grid.s, policy))
            moved = abs(better.value(known) - problem.value(policy))
            if moved <= _J_TOLERANCE and abs(known.kl - policy.kl) <= 5.0 * _J_TOLERANCE * max(1.0, policy.kl):
                return Solved(problem, policy)
            if better.grid.step < FINEST:
                raise InputError(
                    f"the optimum for beta = {problem.beta:g} is too sharp to be resolved at a predictability of "
                    f"{grid.predictability:g}",
                    where="channel_optimum",
                    hint="Use a larger beta",
                )
        start = problem.on(better.grid.s, policy)
        problem = better
        policy, stationary = problem.climb(start)
        if not stationary:
            raise _unsolved(problem.beta, problem.grid.predictability)


def wide_enough(policy: Policy, log_tilt: Callable[[Array], Array]) -> Grid:
    """The policy's grid, or one that reaches further if the policy has, or would have, mass beyond its end.

    Args:
        policy: On a grid.
        log_tilt: The policy's log t(s), normalised as on the grid, at further s.

    Raises:
        InputError: If it has mass beyond `FURTHEST`.
    """
    grid = policy.grid
    beyond = np.arange(grid.s[-1], FURTHEST + 1.0, 0.5)
    mass = np.nonzero(log_normal(beyond) + log_tilt(beyond) > _NO_MASS)[0]
    if not mass.size:
        return grid
    # A little at a time: with more of the mass on the grid, less of it is found beyond.
    needed = min(float(beyond[mass[-1]]) + 1.0, 1.5 * grid.reach)
    if needed > FURTHEST:
        raise InputError(
            "the policy uses scores too rare to be resolved", where="channel_optimum", hint="Use a larger beta"
        )
    return Grid(grid.predictability, grid.step, needed)


def log_normal(s: Array) -> Array:
    """The logarithm of the normal density."""
    return -0.5 * s * s - 0.5 * math.log(2.0 * math.pi)


def below(z: Array, s: Array, predictability: float) -> Array:
    """P(Z <= z | s), shape (Z, S)."""
    return ndtr((z[:, None] - predictability * s) / math.sqrt(1.0 - predictability**2))


def above(z: Array, s: Array, predictability: float) -> Array:
    """P(Z > z | s), shape (Z, S)."""
    return ndtr((predictability * s - z[:, None]) / math.sqrt(1.0 - predictability**2))


def shapes() -> list[Callable[[Array], Array]]:
    """Functions s → log t(s) of every kind, to start from where there may be several optima (M18)."""

    def tilt(shift: float) -> Callable[[Array], Array]:
        return lambda s: shift * s

    def power(k: float) -> Callable[[Array], Array]:  # the best of k by s
        return lambda s: k * log_ndtr(s)

    def avoiding(k: float) -> Callable[[Array], Array]:  # not the worst of k by s
        return lambda s: np.log1p(-np.exp(k * log_ndtr(-s)) + 1e-12)

    def two_levels(edge: float, height: float) -> Callable[[Array], Array]:
        return lambda s: height * ndtr(8.0 * (s - edge))

    return [tilt(3.0), power(8.0), avoiding(3.0), two_levels(0.0, 1.5), two_levels(1.0, 6.0), two_levels(2.0, 6.0)]


def _reaching(problem: Problem, policy: Policy, offset: float, s: Array) -> Array:
    return problem.on(s, policy) - offset


def _shape(shape: Callable[[Array], Array], problem: Problem) -> Array:
    return shape(problem.grid.s)


def _even(step: float, reach: float) -> Array:
    return step * np.arange(-math.ceil(REACH / step), math.ceil(reach / step) + 1, dtype=np.float64)


def _unsolved(beta: float, predictability: float) -> InputError:
    return InputError(
        f"no optimum was found for beta = {beta:g} and a predictability of {predictability:g}",
        where="channel_optimum",
        hint="Use a larger beta",
    )
