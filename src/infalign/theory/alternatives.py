"""The reward choices of the literature, placed in the picture of M7: what each leaves on the table at the same KL."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from infalign.errors import InputError
from infalign.numerics.quadrature import Antiderivative, Mesh, adapt, expit, logit, mesh_with_knots, unit_interval
from infalign.procedures import BestOfN, InferenceProcedure
from infalign.theory.beta_for_kl import beta_for_kl
from infalign.theory.tilt import TiltedPolicy
from infalign.theory.winrate import Objective
from infalign.transforms import (
    Exponential,
    Identity,
    Log,
    RewardTransform,
    Tabulated,
    positive_beta,
)

Array = npt.NDArray[np.float64]

_SMALLEST_BETA = 1e-10
_SMALLEST_GROUP_BETA = 1e-4
_LARGEST_S = 20.0


def tilt_at_kl(transform: RewardTransform, kl: float) -> TiltedPolicy:
    """The tilt by a transform that spends a given KL, to 1e-10 relative or better.

    Raises:
        InputError: If the KL is out of reach; the message names the reachable range.
    """
    beta = beta_for_kl(
        lambda beta: TiltedPolicy(transform, beta).kl, kl, _SMALLEST_BETA, f"the transform {transform.label!r}"
    )
    return TiltedPolicy(transform, beta)


class TopOfGroup(TiltedPolicy):
    """Where the reward "1 for the best of a group of n of the policy's own samples" settles.

    A response at rank u of such a group is the best with probability F(u)^(n-1): the reward moves with the policy, and
    its sum over a group is always 1, so it has no objective that RL could increase. It does have a fixed point,
    f ∝ exp(F^(n-1)/β), with a closed form: the quantile function is ∫_0^p exp(-q^(n-1)/β) dq, normalised, and
    KL = 1/(n β) + log ∫ exp(-q^(n-1)/β) dq. Unlike M9 it never looks at the opponent.

    Everything is integrated over p, where mass as close to u = 1 as exp(-1/β) is no difficulty. Only the transform is a
    table in u; it ends where float64 does, so it is for drawing.

    Args:
        n: Size of the group, at least 2.
        beta: KL coefficient.

    Raises:
        InputError: If n is 1 (the reward is constant) or beta is not positive.
    """

    def __init__(self, n: int, beta: float) -> None:
        if n < 2:
            raise InputError("the best of a group of one has a constant reward", where="TopOfGroup", hint="Use n >= 2")
        self.n, self.beta = n, positive_beta(beta)
        mesh, self._total = adapt(lambda mesh: np.exp(-self._reward(mesh.u)), mesh_with_knots())
        self._ranks = Antiderivative(mesh, np.exp(-self._reward(mesh.u)))
        super().__init__(self._table(), beta)

    def __getstate__(self) -> dict[str, object]:
        return dict(self.__dict__)

    def _reward(self, p: Array) -> Array:
        return p ** (self.n - 1) / self.beta

    def _table(self) -> Tabulated:
        p = expit(np.linspace(-36.0, 36.0, 2000))
        u = self.quantile(p)
        value = p ** (self.n - 1)
        value[value < 1e-30] = 0.0
        keep = (np.diff(np.maximum.accumulate(np.insert(u, 0, 0.0))) > 1e-12 * u) & (u < 1.0 - 1e-14)
        edge = float(value[keep][-1])
        u, value = np.concatenate([[0.0], u[keep], [1.0]]), np.concatenate([[0.0], value[keep], [max(edge, 1.0)]])
        return Tabulated(u, value, name=f"top-1-of-{self.n}")

    @cached_property
    def log_partition(self) -> float:
        """The logarithm of Z = ∫ exp(F^(n-1)/β) du, which is f(0)^-1."""
        return -math.log(self._total)

    @cached_property
    def kl(self) -> float:
        """KL(π‖p) in nats per response."""
        mesh = self._ranks.mesh
        logs = self._reward(mesh.u) - self.log_partition
        # ∫ log f dp, and ∫ 1/f dp = ∫ du = 1: this sum is positive and loses nothing when the KL is tiny.
        return max(mesh.integral(logs + np.expm1(-logs)), 0.0)

    def density(self, u: npt.ArrayLike) -> Array:
        """f(u)."""
        return np.exp(self._reward(self.cdf(u)) - self.log_partition)

    def cdf(self, u: npt.ArrayLike) -> Array:
        """F(u)."""
        points = unit_interval(u, "TopOfGroup.cdf(u)")
        p = expit(self._ranks.inverse(points * self._ranks.at_edges[-1]))
        return np.where(points <= 0.0, 0.0, np.where(points >= 1.0, 1.0, p))

    def quantile(self, p: npt.ArrayLike) -> Array:
        """The inverse of `cdf`."""
        return self._rank(logit(unit_interval(p, "TopOfGroup.quantile(p)", "Give probabilities in [0, 1]")))

    def win_rate(self, procedure: InferenceProcedure, opponent: InferenceProcedure | None = None) -> float:
        """M8, integrated over p: 1 - ∫ H(p) h0(u(p)) u'(p) dp."""
        objective = Objective.of(procedure, opponent)

        def loss(mesh: Mesh) -> Array:
            slope = np.exp(-self._reward(mesh.u)) / self._total
            return slope * objective.loss_density(mesh.u, objective.opponent_densities(self._rank(mesh.t)))

        return 1.0 - adapt(loss, self._ranks.mesh)[1]

    def _rank(self, t: Array) -> Array:
        return np.clip(self._ranks(t) / self._ranks.at_edges[-1], 0.0, 1.0)


