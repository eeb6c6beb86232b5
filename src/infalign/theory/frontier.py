"""The frontier: the limit as a curve, with its slope β."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from infalign.errors import InputError
from infalign.procedures import InferenceProcedure, whole_number
from infalign.theory.envelope import Envelope, envelope_of
from infalign.theory.solver import SMALLEST_BETA, Solution, solve
from infalign.theory.winrate import Objective
from infalign.transforms import positive_number

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Frontier:
    """The limit: the best win rate at each KL (M18).

    Attributes:
        kl: Shape (m,), increasing, in nats.
        win_rate: Shape (m,): no policy that sees y through C alone does better.
        beta: Shape (m,): the slope of the curve, dW/dKL = β.
    """

    kl: Array
    win_rate: Array
    beta: Array

    def at(self, kls: npt.ArrayLike) -> Array:
        """The win rate at other KLs: Hermite interpolation in sqrt(KL), whose slopes are exact.

        Args:
            kls: KLs in nats from 0 to the curve's end, any shape.

        Raises:
            InputError: If a KL is negative, not finite or beyond the curve.
        """
        wanted = checked_kls(kls, "Frontier.at")
        if wanted.size and wanted.max() > self.kl[-1] * (1 + 1e-9):
            raise InputError(
                f"a KL of {wanted.max():g} nats is beyond the curve",
                where="Frontier.at",
                hint=f"Ask for KLs between 0 and {self.kl[-1]:.4g}",
            )
        from scipy import interpolate  # pyright: ignore[reportMissingTypeStubs]

        scipy_interpolate: Any = interpolate
        # W - W(0) grows like sqrt(KL), so in x = sqrt(KL) the curve is smooth down to 0, with dW/dx = 2 x β. At 0 that
        # is the limit for large β, which the first point, very near the reference, already shows.
        x = np.sqrt(self.kl)
        slopes = 2.0 * x[1:] * self.beta[1:]
        curve: Any = scipy_interpolate.CubicHermiteSpline(x, self.win_rate, np.insert(slopes, 0, slopes[0]))
        return np.asarray(curve(np.minimum(np.sqrt(wanted), x[-1])), dtype=np.float64)


def frontier(
    procedure: InferenceProcedure,
    max_kl: float = 4.0,
    num_points: int = 50,
    opponent: InferenceProcedure | None = None,
) -> Frontier:
    """The best win rate at each KL, from 0 to `max_kl` or as far as the solver goes.

    Args:
        procedure: What is done with the policy.
        max_kl: Largest KL wanted, in nats.
        num_points: About how many points on the curve, the one at KL 0 included; about evenly spaced in sqrt(KL).
        opponent: What is done with the reference; the same procedure if None.

    Raises:
        InputError: If max_kl is not a positive number, or num_points not a whole number of at least 2.
    """
    objective = Objective.of(procedure, opponent)
    furthest = math.sqrt(positive_number(max_kl, "max_kl", "Give nats above 0"))
    if whole_number(num_points, "num_points", "frontier") < 2:
        raise InputError("a curve needs at least 2 points", where="frontier")
    if objective.unique:
        return _path_of_optima(objective, furthest, num_points)
    return _along_envelope(envelope_of(objective), furthest, num_points)


def _along_envelope(envelope: Envelope, furthest: float, num_points: int) -> Frontier:
    """The limit at evenly spaced sqrt(KL), and at both ends of every jump."""
    last = envelope.rungs(furthest**2)[1].x
    points: dict[float, tuple[float, float]] = {}
    for x in np.linspace(0.0, min(furthest, last), num_points)[1:]:
        kl = float(x) ** 2
        points[kl] = envelope.value_and_slope(kl)
        left, right, straight = envelope.enclosing(kl)
        if straight:
            points |= {end.kl: (end.win_rate, points[kl][1]) for end in (left, right) if 0.0 < end.kl <= furthest**2}
    kls = sorted(points)
    return Frontier(
        kl=np.array([0.0, *kls]),
        win_rate=np.array([envelope.optima.reference_win_rate, *(points[kl][0] for kl in kls)]),
        beta=np.array([math.inf, *(points[kl][1] for kl in kls)]),
    )


def _path_of_optima(objective: Objective, furthest: float, num_points: int) -> Frontier:
    """Optimum after optimum, β falling, in steps that follow the slope of sqrt(KL) seen last."""
    spacing = furthest / (num_points - 1)
    start = _near_reference(objective)
    points = [start]
    # Near KL = 0, sqrt(KL) = c/β; from there on the step in log β follows the slope of sqrt(KL) seen last.
    log_step = math.log(math.sqrt(start.kl) / spacing)
    for _ in range(4 * num_points):
        beta = max(points[-1].beta * math.exp(log_step), SMALLEST_BETA)
        try:
            points.append(solve(objective, beta, points[-1]))
        except InputError:
            break
        x, before = math.sqrt(points[-1].kl), math.sqrt(points[-2].kl)
        if x >= furthest * (1 - 1e-12) or beta <= SMALLEST_BETA:
            break
        slope = (x - before) / log_step if len(points) > 2 else -x
        log_step = max(min(spacing, furthest + 1e-9 - x) / min(slope, -1e-9), -2.5)
    return Frontier(
        kl=np.array([0.0, *(point.kl for point in points)]),
        win_rate=np.array([objective.reference_win_rate, *(point.win_rate for point in points)]),
        beta=np.array([math.inf, *(point.beta for point in points)]),
    )


def _near_reference(objective: Objective) -> Solution:
    """The optimum at a β far above the range of R, where the policy is nearly the reference."""
    mild = solve(objective, 1.0)
    return solve(objective, 1e4 * max(1.0, float(mild.mesh.integral(mild.reward_slope))))


def checked_kls(values: npt.ArrayLike, where: str) -> Array:
    """KLs as float64, refused unless every one is finite and at least 0."""
    try:
        kls = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"not an array of real numbers ({error})", where=where, hint="Give nats") from error
    if kls.size and not (np.isfinite(kls).all() and kls.min() >= 0):
        raise InputError("a KL is negative or not finite", where=where, hint="Give nats, at least 0")
    return kls
