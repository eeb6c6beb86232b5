"""Before any model is trained: what the best alignment for a procedure reaches at a KL budget.

And what the usual choices of reward leave on the table (sections 4 and 5).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from infalign.errors import InputError
from infalign.procedures import BestOfN, InferenceProcedure, Standard, WorstOfN, check_is_procedure, whole_number
from infalign.theory.alternatives import beta_for_kl, named_tilts
from infalign.theory.channel import ChannelPolicy
from infalign.theory.finite_k import FiniteKPrediction, check_num_ref, finite_k_prediction
from infalign.theory.optimal import SMALLEST_BETA, OptimalTransform, optimal_transform
from infalign.theory.solver import Solution, solve
from infalign.theory.tilt import TiltedPolicy
from infalign.theory.winrate import Objective
from infalign.transforms import RewardTransform, positive_number

if TYPE_CHECKING:
    from infalign.theory.predictability import GainAtN

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Option:
    """One choice of reward transform, with the β that spends the plan's KL.

    Attributes:
        label: Its name in tables.
        transform: Φ.
        beta: KL coefficient, in units of Φ per nat.
        kl: KL(π‖p) of the policy it leads to, in nats per response.
        win_rate: The procedure on that policy against its opponent on the reference (M8).
        standard_win_rate: One sample of that policy against one sample of the reference.
        other_win_rates: Win rates under other procedures asked for, by their label, each against itself.
        tilt: The policy that it leads to.
        note: What it stands for.
    """

    label: str
    transform: RewardTransform
    beta: float
    kl: float
    win_rate: float
    standard_win_rate: float
    tilt: TiltedPolicy | ChannelPolicy = field(repr=False)
    other_win_rates: dict[str, float] = field(default_factory=dict[str, float])
    note: str = ""

    def to_dict(self, *, with_transform: bool = True) -> dict[str, Any]:
        """JSON-ready; the transform's table can be left out."""
        content: dict[str, Any] = {
            "label": self.label,
            "beta": self.beta,
            "kl": self.kl,
            "win_rate": self.win_rate,
            "standard_win_rate": self.standard_win_rate,
            "other_win_rates": dict(self.other_win_rates),
            "note": self.note,
        }
        if with_transform:
            content["transform"] = self.transform.to_dict()
        return content


@dataclass(frozen=True, eq=False)
class Frontier:
    """The best win rate at each KL, along the path of optimal transforms.

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
        wanted = check_kls(kls, "Frontier.at")
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


@dataclass(frozen=True, eq=False)
class Plan:
    """The recommendation of `plan`.

    Attributes:
        procedure: What will be done with the aligned policy.
        opponent: What is done with the reference; None if it is the same procedure.
        best: The optimal transform.
        alternatives: The named transforms at the same KL.
        finite_k: What is left when calibration uses K reference rollouts per prompt, for every K asked for.
        left_out: Named transforms that cannot spend this KL, with the reason.
        predictability: ρ, how well the policy can tell the reward from its own text; 1 in the idealised theory.
        idealised: With a predictability below 1, what the idealised theory (M9) has at the same KL; None if it is out
            of reach.
    """

    procedure: InferenceProcedure
    opponent: InferenceProcedure | None
    best: Option
    alternatives: tuple[Option, ...]
    finite_k: tuple[FiniteKPrediction, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict[str, str])
    predictability: float = 1.0
    idealised: Option | None = None

    @cached_property
    def frontier(self) -> Frontier:
        """The best win rate at each KL, to twice this plan's KL or as far as the solver goes."""
        if self.predictability < 1.0:
            from infalign.theory.channel_path import channel_frontier

            return Frontier(
                *channel_frontier(self.procedure, self.predictability, 2.0 * self.best.kl, opponent=self.opponent)
            )
        return frontier(self.procedure, max_kl=2.0 * self.best.kl, opponent=self.opponent)

    @cached_property
    def by_n(self) -> tuple[GainAtN, ...]:
        """What several N would gain at this KL and predictability; empty unless this is Best-of-N or Worst-of-N."""
        if (
            self.predictability == 1.0
            or self.opponent is not None
            or not isinstance(self.procedure, BestOfN | WorstOfN)
        ):
            return ()
        from infalign.theory.predictability import gains_by_n

        return gains_by_n(type(self.procedure), self.best.kl, self.predictability)

    @cached_property
    def usual(self) -> dict[str, float] | None:
        """Of an idealised plan: limit and identity at its KL for the predictability that a small model has, about."""
        if self.predictability != 1.0:
            return None
        from infalign.theory.predictability import usual_gain

        return usual_gain(self.procedure, self.best.kl, self.opponent)

    def to_dict(self, *, with_transforms: bool = True) -> dict[str, Any]:
        """JSON-ready. The best option's fields are repeated at the top level."""
        content: dict[str, Any] = {
            "procedure": self.procedure.to_dict(),
            "opponent": None if self.opponent is None else self.opponent.to_dict(),
            "beta": self.best.beta,
            "kl": self.best.kl,
            "win_rate": self.best.win_rate,
            "standard_win_rate": self.best.standard_win_rate,
            "best": self.best.to_dict(with_transform=with_transforms),
            "alternatives": [option.to_dict(with_transform=with_transforms) for option in self.alternatives],
            "frontier": {
                "kl": self.frontier.kl.tolist(),
                "win_rate": self.frontier.win_rate.tolist(),
                "beta": [None, *self.frontier.beta[1:].tolist()],
            },
        }
        if self.predictability < 1.0:
            content["predictability"] = self.predictability
            ideal = self.idealised
            content["idealised"] = None if ideal is None else ideal.to_dict(with_transform=with_transforms)
            content["by_n"] = [gain.to_dict() for gain in self.by_n]
        if self.left_out:
            content["left_out"] = dict(self.left_out)
        if self.finite_k:
            content["finite_k"] = [prediction.to_dict() for prediction in self.finite_k]
        return content


