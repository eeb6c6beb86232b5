"""M8 and the derivative that drives M9: what a procedure makes of a rank distribution F.

W = 1 - ∫ H(F(u)) h0(u) du, and its derivative with respect to the policy is the reward R with R'(u) = h(F(u)) h0(u).
A mixture is a sum of such terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from infalign.errors import InputError
from infalign.numerics.quadrature import adapt, mesh_with_knots
from infalign.procedures import InferenceProcedure, Standard, WorstOfN, check_is_procedure, check_procedure

Array = npt.NDArray[np.float64]


LARGEST_N = 1_000_000
"""Beyond that many responses, what happens within 1/N of an end point is lost to rounding."""


@dataclass(frozen=True)
class Objective:
    """A win rate W = sum_i w_i (1 - ∫ H_i(F) h0_i du) as a functional of F.

    Attributes:
        terms: Triples (weight, procedure, opponent's procedure).
    """

    terms: tuple[tuple[float, InferenceProcedure, InferenceProcedure], ...]

    @classmethod
    def of(cls, procedure: InferenceProcedure, opponent: InferenceProcedure | None = None) -> Objective:
        """The objective of a procedure run on the policy against an opponent run on the reference.

        Args:
            procedure: What the user's side does with the policy.
            opponent: What is done with the reference; the same procedure if None (each part of a mixture then meets
                itself).

        Raises:
            InputError: If one of the two is not a distortion, or draws more than a million responses.
        """
        sides = [(procedure, "procedure")] if opponent is None else [(procedure, "procedure"), (opponent, "opponent")]
        for side, where in sides:
            check_is_procedure(side, where)
            for _, part in side.components:
                if part.n is not None and part.n > LARGEST_N:
                    raise InputError(
                        f"{part.label} draws more responses than can be resolved",
                        where=where,
                        hint=f"Use at most {LARGEST_N:,}",
                    )
                if type(part).__module__.partition(".")[0] != "infalign":
                    check_procedure(part)
        return cls(
            tuple((weight, part, part if opponent is None else opponent) for weight, part in procedure.components)
        )

    def opponent_densities(self, u: Array) -> list[Array]:
        """w_i h0_i(u) of every term: fixed on a mesh, so computed once."""
        return [weight * opponent.density(u) for weight, _, opponent in self.terms]

    def reward_slope(self, cdf: Array, opponents: list[Array]) -> Array:
        """R'(u) = sum_i w_i h_i(F) h0_i(u) (M9)."""
        return np.asarray(
            sum(part.density(cdf) * density for (_, part, _), density in zip(self.terms, opponents, strict=True))
        )

    def reward_slope_by_cdf(self, cdf: Array, opponents: list[Array]) -> Array:
        """The derivative of `reward_slope` with respect to F."""
        return np.asarray(
            sum(part.density_slope(cdf) * density for (_, part, _), density in zip(self.terms, opponents, strict=True))
        )

    def loss_density(self, cdf: Array, opponents: list[Array]) -> Array:
        """sum_i w_i H_i(F) h0_i(u), whose integral is the probability of losing, 1 - W (M8)."""
        return np.asarray(
            sum(part.distortion(cdf) * density for (_, part, _), density in zip(self.terms, opponents, strict=True))
        )

    @property
    def against_one_sample(self) -> bool:
        """Whether every opponent is a single sample of the reference, h0 = 1: then M9 has a closed form."""
        grid = np.linspace(0.0, 1.0, 33)
        return all(bool((opponent.density(grid) == 1.0).all()) for *_, opponent in self.terms)

    def weighted_distortion(self, q: Array) -> Array:
        """sum_i w_i H_i(q)."""
        return np.asarray(sum(weight * part.distortion(q) for weight, part, _ in self.terms))

    @property
    def concave(self) -> bool:
        """Whether W is known to be concave in the policy: every term's h increases, so the optimum is unique."""
        grid = np.linspace(0.0, 1.0, 513)
        return all(bool((np.diff(part.density(grid)) >= -1e-9).all()) for _, part, _ in self.terms)

    @property
    def unique(self) -> bool:
        """Whether it is proved that only one density is stationary (docs/theory.md has the proofs)."""
        scaling = len(self.terms) == 1 and all(
            isinstance(side, WorstOfN | Standard) for _, *sides in self.terms for side in sides
        )
        return scaling or self.concave or self.against_one_sample

    @property
    def reference_win_rate(self) -> float:
        """W of the reference itself: one half, unless the opponent is another procedure."""
        return (
            1.0
            - adapt(lambda mesh: self.loss_density(mesh.u, self.opponent_densities(mesh.u)), mesh_with_knots(), 1e-13)[
                1
            ]
        )