def top_of_group_at_kl(procedure: BestOfN, kl: float) -> TopOfGroup:
    """The fixed point of the best-of-a-group reward that spends a given KL.

    Args:
        procedure: Best-of-n with n >= 2.
        kl: The KL asked for, in nats.

    Raises:
        InputError: If n is 1 (the reward is constant) or the KL is out of reach.
    """
    n = procedure.n
    beta = beta_for_kl(lambda beta: TopOfGroup(n, beta).kl, kl, _SMALLEST_GROUP_BETA, f"the top-1-of-{n} reward")
    return TopOfGroup(n, beta)


def named_tilts(
    procedure: InferenceProcedure, kl: float, opponent: InferenceProcedure | None
) -> tuple[list[tuple[TiltedPolicy, str, str]], dict[str, str]]:
    """Every choice of the literature at a KL.

    Args:
        procedure: What is done with the policy.
        kl: The KL that each may spend, in nats.
        opponent: What is done with the reference; the same procedure if None.

    Returns:
        Triples (tilt, label, what it stands for), and a reason for each choice that cannot spend this KL, by label.
    """
    t = best_exponent(procedure, kl, opponent)
    paper = 10.0 if t >= 0 else -10.0
    makers: list[tuple[Callable[[], TiltedPolicy], str, str]] = [
        (lambda: tilt_at_kl(Identity(), kl), "identity", "calibrated RLHF, QRPO"),
        (lambda: tilt_at_kl(Log(), kl), "log", "Best-of-n distillation"),
        (lambda: tilt_at_kl(Exponential(paper), kl), f"exponential, t={paper:g}", "the paper's, for N = 4"),
        (lambda: tilt_at_kl(Exponential(t), kl), f"exponential, t={t:.3g}", "the best at this KL"),
    ]
    if isinstance(procedure, BestOfN) and procedure.n > 1:
        label = f"top-1-of-{procedure.n}"
        makers.append((lambda: top_of_group_at_kl(procedure, kl), label, "group reward, self-play"))
    tilts: list[tuple[TiltedPolicy, str, str]] = []
    left_out: dict[str, str] = {}
    for make, label, note in makers:
        try:
            tilt = make()
            if note == "the best at this KL" and tilt.beta < 10.0 * _SMALLEST_BETA:
                note = "steepest in reach"
            tilts.append((tilt, label, note))
        except InputError as error:
            left_out[label] = str(error)
    return tilts, left_out


def best_exponent(procedure: InferenceProcedure, kl: float, opponent: InferenceProcedure | None = None) -> float:
    """The t whose exponential transform wins most at a KL, to about 1e-3; 0 (the identity) if it is within 0.01 of it.

    Args:
        procedure: What is done with the policy.
        kl: In nats.
        opponent: What is done with the reference; the same procedure if None.

    Returns:
        t; transforms so steep that they would need β below 1e-10 are left out.
    """
    from scipy import optimize  # pyright: ignore[reportMissingTypeStubs]

    scipy_optimize: Any = optimize

    def loss(s: float) -> float:
        try:
            return -tilt_at_kl(Exponential(math.sinh(s)), kl).win_rate(procedure, opponent)
        except InputError:  # too sharp a transform cannot spend this KL
            return 0.0

    # In s = asinh(t), about from -60 to 60 for small n; a larger n has its features at t of the order of n.
    largest = math.asinh(60.0 * max(1.0, max(part.n or 1 for _, part in procedure.components) / 8.0))
    grid = [float(s) for s in np.linspace(-largest, largest, 11)]
    losses = [loss(s) for s in grid]
    step = grid[1] - grid[0]
    # A large KL wants a steeper one still: walk on while that helps.
    while losses[-1] == min(losses) and grid[-1] < _LARGEST_S:
        grid.append(grid[-1] + step)
        losses.append(loss(grid[-1]))
    while losses[0] == min(losses) and grid[0] > -_LARGEST_S:
        grid.insert(0, grid[0] - step)
        losses.insert(0, loss(grid[0]))
    at = int(np.argmin(losses))
    low, high = grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)]
    best: Any = scipy_optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-3})
    t = math.sinh(float(best.x))
    return t if abs(t) >= 0.01 else 0.0
