"""The frontier: win rate against KL, each point with errors both ways, under the theoretical limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from infalign.errors import InputError
from infalign.estimators import Difference, Estimate, difference_estimate, mean_estimate
from infalign.evaluation.predictability import limit_curve, limit_name
from infalign.evaluation.results import MethodResult, Predictability
from infalign.procedures import procedure_from_dict
from infalign.theory.plan import limit


@dataclass(frozen=True)
class FrontierPoint:
    """One method: its KL in nats and its win rate, each with an interval; points of one series are of one curve.

    A policy that was reshaped has the `family` of its aligned model's series, and is drawn as one with it.
    """

    label: str
    series: str
    kl: float
    kl_low: float
    kl_high: float
    win_rate: float
    low: float
    high: float
    family: str = ""
    reshaped: bool = False


@dataclass(frozen=True)
class Frontier:
    """Data of one frontier figure.

    Attributes:
        procedure: Label of the procedure.
        points: One point for each method, as measured.
        limit_kls: KLs in nats at which the limit was computed, from 0; empty where the procedure could not be stored.
        limit_win_rates: Best win rate at each of them.
        limit_with_ties: Whether the curve is that for the reward levels as they are.
        predictable_win_rates: The same for a policy of the predictability found (M15); empty where it is not known.
        predictable_label: What that curve is called.
    """

    procedure: str
    points: list[FrontierPoint]
    limit_kls: list[float]
    limit_win_rates: list[float]
    limit_with_ties: bool = False
    predictable_win_rates: list[float] = field(default_factory=list[float])
    predictable_label: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return asdict(self)


def frontier(
    results: Sequence[MethodResult],
    procedure: str,
    *,
    num_limit_points: int = 40,
    predictability: Predictability | None = None,
) -> Frontier:
    """Points and limit curve of one procedure.

    Args:
        results: Methods, all measured under the procedure.
        procedure: Its label.
        num_limit_points: Points on the limit curve.
        predictability: As stored by the evaluation, for the second curve.

    Raises:
        InputError: If there is no result, or one was not measured under the procedure.
    """
    if not results:
        raise InputError("there is nothing to draw", where="frontier", hint="Evaluate at least one method")
    points: list[FrontierPoint] = []
    for result in results:
        win, kl = result.of(procedure).win_rate, result.kl
        points.append(
            FrontierPoint(
                label=result.label,
                series=result.series or result.label,
                kl=kl.estimate,
                kl_low=kl.estimate if kl.low is None else kl.low,
                kl_high=kl.estimate if kl.high is None else kl.high,
                win_rate=win.estimate,
                low=win.estimate if win.low is None else win.low,
                high=win.estimate if win.high is None else win.high,
                family=family_of(result),
                reshaped=result.reshaped is not None,
            )
        )
    spec = results[0].of(procedure).spec
    reach = 1.15 * max(point.kl_high for point in points)
    if spec is not None and reach > 0:
        # The limit rises like √KL from the origin: points evenly spaced in √KL draw it smoothly.
        kls = reach * np.linspace(0, 1, num_limit_points) ** 2
        tied = next((entry for result in results if (entry := result.of(procedure).tied_limit) is not None), None)
        if tied is None:
            win_rates = limit(procedure_from_dict(spec), kls)
        else:
            win_rates = np.interp(np.sqrt(kls), np.sqrt(tied.kls), tied.win_rates)
        second, label = [], ""
        if predictability is not None and predictability.estimate is not None:
            second = limit_curve(spec, kls.tolist(), predictability.estimate)
            label = limit_name(predictability) if second else ""
        return Frontier(procedure, points, kls.tolist(), win_rates.tolist(), tied is not None, second, label)
    return Frontier(procedure, points, [], [])


def family_of(result: MethodResult) -> str:
    """What a plain policy and its reshaped form share: the series of the plain one."""
    return (result.series or result.label) if result.reshaped is None else result.reshaped.method


def win_rate_at(sweep: Sequence[MethodResult], procedure: str, kl: float, *, confidence: float = 0.95) -> Estimate:
    """Win rate of a method at a given KL, by linear interpolation between the two runs of a sweep that enclose it.

    The policy that is the reference, (KL 0, win rate ½), counts as a run. On a concave frontier a chord lies below,
    so the value errs to the low side. The error is that of both runs' win rates and KLs, by prompt, to first order.

    Args:
        sweep: Runs of one method on the same prompts, for example at several beta.
        procedure: Label of the procedure.
        kl: KL in nats, above 0.
        confidence: Level of the interval.

    Raises:
        InputError: If the KL is not enclosed, or the runs have different prompts.
    """
    runs = sorted(sweep, key=lambda result: result.kl.estimate)
    if not runs or not 0 < kl <= runs[-1].kl.estimate:
        reach = f"0 to {runs[-1].kl.estimate:.3f}" if runs else "none"
        raise InputError(
            f"KL {kl:.3f} is outside the measured range ({reach} nats)", hint="Choose a KL inside it or add a run"
        )
    num_prompts = runs[0].num_prompts
    if any(result.num_prompts != num_prompts for result in runs):
        raise InputError(
            "the runs of a sweep must share their prompts", hint="Evaluate all on the same list of prompts"
        )
    above = next(index for index, result in enumerate(runs) if result.kl.estimate >= kl)
    right_kl_P, right_win_P = _per_prompt(runs[above], procedure)
    if above > 0:
        left_kl_P, left_win_P = _per_prompt(runs[above - 1], procedure)
    else:
        left_kl_P, left_win_P = np.zeros(num_prompts), np.full(num_prompts, 0.5)
    left_kl, left_win = float(left_kl_P.mean()), float(left_win_P.mean())
    width, rise = float(right_kl_P.mean()) - left_kl, float(right_win_P.mean()) - left_win
    if width <= 0:
        return mean_estimate(right_win_P, confidence=confidence, bounds=(0.0, 1.0))
    t, slope = (kl - left_kl) / width, rise / width
    # At a fixed KL the value moves with each run's win rate less slope times its KL.
    moved_P = (1 - t) * (left_win_P - slope * (left_kl_P - left_kl))
    moved_P += t * (right_win_P - slope * (right_kl_P - right_kl_P.mean()))
    return mean_estimate(moved_P, confidence=confidence, bounds=(0.0, 1.0))


def difference_at(
    sweep: Sequence[MethodResult],
    baseline: Sequence[MethodResult],
    procedure: str,
    kl: float,
    *,
    confidence: float = 0.95,
) -> Difference:
    """Paired difference of two sweeps at the same KL, each interpolated as in `win_rate_at`.

    Args:
        sweep: Runs of the method.
        baseline: Runs of the baseline, on the same prompts.
        procedure: Label of the procedure.
        kl: KL in nats, inside the range of both.
        confidence: Level of the interval.

    Raises:
        InputError: As `win_rate_at`, or if the two sweeps have different prompts.
    """
    ours, theirs = win_rate_at(sweep, procedure, kl), win_rate_at(baseline, procedure, kl)
    if ours.num_prompts != theirs.num_prompts:
        raise InputError("the two sweeps have different prompts", hint="Evaluate both on the same list of prompts")
    return difference_estimate(ours.per_prompt - theirs.per_prompt, confidence=confidence, bounds=(-1.0, 1.0))


def _per_prompt(result: MethodResult, procedure: str) -> tuple[np.ndarray, np.ndarray]:
    """KL and win rate of each prompt."""
    return np.asarray(result.kl.per_prompt), np.asarray(result.of(procedure).win_rate.per_prompt)


def least_favourable_at(
    sweep: Sequence[MethodResult],
    baseline: Sequence[MethodResult],
    procedure: str,
    kl: float,
    *,
    confidence: float = 0.95,
) -> Difference:
    """The difference at one KL as unfavourable to the side ahead as rising, concave frontiers allow.

    Between two runs such a frontier lies above their chord and below the farther one's win rate. The side ahead is put
    on its chord, the other at its ceiling; arguments and errors are those of `difference_at`.
    """
    ours, theirs = win_rate_at(sweep, procedure, kl), win_rate_at(baseline, procedure, kl)
    if ours.estimate >= theirs.estimate:
        gap_P = ours.per_prompt - _ceiling(baseline, procedure, kl)
    else:
        gap_P = _ceiling(sweep, procedure, kl) - theirs.per_prompt
    return difference_estimate(gap_P, confidence=confidence, bounds=(-1.0, 1.0))


def _ceiling(sweep: Sequence[MethodResult], procedure: str, kl: float) -> np.ndarray:
    """Win rate of each prompt in the run that encloses this KL from above."""
    above = min((run for run in sweep if run.kl.estimate >= kl), key=lambda run: run.kl.estimate)
    return _per_prompt(above, procedure)[1]
