"""The optimal transform of a procedure (M9): what to reward so that the procedure wins as often as it can."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from infalign.errors import InputError
from infalign.numerics.quadrature import Antiderivative, Mesh, expit, logit
from infalign.procedures import InferenceProcedure, Standard
from infalign.theory.search import GlobalSearch
from infalign.theory.solver import SMALLEST_BETA, Solution, solve
from infalign.theory.tilt import TiltedPolicy
from infalign.theory.winrate import Objective
from infalign.transforms import Identity, RewardTransform, Tabulated, positive_beta

Array = npt.NDArray[np.float64]

_TABLE_T = 36.0
"""The table's points lie at least expit(-36) = 2e-16 from both ends: closer points are not float64 numbers below 1."""


@dataclass(frozen=True, eq=False)
class OptimalTransform:
    """The solution of M9 for one procedure and one β; made by `optimal_transform`.

    Attributes:
        procedure: The procedure run on the policy.
        opponent: What is run on the reference; None if it is the same procedure.
        beta: KL coefficient, in units of the transform per nat.
        solution: The density on the solver's own mesh.
    """

    procedure: InferenceProcedure
    opponent: InferenceProcedure | None
    beta: float
    solution: Solution

    def __repr__(self) -> str:
        return (
            f"OptimalTransform({self.procedure.label}, beta={self.beta:.6g}: "
            f"kl={self.kl:.6g}, win_rate={self.win_rate:.6g})"
        )

    @property
    def kl(self) -> float:
        """KL(π‖p) in nats per response."""
        return self.solution.kl

    @property
    def win_rate(self) -> float:
        """W of the procedure against its opponent (M8)."""
        return self.solution.win_rate

    @property
    def log_partition(self) -> float:
        """The logarithm of Z = ∫ exp(Φ(u)/β) du."""
        return self.solution.log_partition

    @cached_property
    def standard_win_rate(self) -> float:
        """The chance that one sample of the policy beats one sample of the reference."""
        return self.tilt.win_rate(Standard())

    @property
    def unique(self) -> bool:
        """Whether it is proved that no other density is stationary (docs/theory.md has the proofs)."""
        return self.solution.objective.unique

    @cached_property
    def transform(self) -> RewardTransform:
        """The optimal Φ with Φ(0) = 0, tabulated to about 1e-9 (or to 1e-7 β where that is finer)."""
        standard = Standard()
        if all(part == standard and opponent == standard for _, part, opponent in self.solution.objective.terms):
            return Identity()
        return _tabulate(self.solution, f"optimal for {self.procedure.label}, beta={self.beta:.6g}")

    @cached_property
    def tilt(self) -> TiltedPolicy:
        """The optimal policy; its CDF, KL and win rates come from the solver's mesh, not from the table."""
        solution = self.solution
        reward = Antiderivative(solution.mesh, solution.reward_slope)
        return TiltedPolicy.from_log_density(
            self.transform,
            self.beta,
            lambda mesh: reward(mesh.t) / solution.beta - solution.log_partition,
            solution.mesh,
        )

    @cached_property
    def residual(self) -> float:
        """Largest |Φ(u) - ∫_0^u h(F) h0| (M9), recomputed on a mesh twice as fine, relative to Φ's range or 1."""
        solution, objective = self.solution, self.solution.objective
        edges = solution.mesh.edges
        fine = Mesh.from_edges(np.sort(np.concatenate([edges, 0.5 * (edges[1:] + edges[:-1])])))
        reward_function = Antiderivative(solution.mesh, solution.reward_slope)
        reward = reward_function(fine.t)
        mass, mass_edges = fine.cumulative(np.exp((reward - reward_function.at_edges[-1]) / solution.beta))
        cdf = np.clip(mass / mass_edges[-1], 0.0, 1.0)
        again, _ = fine.cumulative(objective.reward_slope(cdf, objective.opponent_densities(fine.u)))
        return float(np.abs(again - reward).max()) / max(1.0, float(reward_function.at_edges[-1]))