def plan(
    procedure: InferenceProcedure,
    beta: float | None = None,
    kl_budget: float | None = None,
    *,
    opponent: InferenceProcedure | None = None,
    num_ref: int | Sequence[int] = (),
    others: InferenceProcedure | Sequence[InferenceProcedure] = (),
    seed: int = 0,
    predictability: float = 1.0,
) -> Plan:
    """Find the optimal transform for a procedure, at a β or at a KL budget, beside the named transforms at the same KL.

    Args:
        procedure: What will be done with the aligned policy.
        beta: KL coefficient, in units of win rate per nat. Give this or `kl_budget`.
        kl_budget: KL(π‖p) to spend, in nats per response; met to 1e-6 relative or better.
        opponent: What is done with the reference; the same procedure if None.
        num_ref: Also predict what is left with so many reference rollouts per prompt (M6); one number or several.
        others: Procedures whose win rates are wanted too, each against itself; one or several.
        seed: Of the simulation behind `num_ref`.
        predictability: ρ, the correlation of what the policy can tell about its own text with the reward (M14). Below 1
            the plan is that of M15: mostly another β; its level is a Gaussian model's.

    Raises:
        InputError: If neither or both of beta and kl_budget are given, one is out of range, or the budget is out of
            reach; the message names the reachable range. Also if what is given is no procedure or no number.
    """
    if (beta is None) == (kl_budget is None):
        raise InputError(
            "give exactly one of beta and kl_budget",
            where="plan",
            hint="On the command line --beta is the coefficient and --kl the budget in nats",
        )
    # Everything is checked before anything is computed.
    counts = [check_num_ref(count) for count in (num_ref if isinstance(num_ref, Iterable) else [num_ref])]
    others = (others,) if isinstance(others, InferenceProcedure) else tuple(others)
    for other in others:
        check_is_procedure(other, "others")
    if predictability != 1.0:
        from infalign.theory.channel_plan import plan_in_channel

        return plan_in_channel(procedure, beta, kl_budget, predictability, opponent, counts, others)
    if beta is not None:
        optimum = optimal_transform(procedure, beta, opponent)
    else:
        optimum = optimum_at_kl(procedure, cast(float, kl_budget), opponent)
    best = _option(optimum.tilt, "optimal", procedure, opponent, others, "the limit (M9)", known=optimum)
    tilts, left_out = named_tilts(procedure, optimum.kl, opponent)
    alternatives = [_option(tilt, label, procedure, opponent, others, note) for tilt, label, note in tilts]
    finite_k = tuple(finite_k_prediction(optimum, count, seed=seed) for count in counts)
    return Plan(procedure, opponent, best, tuple(alternatives), finite_k, left_out)


