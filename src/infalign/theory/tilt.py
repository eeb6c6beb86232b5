"""TiltedPolicy: the reference tilted by exp(Φ/β), in the reference's quantile space (M7).

Everything is an integral over u in [0, 1], done on a mesh that resolves mass at the end points, with the logarithm of
the density kept until the last moment so that Φ/β may span thousands of nats.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import numpy.typing as npt

from infalign.numerics.quadrature import Antiderivative, Mesh, adapt, expit, logit, mesh_with_knots, unit_interval
from infalign.procedures import InferenceProcedure
from infalign.theory.winrate import Objective
from infalign.transforms import RewardTransform, check_is_transform, positive_beta, rounding

Array = npt.NDArray[np.float64]


class TiltedPolicy:
    """The solution of KL-regularised RL on Φ(C) with coefficient β, seen as a distribution of calibrated rewards.

    Density f(u) = exp(Φ(u)/β)/Z on [0, 1], where the reference is uniform (M7).

    Args:
        transform: Φ.
        beta: KL coefficient, in units of Φ per nat.

    Raises:
        InputError: If beta is not a positive number, or the transform is not one.
    """

    def __init__(self, transform: RewardTransform, beta: float) -> None:
        check_is_transform(transform, "TiltedPolicy")
        self.transform = transform
        self.beta = positive_beta(beta)
        self._known: tuple[Callable[[Mesh], Array], Mesh] | None = None

    @classmethod
    def from_log_density(
        cls, transform: RewardTransform, beta: float, log_density: Callable[[Mesh], Array], mesh: Mesh
    ) -> TiltedPolicy:
        """A tilt whose log density is known more exactly than through its tabulated transform."""
        tilt = cls(transform, beta)
        tilt._known = (log_density, mesh)
        return tilt

    def __repr__(self) -> str:
        return f"TiltedPolicy({self.transform!r}, beta={self.beta:g})"

    def __getstate__(self) -> dict[str, object]:
        return {"transform": self.transform, "beta": self.beta, "_known": None}

    @cached_property
    def _shape(self) -> tuple[Mesh, Array, float]:
        """A mesh that resolves f and f log f, log f at its nodes, and log Z relative to the unnormalised density."""
        if self._known is not None:
            log_weight, start = self._known
            top, tolerance = 0.0, 1e-12
        else:
            top = float(self.transform(1.0)) / self.beta
            start, tolerance = mesh_with_knots(self.transform.knots), rounding(top)

            def log_weight(mesh: Mesh, /) -> Array:
                return self.transform(mesh.u) / self.beta - top

        mesh, integral = adapt(lambda mesh: np.exp(log_weight(mesh)), start, tolerance)
        log_integral = float(np.log(integral))
        # f log f + 1 is positive, and its integral is KL + 1: a mesh that resolves it resolves the KL.
        mesh, _ = adapt(lambda mesh: 1.0 + _times_exp(log_weight(mesh) - log_integral), mesh, tolerance)
        return mesh, log_weight(mesh) - log_integral, top + log_integral

    @cached_property
    def _cumulative(self) -> Antiderivative:
        mesh, log_density, _ = self._shape
        return Antiderivative(mesh, np.exp(log_density))

    @cached_property
    def log_partition(self) -> float:
        """The logarithm of Z = ∫ exp(Φ(u)/β) du."""
        if self._known is None:
            return self._shape[2]
        return self.transform.log_partition(self.beta)

    @cached_property
    def kl(self) -> float:
        """KL(π‖p) = ∫ f log f du, in nats per response."""
        mesh, log_density, _ = self._shape
        # f log f - f + 1 >= 0 has the same integral and loses nothing to cancellation when the KL is tiny.
        return max(mesh.integral(_times_exp(log_density) - np.exp(log_density) + 1.0), 0.0)

    def density(self, u: npt.ArrayLike) -> Array:
        """f(u) = exp(Φ(u)/β)/Z.

        Args:
            u: Ranks in [0, 1], any shape.
        """
        return np.exp(self.transform(u) / self.beta - self.log_partition)

    def cdf(self, u: npt.ArrayLike) -> Array:
        """F(u): the probability that the policy's response has a calibrated reward of at most u.

        Args:
            u: Ranks in [0, 1], any shape.
        """
        points = unit_interval(u, "TiltedPolicy.cdf(u)")
        inside = self._cdf_at(logit(points))
        return np.where(points <= 0.0, 0.0, np.where(points >= 1.0, 1.0, inside))

    def quantile(self, p: npt.ArrayLike) -> Array:
        """The inverse of `cdf`.

        Args:
            p: Probabilities in [0, 1], any shape.
        """
        probabilities = unit_interval(p, "TiltedPolicy.quantile(p)", "Give probabilities in [0, 1]")
        cumulative = self._cumulative
        u = expit(cumulative.inverse(probabilities * cumulative.at_edges[-1]))
        return np.where(probabilities <= 0.0, 0.0, np.where(probabilities >= 1.0, 1.0, u))

    def win_rate(self, procedure: InferenceProcedure, opponent: InferenceProcedure | None = None) -> float:
        """M8: the chance that the procedure on this policy beats the opponent's procedure on the reference.

        Args:
            procedure: What is done with this policy.
            opponent: What is done with the reference; the same procedure if None.
        """
        objective = Objective.of(procedure, opponent)
        _, loss = adapt(
            lambda mesh: objective.loss_density(self._cdf_at(mesh.t), objective.opponent_densities(mesh.u)),
            self._cumulative.mesh,
        )
        return 1.0 - loss

    def _cdf_at(self, t: Array) -> Array:
        """F in the logit coordinate, where 1 - u keeps its relative accuracy."""
        cumulative = self._cumulative
        return np.clip(cumulative(t) / cumulative.at_edges[-1], 0.0, 1.0)


def _times_exp(logs: Array) -> Array:
    """The product x exp(x), which is 0 at -inf."""
    finite = np.maximum(logs, -745.0)
    return finite * np.exp(finite)