def optimal_transform(
    procedure: InferenceProcedure, beta: float, opponent: InferenceProcedure | None = None
) -> OptimalTransform:
    """Solve M9: the transform whose KL-regularised optimum maximises W - β KL for a procedure.

    Where several densities may be stationary (`OptimalTransform.unique` is False) the best is looked for among all
    paths on a grid (M18).

    Args:
        procedure: What is done with the aligned policy.
        beta: KL coefficient, in units of win rate per nat.
        opponent: What is done with the reference; the same procedure if None (a mixture's parts then meet themselves).

    Returns:
        The transform, the policy it leads to, its KL and its win rates.

    Raises:
        InputError: If beta is not positive or below 1e-7, the procedure is not a distortion, or no solution is found.
    """
    beta = positive_beta(beta)
    if beta < SMALLEST_BETA:
        raise InputError(
            f"beta = {beta:g} is too small to be resolved", where="beta", hint=f"Use {SMALLEST_BETA:g} or more"
        )
    objective = Objective.of(procedure, opponent)
    solution = solve(objective, beta) if objective.unique else GlobalSearch(objective).solve(beta)
    return OptimalTransform(procedure, opponent, beta, solution)


def _tabulate(solution: Solution, name: str) -> Tabulated:
    """The reward as a cubic Hermite table, halving intervals until the table agrees with the solver's polynomials."""
    objective, reward = solution.objective, Antiderivative(solution.mesh, solution.reward_slope)
    cdf = Antiderivative(solution.mesh, solution.density)
    top = float(reward.at_edges[-1])
    tolerance = min(1e-9, 1e-7 * solution.beta) * max(1.0, top)

    def exact(u: Array) -> tuple[Array, Array]:
        t = logit(u)
        ends = (u <= 0.0, u >= 1.0)
        values = np.select(ends, [0.0, top], reward(t))
        below = np.select(ends, [0.0, 1.0], np.clip(cdf(t) / cdf.at_edges[-1], 0.0, 1.0))
        return values, objective.reward_slope(below, objective.opponent_densities(u))

    edges = solution.mesh.edges
    u = np.unique(np.concatenate([[0.0], expit(edges[np.abs(edges) <= _TABLE_T]), [1.0]]))
    values, slopes = exact(u)
    for _ in range(12):
        step = np.diff(u)
        # Halved in t, the solver's coordinate: intervals shrink in proportion to their distance to an end.
        middle_t = 0.5 * (np.maximum(logit(u[:-1]), -_TABLE_T) + np.minimum(logit(u[1:]), _TABLE_T))
        middle = expit(middle_t)
        inside = (middle > u[:-1]) & (middle < u[1:])
        middle = np.where(inside, middle, u[:-1])
        middle_values, middle_slopes = exact(middle)
        x = (middle - u[:-1]) / step
        hermite = (
            values[:-1]
            + (values[1:] - values[:-1]) * x * x * (3 - 2 * x)
            + step * x * (1 - x) * (slopes[:-1] * (1 - x) - slopes[1:] * x)
        )
        split = inside & (np.abs(hermite - middle_values) > tolerance)
        if not split.any():
            break
        u = np.concatenate([u, middle[split]])
        values, slopes = np.concatenate([values, middle_values[split]]), np.concatenate([slopes, middle_slopes[split]])
        order = np.argsort(u)
        u, values, slopes = u[order], values[order], slopes[order]
    values = np.maximum.accumulate(values)
    # Where the reward is flat to rounding, the exact slope may exceed what a monotone cubic can carry.
    limit = 3.0 * np.diff(values) / np.diff(u)
    slopes = np.minimum(slopes, np.minimum(np.append(limit, np.inf), np.insert(limit, 0, np.inf)))
    return Tabulated(u, values, slopes, name=name)
