"""The self-consistent transform (M13): M9 with the rank distribution of the policy as it really is.

The optimal transform of the idealised theory is nearly flat where a real policy's mass still lies. M3 holds for any
policy, with the derivative of the win rate taken at that policy: R'(u) = h(F̂(u)) h₀(u), F̂ the distribution of
calibrated rewards of the current policy, rebuilt as training goes. Where the policy can follow, its fixed point is
M9's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import betainc

from infalign.procedures import InferenceProcedure, procedure_from_dict
from infalign.theory.winrate import Objective

Float = NDArray[np.float64]

CELLS = 1024


class SelfConsistentTransform:
    """Φ for a procedure at the current policy, pooled over prompts.

    With several processes each keeps the estimate of its own rollouts.

    Args:
        procedure: What the policy will be used through.
        memory: Weight of the past in F̂; 0.8 averages over about five steps.

    Attributes:
        rollouts_per_step: How many rollouts make a step, for a trainer that asks for its rewards in parts or one by
            one; None where every update is a step.
    """

    label = "self-consistent"

    def __init__(self, procedure: InferenceProcedure, memory: float = 0.8) -> None:
        self.procedure = procedure
        self.weight = 1.0
        self.memory = memory
        self.rollouts_per_step: int | None = None
        self._objective = Objective.of(procedure)
        self.edges = np.linspace(0.0, 1.0, CELLS + 1)
        self._opponents = self._objective.opponent_densities(self.edges)
        self.cdf: Float = self.edges.copy()  # F̂ at the cells' edges
        self._cells_of_K: dict[int, Float] = {}

    def restart(self) -> None:
        """Forget the policy: F̂ is the reference's again."""
        self.cdf = self.edges.copy()

    def update(self, rank_B: Float, num_ref_B: NDArray[np.integer]) -> None:
        """Take in the ranks of rollouts, of one step or a part of it, each spread evenly over its share of [0, 1].

        Args:
            rank_B: Ranks among the references, 0..K, shape (B,).
            num_ref_B: K of each rollout's prompt, shape (B,).
        """
        reached = self.edges[None, :] * (num_ref_B[:, None] + 1.0) - rank_B[:, None]
        steps = 1.0 if self.rollouts_per_step is None else len(rank_B) / self.rollouts_per_step
        kept = self.memory**steps
        self.cdf = kept * self.cdf + (1 - kept) * np.clip(reached, 0.0, 1.0).mean(axis=0)

    def value(self) -> Float:
        """R at the cells' edges, R(0) = 0 (M13)."""
        cdf = (1 - self.weight) * self.edges + self.weight * np.clip(self.cdf, 0.0, 1.0)
        slope = self._objective.reward_slope(cdf, self._opponents)
        return np.concatenate([[0.0], np.cumsum((slope[1:] + slope[:-1]) / (2 * CELLS))])

    def tilt_by_rank(self, num_ref: int, beta: float) -> Float:
        """Φ_K(b)/β for b = 0..K in nats (M6), shape (K + 1,); its normaliser is that of Φ on the cells, exactly."""
        value = self.value() / beta
        middle = (value[1:] + value[:-1]) / 2
        top = middle.max()
        return top + np.log(self._cell_shares(num_ref) @ np.exp(middle - top))

    def _cell_shares(self, num_ref: int) -> Float:
        """Chance of each cell given each rank: U | b ~ Beta(b + 1, K − b + 1); shape (K + 1, CELLS)."""
        if num_ref not in self._cells_of_K:
            ranks = np.arange(num_ref + 1)[:, None]
            self._cells_of_K[num_ref] = np.diff(
                betainc(ranks + 1.0, num_ref - ranks + 1.0, self.edges[None, :]), axis=1
            )
        return self._cells_of_K[num_ref]

    def to_dict(self) -> dict[str, Any]:
        """What it is, JSON-able; F̂ is state, not part of it."""
        return {"kind": self.label, "procedure": self.procedure.to_dict(), "memory": self.memory}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> SelfConsistentTransform:
        """Inverse of `to_dict`."""
        return cls(procedure_from_dict(content["procedure"]), content["memory"])
