"""The best policy at a given KL, also where no β has its optimum there (M18).

Where J has one stationary density its KL moves smoothly with β, and the β is found by root finding. Elsewhere the
optimum can jump from one density to another as β falls. A KL inside the jump still has a best policy: it is stationary
for W among policies of that KL, but for no β the maximum of J, and the limit (the chord over the jump) lies above it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from infalign.errors import InputError
from infalign.numerics.quadrature import Antiderivative, Mesh, expit
from infalign.theory.beta_for_kl import beta_for_kl, checked_kl
from infalign.theory.envelope import Envelope, Point, envelope_of
from infalign.theory.solver import SMALLEST_BETA, Solution, refine, solve
from infalign.theory.winrate import Objective
from infalign.transforms import RewardTransform

Array = npt.NDArray[np.float64]

_SAME_KL = 1e-9
_JUMP = 1e-5
_STARTS = 4
_ROUNDS = 300
_SETTLED = 1e-13


def solution_at_kl(objective: Objective, kl: float, whose: str, transforms: Sequence[RewardTransform] = ()) -> Solution:
    """The best density that spends a given KL, to 1e-6 relative or better.

    Args:
        objective: The win rate W.
        kl: In nats.
        whose: What has this KL, for the error message.
        transforms: Shapes to start from as well inside a jump, so that none of them can be better.

    Raises:
        InputError: If the KL is out of reach; the message names the reachable range.
    """
    if objective.unique:
        return _by_root_finding(objective, kl, whose)
    kl = checked_kl(kl)
    envelope = envelope_of(objective)
    left, right = _bracket(envelope, kl)
    if kl > right.kl:
        raise InputError(
            f"a KL of {kl:g} nats is out of reach for {whose}",
            where="kl_budget",
            hint=f"The reachable KL is at most {right.kl:.4g} nats (beta from {SMALLEST_BETA:g})",
        )
    for point in (left, right):
        if abs(point.kl / kl - 1.0) < _SAME_KL and point.solution is not None:
            return point.solution
    return _inside_jump(objective, kl, left, right, transforms)


def _by_root_finding(objective: Objective, kl: float, whose: str) -> Solution:
    found: dict[float, Solution] = {}

    def kl_of(beta: float) -> float:
        nearest = min(found, key=lambda other: abs(math.log(other / beta)), default=None)
        near = nearest is not None and abs(math.log(nearest / beta)) < math.log(3.0)
        found[beta] = solve(objective, beta, found[nearest] if near and nearest is not None else None)
        return found[beta].kl

    return found[beta_for_kl(kl_of, kl, SMALLEST_BETA, whose)]


def _bracket(envelope: Envelope, kl: float) -> tuple[Point, Point]:
    """Two optima that enclose a KL: one of them has it, or the optimum jumps from one to the other."""
    left, right = envelope.rungs(kl)
    if kl >= right.kl:
        return left, right
    for step in range(100):
        if min(abs(left.kl / kl - 1.0), abs(right.kl / kl - 1.0)) < _SAME_KL:
            break
        chord = (right.win_rate - left.win_rate) / (right.kl - left.kl)
        if not right.beta < chord < left.beta:
            break
        beta = chord
        if step % 3 and left.kl > 0:  # as if sqrt(KL) were a straight line in log β
            share = (math.sqrt(kl) - left.x) / (right.x - left.x)
            beta = left.beta * (right.beta / left.beta) ** share
            beta = min(max(beta, right.beta * (1 + 1e-12)), left.beta * (1 - 1e-12))
        middle = envelope.at(beta, left, right)
        gain = (
            middle.win_rate - beta * middle.kl - max(left.win_rate - beta * left.kl, right.win_rate - beta * right.kl)
        )
        if beta == chord and gain <= 1e-13 and right.kl - left.kl > _JUMP * kl:
            break
        if not left.kl <= middle.kl <= right.kl:
            break
        left, right = (left, middle) if kl <= middle.kl else (middle, right)
    return left, right


class _Ground:
    """Densities on one mesh, log f at its nodes, and their W and KL."""

    def __init__(self, objective: Objective, mesh: Mesh) -> None:
        self.objective, self.mesh = objective, mesh
        self._opponents = objective.opponent_densities(mesh.u)

    def normalised(self, logs: Array) -> Array:
        logs = logs - logs.max()
        return logs - math.log(self.mesh.integral(np.exp(logs)))

    def kl(self, logs: Array) -> float:
        density = np.exp(logs)
        return self.mesh.integral(np.where(density > 0, density * logs, 0.0) - density + 1.0)

    def cdf(self, logs: Array) -> tuple[Array, Array]:
        at_nodes, at_edges = self.mesh.cumulative(np.exp(logs))
        return np.clip(at_nodes / at_edges[-1], 0.0, 1.0), at_edges / at_edges[-1]

    def win_rate(self, logs: Array) -> float:
        return 1.0 - self.mesh.integral(self.objective.loss_density(self.cdf(logs)[0], self._opponents))

    def reward_slope(self, logs: Array) -> Array:
        return self.objective.reward_slope(self.cdf(logs)[0], self._opponents)

    def at_kl(self, path: Callable[[float], Array], kl: float, low: float, high: float) -> tuple[Array, float] | None:
        """The density on a path that has a KL, and where on it; None if its ends do not enclose it."""
        from scipy import optimize  # pyright: ignore[reportMissingTypeStubs]

        scipy_optimize: Any = optimize

        def gap(s: float) -> float:
            return self.kl(self.normalised(path(s))) - kl

        if not gap(low) * gap(high) < 0:
            return None
        s = float(scipy_optimize.brentq(gap, low, high, xtol=1e-14, rtol=1e-14))
        return self.normalised(path(s)), s

    def scaled(self, direction: Array, kl: float, base: Array | float = 0.0) -> tuple[Array, float] | None:
        """The density base + c direction that has a KL, and c."""
        span = float(direction.max() - direction.min())
        found = self.at_kl(lambda s: base + math.exp(s) * direction, kl, math.log(1e-6 / span), math.log(1e5 / span))
        return None if found is None else (found[0], math.exp(found[1]))


def _inside_jump(
    objective: Objective, kl: float, left: Point, right: Point, transforms: Sequence[RewardTransform]
) -> Solution:
    """The best of several ascents of W at one KL."""
    assert left.solution is not None
    assert right.solution is not None
    solutions = (left.solution, right.solution)
    ground = _Ground(objective, Mesh.from_edges(np.unique(np.concatenate([end.mesh.edges for end in solutions]))))
    ends = [
        Antiderivative(end.mesh, end.reward_slope)(ground.mesh.t) / end.beta - end.log_partition for end in solutions
    ]
    starts = [ground.at_kl(lambda s: (1.0 - s) * ends[0] + s * ends[1], kl, 0.0, 1.0)]
    named = [np.maximum(transform(ground.mesh.u), -1e4) for transform in transforms]
    starts += [ground.scaled(direction, kl) for direction in [*ends, *named, *_directions(ground.mesh)]]
    reached = sorted((logs for logs, _ in filter(None, starts)), key=ground.win_rate, reverse=True)
    if not reached:
        raise InputError(f"no policy with a KL of {kl:g} nats was found", where="kl_budget", hint="Use another KL")
    tops = [_ascend(ground, logs, kl) for logs in reached[:_STARTS]]
    logs, beta = max(tops, key=lambda top: ground.win_rate(top[0]))
    return _polished(ground, logs, beta, kl)


def _directions(mesh: Mesh) -> list[Array]:
    """Shapes of Φ to start from: the named transforms, powers of u and 1 - u, and two-level densities."""
    u, t = mesh.u, mesh.t
    log_u, log_v = -np.logaddexp(0.0, -t), -np.logaddexp(0.0, t)
    powers = [np.exp(k * log_u) for k in (1, 4, 16, 64)] + [1.0 - np.exp(k * log_v) for k in (4, 16, 64)]
    levels = [expit(4.0 * (t - edge)) for edge in np.linspace(-4.0, 8.0, 13)]
    return [np.maximum(log_u, -40.0), np.expm1(10.0 * u) / np.expm1(10.0), *powers, *levels]


def _ascend(ground: _Ground, logs: Array, kl: float) -> tuple[Array, float]:
    """Climb W among densities of one KL: log f moves towards a multiple of R. Also returns β, one over the multiple."""
    win_rate, part, beta = ground.win_rate(logs), 0.5, 1.0
    for _ in range(_ROUNDS):
        reward = ground.mesh.cumulative(ground.reward_slope(logs))[0]
        following = logs
        gained = -math.inf
        while part > 1e-4:
            step = ground.scaled(reward, kl, (1.0 - part) * logs)
            if step is not None:
                following, scale = step
                gained = ground.win_rate(following) - win_rate
                if gained >= 0.0:
                    beta = part / scale
                    break
            part *= 0.5
        if gained <= _SETTLED:
            break
        logs, win_rate, part = following, win_rate + gained, min(1.5 * part, 1.0)
    return logs, beta


def _polished(ground: _Ground, logs: Array, beta: float, kl: float) -> Solution:
    """Newton's method from where the ascent ended; what the ascent found if that loses the way or the KL."""
    objective, mesh = ground.objective, ground.mesh
    rough = _as_solution(ground, logs, beta)
    start = refine(objective, beta, (mesh.edges, ground.cdf(logs)[1]))
    betas, points = [beta], [start]
    for _ in range(12):
        last = points[-1]
        if last is None or abs(last.kl / kl - 1.0) > 0.05:
            break
        if abs(last.kl / kl - 1.0) < _SAME_KL:
            return last if last.win_rate >= rough.win_rate - 1e-6 else rough
        before = points[-2] if len(points) > 1 else None
        if before is None:
            following = betas[-1] * (1.0 + 1e-4)
        else:
            slope = (last.kl - before.kl) / (betas[-1] - betas[-2])
            following = betas[-1] + (kl - last.kl) / slope if slope else betas[-1]
        if not 0.8 * beta < following < 1.25 * beta:
            break
        betas.append(following)
        points.append(refine(objective, following, last))
    return rough


def _as_solution(ground: _Ground, logs: Array, beta: float) -> Solution:
    """A density given at the nodes, in the solver's form: the slope of β log f takes the place of R'."""
    mesh = ground.mesh
    slope = ground.reward_slope(logs)
    reward, _ = mesh.cumulative(slope)
    weights = mesh.weights * np.exp(logs)
    log_partition = float((weights * (reward / beta - logs)).sum() / weights.sum())
    return Solution(
        objective=ground.objective,
        beta=beta,
        mesh=mesh,
        reward_slope=slope,
        density=np.exp(logs),
        cdf=ground.cdf(logs)[0],
        log_partition=log_partition,
        kl=ground.kl(logs),
        win_rate=ground.win_rate(logs),
    )
