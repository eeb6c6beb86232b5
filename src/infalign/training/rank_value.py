"""What a rank among K references is worth at a known policy: the derivative of the win rate, finite K, ties.

The derivative of W with respect to the policy is R with R'(u) = h(F(u)) h₀(u) (M9), u the quantile under the reference
and F the policy's distribution of it. Two things stand between R(u) and a reward that can be paid (M17):

- K references tell a rank b, not a quantile: U | b ~ Beta(b + 1, K − b + 1). W is linear in small changes of the
  policy, so a response of rank b is worth the *mean* R(b) = E[R(U) | b].
- Equal rewards. Between neighbouring reward levels R(l + 1) − R(l) = h(F(edge)) (v(l + 1) − v(l)), v(l) the mean of H₀
  at the level's two edges: that is the derivative of a win rate in which an equal reward counts one half.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc

from infalign.theory.winrate import Objective

Float = NDArray[np.float64]
Int = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RankTable:
    """One number for every way in which a response can stand among K references: rewards R, or tilts in nats.

    A rank cell b lies between the references number b and b + 1. Where several references are equal, their level takes
    the cells between them whole and half of the cell on either side.

    Attributes:
        by_rank: Value of a response that equals no reference, by rank b = 0..K, shape (K + 1,).
        half_cells: Value in the lower and the upper half of every cell, shape (2K + 2,): each is as likely under the
            reference.
    """

    by_rank: Float
    half_cells: Float

    def at(self, below_B: Int, equal_B: Int) -> Float:
        """Value of responses that beat `below_B` references and equal `equal_B`, shape (B,)."""
        num_ref = len(self.by_rank) - 1
        start_B, end_B = _half_cells_of(below_B, equal_B, num_ref)
        sums = np.concatenate([[0.0], np.cumsum(self.half_cells - self.by_rank[0])])
        level_B = self.by_rank[0] + (sums[end_B] - sums[start_B]) / np.maximum(end_B - start_B, 1)
        return np.where(equal_B == 0, self.by_rank[below_B], level_B)

    def times(self, factor: float) -> RankTable:
        """Every value times a factor."""
        return RankTable(self.by_rank * factor, self.half_cells * factor)

    def at_least(self, lowest: float) -> RankTable:
        """Every value, but none below `lowest`."""
        return RankTable(np.maximum(self.by_rank, lowest), np.maximum(self.half_cells, lowest))

    def at_most(self, highest: float) -> RankTable:
        """Every value, but none above `highest`."""
        return RankTable(np.minimum(self.by_rank, highest), np.minimum(self.half_cells, highest))

    @property
    def log_partition(self) -> float:
        """Log Z, the log of the mean of exp(value) over draws of the reference; of a tilt in nats."""
        return float(np.logaddexp.reduce(self.half_cells) - np.log(len(self.half_cells)))


@dataclass(frozen=True, eq=False)
class RankScale:
    """The quantiles that K references leave open, on a grid; depends on nothing that is learnt.

    Attributes:
        objective: The win rate.
        edges: Grid on [0, 1], shape (C + 1,).
        posterior_KC: P(U ≤ edge | b) for b = 0..K, shape (K + 1, C + 1).
        opponents: w h₀ of each of the objective's terms at the edges.
        opponent_masses: w E[H₀(e)] of each term, e the place in [0, 1] below which b of the K references lie; (K + 1,).
    """

    objective: Objective
    edges: Float
    posterior_KC: Float  # noqa: N815
    opponents: list[Float]
    opponent_masses: list[Float]

    @classmethod
    def of(cls, objective: Objective, num_ref: int, edges: Float) -> RankScale:
        """The scale of K references."""
        ranks = np.arange(num_ref + 1.0)[:, None]
        posterior_KC = betainc(ranks + 1.0, num_ref - ranks + 1.0, edges[None, :])
        middles = (edges[1:] + edges[:-1]) / 2
        masses: list[Float] = []
        for weight, _, opponent in objective.terms:
            mass_K = weight * (np.diff(posterior_KC, axis=1) @ opponent.distortion(middles))
            mass_K[0], mass_K[-1] = 0.0, weight  # below all and above all references that are known to tie
            masses.append(mass_K)
        return cls(objective, edges, posterior_KC, objective.opponent_densities(edges), masses)

    @property
    def num_ref(self) -> int:
        """K."""
        return len(self.posterior_KC) - 1

    def reward(self, cdf: Float, level_counts: Int | None = None) -> RankTable:
        """R of every rank at a policy, R = 0 at the lower end (M17).

        Args:
            cdf: F, the policy's distribution of quantiles, at the grid's edges; ranks spread evenly over their cells.
            level_counts: How many references have the lowest reward, the next, …; they sum to K. Levels of one
                reference, and all where this is left out, are taken as the points of a continuous distribution.
        """
        num_ref, edges = self.num_ref, self.edges
        # What a policy that sees ranks does to quantiles: each rank's share, spread by the posterior.
        share_K = np.diff(np.interp(np.arange(num_ref + 2) / (num_ref + 1), edges, cdf))
        spread = np.clip(share_K @ self.posterior_KC, 0.0, 1.0)
        slope = self.objective.reward_slope(spread, self.opponents)
        value = np.concatenate([[0.0], np.cumsum((slope[1:] + slope[:-1]) / 2 * np.diff(edges))])
        rises = np.diff(value, prepend=0.0, append=value[-1])
        # E[R(U) | b], summed by parts.
        by_rank = value[-1] - self.posterior_KC @ ((rises[1:] + rises[:-1]) / 2)
        if level_counts is None or not (level_counts > 1).any():
            return RankTable(by_rank, np.repeat(by_rank, 2))
        return self._with_levels(cdf, by_rank, float(value[-1]), level_counts)

    def _with_levels(self, cdf: Float, by_rank: Float, highest: float, level_counts: Int) -> RankTable:
        """R where levels of several references take their share of a continuous distribution.

        Args:
            cdf: As in `reward`.
            by_rank: R of every rank of a continuous distribution.
            highest: R at the upper end of it.
            level_counts: As in `reward`.
        """
        num_ref, tied = self.num_ref, np.flatnonzero(level_counts > 1)
        upper = np.cumsum(level_counts)[tied]
        lower = upper - level_counts[tied]
        start, end = _half_cells_of(lower, level_counts[tied], num_ref)
        masses = [mass_K[upper] - mass_K[lower] for mass_K in self.opponent_masses]
        at_edges = (np.interp(edge / (2 * num_ref + 2), self.edges, cdf).clip(0.0, 1.0) for edge in (start, end))
        # Half of h(F) (v(l + 1) − v(l)) is this level's, half its neighbour's.
        first, second = (self.objective.reward_slope(at, masses) / 2 for at in at_edges)
        ranks = by_rank.copy()
        # A level that none is below or above reaches to the end, where the rank is no longer in doubt.
        ranks[0] = 0.0 if lower[0] == 0 else ranks[0]
        ranks[-1] = highest if upper[-1] == num_ref else ranks[-1]
        lift = first + second - (ranks[upper] - ranks[lower])  # beyond the rise of a continuous distribution
        level_value = ranks[lower] + np.cumsum(lift) - lift + first
        lifts_K = np.zeros(num_ref + 1)
        lifts_K[upper] = lift
        ranks += np.cumsum(lifts_K)
        half_cells = np.repeat(ranks, 2)
        for index in range(tied.size):
            ranks[lower[index] + 1 : upper[index]] = level_value[index]
            half_cells[start[index] : end[index]] = level_value[index]
        return RankTable(ranks, half_cells)


def _half_cells_of(below_B: Int, equal_B: Int, num_ref: int) -> tuple[Int, Int]:
    """First half-cell of responses that tie with references, and the one after the last.

    A level of several references that none is below, or above, reaches to the end.
    """
    start_B, end_B = 2 * below_B + 1, 2 * (below_B + equal_B) + 1
    several_B = equal_B > 1
    start_B = np.where(several_B & (below_B == 0), 0, start_B)
    end_B = np.where(several_B & (below_B + equal_B == num_ref), 2 * num_ref + 2, end_B)
    return start_B, end_B