def optimum_at_kl(
    procedure: InferenceProcedure, kl: float, opponent: InferenceProcedure | None = None
) -> OptimalTransform:
    """The optimal transform that spends a given KL, to 1e-9 relative or better.

    Raises:
        InputError: If the KL is out of reach; the message names the reachable range.
    """
    objective = Objective.of(procedure, opponent)
    found: dict[float, Solution] = {}

    def kl_of(beta: float) -> float:
        nearest = min(found, key=lambda other: abs(math.log(other / beta)), default=None)
        near = nearest is not None and abs(math.log(nearest / beta)) < math.log(3.0)
        found[beta] = solve(objective, beta, found[nearest] if near and nearest is not None else None)
        return found[beta].kl

    beta = beta_for_kl(kl_of, kl, SMALLEST_BETA, f"the optimal transform of {procedure.label}")
    return OptimalTransform(procedure, opponent, beta, found[beta])


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
    spacing = furthest / (num_points - 1)
    start = _near_reference(objective)
    reference_loss = objective.loss_density(start.mesh.u, objective.opponent_densities(start.mesh.u))
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
        win_rate=np.array([1.0 - start.mesh.integral(reference_loss), *(point.win_rate for point in points)]),
        beta=np.array([math.inf, *(point.beta for point in points)]),
    )


def limit(
    procedure: InferenceProcedure,
    kls: npt.ArrayLike,
    opponent: InferenceProcedure | None = None,
    predictability: float = 1.0,
) -> Array:
    """The theoretical limit: the best win rate at each KL (section 5).

    Args:
        procedure: What is done with the policy.
        kls: KLs in nats, at least 0, any shape.
        opponent: What is done with the reference; the same procedure if None.
        predictability: ρ, the correlation of what the policy can tell about its own text with the reward (M14, M15).

    Returns:
        Win rates, same shape, to about 1e-6. Beyond the largest KL that is numerically reachable (β = 1e-7) the win
        rate at that KL is returned: too small, but by less than 1e-7 for every nat beyond it, because the curve is
        concave with slope β. (Worst-of-64 reaches 0.30 nats and has won all but 2e-9 there.)

    Raises:
        InputError: If a KL is negative or not finite.
    """
    if predictability != 1.0:
        from infalign.theory.channel_path import channel_limit

        return channel_limit(procedure, kls, predictability, opponent)
    wanted = check_kls(kls, "limit")
    curve = frontier(procedure, max(float(wanted.max(initial=0.0)), 1e-6), 40, opponent)
    return curve.at(np.minimum(wanted, curve.kl[-1]))


def _near_reference(objective: Objective) -> Solution:
    """The optimum at a β far above the range of R, where the policy is nearly the reference."""
    mild = solve(objective, 1.0)
    return solve(objective, 1e4 * max(1.0, float(mild.mesh.integral(mild.reward_slope))))


def _option(
    tilt: TiltedPolicy,
    label: str,
    procedure: InferenceProcedure,
    opponent: InferenceProcedure | None,
    others: Sequence[InferenceProcedure],
    note: str,
    known: OptimalTransform | None = None,
) -> Option:
    return Option(
        label=label,
        transform=tilt.transform,
        tilt=tilt,
        beta=tilt.beta,
        kl=tilt.kl if known is None else known.kl,
        win_rate=tilt.win_rate(procedure, opponent) if known is None else known.win_rate,
        standard_win_rate=tilt.win_rate(Standard()),
        other_win_rates={other.label: tilt.win_rate(other) for other in others},
        note=note,
    )


def check_kls(values: npt.ArrayLike, where: str) -> Array:
    """KLs as float64, refused unless every one is finite and at least 0."""
    try:
        kls = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"not an array of real numbers ({error})", where=where, hint="Give nats") from error
    if kls.size and not (np.isfinite(kls).all() and kls.min() >= 0):
        raise InputError("a KL is negative or not finite", where=where, hint="Give nats, at least 0")
    return kls
