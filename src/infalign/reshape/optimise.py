"""The best density of a family: for a β, the highest J = W − β KL; for a KL budget, the highest W within it.

Several starts, because J has several stationary points where a procedure's W is not concave (M18). What a start is
worth by itself counts too: nothing returned is worse than any of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from scipy import optimize as _optimize  # pyright: ignore[reportMissingTypeStubs]

from infalign.reshape.families import Family
from infalign.reshape.pool import Contest, Pool, Tilted

Float = NDArray[np.float64]
optimize = cast(Any, _optimize)

_PENALTY = 1.0  # win rate per squared nat
_KL_TOLERANCE = 1e-4
_LARGEST_ODDS = 40.0


@dataclass(frozen=True, eq=False)
class Optimum:
    """Parameters with what they give on the pool: win rate, KL, and the price β of KL there."""

    theta: Float
    win_rate: float
    kl: float
    beta: float

    def objective(self, beta: float) -> float:
        """J."""
        return self.win_rate - beta * self.kl


class Problem:
    """Win rate and KL of a family's members, averaged over the prompts of one pool, with gradients."""

    def __init__(self, pool: Pool, contest: Contest, family: Family) -> None:
        self.pool, self.contest, self.family = pool, contest, family

    def at(self, theta: Float) -> tuple[Tilted, float, float]:
        """The tilted pool, W and KL."""
        tilted = self.pool.tilted(self.family.log_density(theta))
        return tilted, float(self.contest.win_rate_P(tilted.mass_PS).mean()), float(tilted.kl_P.mean())

    def optimum(self, theta: Float, beta: float) -> Optimum:
        """What some parameters give."""
        _, win_rate, kl = self.at(theta)
        return Optimum(theta, win_rate, kl, beta)

    def gradient(self, theta: Float, tilted: Tilted, beta: float) -> Float:
        """∇(W − β KL)."""
        reward_PS = self.contest.reward_PS(tilted.mass_PS) - beta * np.where(
            tilted.mass_PS > 0, tilted.log_density_PS, 0.0
        )
        centred_PS = reward_PS - np.einsum("ps,ps->p", tilted.mass_PS, reward_PS)[:, None]
        return self.family.pull_back(theta, tilted.mass_PS * centred_PS / len(reward_PS))

    def climb(
        self, theta: Float, beta: float, budget: float | None = None, steps: int = 200, tolerance: float = 1e-11
    ) -> Float:
        """L-BFGS-B on J, or on the augmented Lagrangian of KL ≤ budget with multiplier β; the value never falls."""

        def cost(theta: Float) -> tuple[float, Float]:
            tilted, win_rate, kl = self.at(theta)
            if budget is None:
                return beta * kl - win_rate, -self.gradient(theta, tilted, beta)
            price = max(0.0, beta + _PENALTY * (kl - budget))
            return price**2 / (2 * _PENALTY) - win_rate, -self.gradient(theta, tilted, price)

        top = np.full(len(theta), np.inf if np.isfinite(self.family.lower).all() else _LARGEST_ODDS)
        lower = np.maximum(self.family.lower, -_LARGEST_ODDS)
        found = optimize.minimize(
            cost,
            np.clip(theta, lower, top),
            jac=True,
            method="L-BFGS-B",
            bounds=optimize.Bounds(lower, top),
            options={"maxiter": steps, "maxcor": 30, "ftol": tolerance, "gtol": 1e-8},
        )
        return np.asarray(found.x, dtype=np.float64)


def best_at_beta(problem: Problem, beta: float, starts: Sequence[Float] | None = None) -> Optimum:
    """The highest J = W − β KL from several starts."""
    given = problem.family.starts if starts is None else starts
    if len(given) == 1:
        ends = [
            problem.optimum(theta, beta)
            for theta in (given[0], problem.climb(given[0], beta, steps=300, tolerance=1e-8))
        ]
        return max(ends, key=lambda found: found.objective(beta))
    tried = [problem.optimum(start, beta) for start in given]
    tried += [problem.optimum(problem.climb(start, beta, steps=30), beta) for start in given]
    tried.sort(key=lambda found: -found.objective(beta))
    best = [problem.optimum(problem.climb(found.theta, beta, steps=500), beta) for found in tried[:2]]
    return max([tried[0], *best], key=lambda found: found.objective(beta))


def best_at_kl(problem: Problem, budget: float, starts: Sequence[Float] | None = None) -> Optimum:
    """The highest win rate with a KL of at most `budget` nats, from several starts.

    A budget is met where the optimum jumps over it as β changes (M18), because it is imposed itself and not through β.
    """
    given = problem.family.starts if starts is None else starts
    scaled: list[Float] = []
    for start in given:
        theta = scaled_to(problem, start, budget)
        if theta is not None and not any(np.allclose(theta, other, rtol=1e-3, atol=1e-3) for other in scaled):
            scaled.append(theta)
    if len(scaled) == 1:
        return _within(problem, scaled[0], budget, tolerance=1e-8)
    first = [_within(problem, start, budget, rounds=1, steps=30) for start in scaled]
    ranked = sorted([*first, *(problem.optimum(s, 0.0) for s in scaled)], key=lambda f: -f.win_rate)
    best = [_within(problem, found.theta, budget, beta=found.beta) for found in ranked[:2]]
    return max([*ranked[:1], *best], key=lambda found: found.win_rate)


def scaled_to(problem: Problem, theta: Float, budget: float) -> Float | None:
    """Parameters of the same kind whose KL is the budget: steps multiplied, or odds moved, by one number.

    None if no such number is found, as for g = 1.
    """
    additive = not np.isfinite(problem.family.lower).all()

    def moved(amount: float) -> Float:
        return np.clip(theta + amount, -_LARGEST_ODDS, _LARGEST_ODDS) if additive else theta * np.exp(amount)

    def excess(amount: float) -> float:
        return problem.at(moved(amount))[2] - budget

    ends = (-_LARGEST_ODDS, _LARGEST_ODDS) if additive else (-12.0, 6.0)
    if excess(ends[0]) > 0:
        return None
    low, high = ends[0], ends[0]
    step = 1.0
    middle = min(max(0.0, ends[0]), ends[1])
    # Bracket from the middle outwards, so that absurdly steep densities are not tried without need.
    if excess(middle) < 0:
        low = high = middle
        while excess(high) < 0:
            low, high, step = high, high + step, 2 * step
            if high > ends[1]:
                return moved(ends[1]) if additive else None
    else:
        low = high = middle
        while excess(low) > 0:
            high, low, step = low, max(low - step, ends[0]), 2 * step
    return moved(float(optimize.brentq(excess, low, high, xtol=1e-9, rtol=1e-12)))


def _within(
    problem: Problem,
    theta: Float,
    budget: float,
    *,
    beta: float = 0.1,
    rounds: int = 8,
    steps: int = 100,
    tolerance: float = 1e-10,
) -> Optimum:
    excess = 0.0
    for _ in range(rounds):
        theta = problem.climb(theta, beta, budget, steps, tolerance)
        excess = problem.at(theta)[2] - budget
        beta = max(0.0, beta + _PENALTY * excess)
        if max(excess, -excess * (beta > 0)) < _KL_TOLERANCE and rounds > 1:
            break
    if beta == 0 and excess <= 0:  # the best of all is within the budget
        return problem.optimum(theta, beta)
    exact = scaled_to(problem, theta, budget)
    return problem.optimum(theta if exact is None else exact, beta)
