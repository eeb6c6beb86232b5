"""Means over prompts with clustered errors, paired differences, and many comparisons at once.

Prompts are the independent unit throughout: a prompt's samples are first reduced to one number, and errors come from
the spread of those numbers (standard errors clustered by prompt).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtr  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

from infalign._io.wording import counted
from infalign.errors import InputError
from infalign.estimators import intervals
from infalign.estimators.intervals import UNBOUNDED, Ends

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Estimate:
    """A mean over prompts with its clustered error.

    Attributes:
        estimate: The mean over prompts.
        standard_error: Standard deviation of the per-prompt values over the root of their number; NaN for one prompt.
        confidence_interval: Lower and upper end.
        per_prompt: (P,) one value per prompt, whose mean is `estimate`.
        confidence: Level of the interval.
        bounds: Least and largest value that a prompt can have; infinite where there is no such bound.
    """

    estimate: float
    standard_error: float
    confidence_interval: tuple[float, float]
    per_prompt: FloatArray
    confidence: float
    bounds: Ends = field(default=UNBOUNDED, kw_only=True)

    @property
    def num_prompts(self) -> int:
        """Number of prompts, the independent units behind the error."""
        return int(self.per_prompt.size)

    def __repr__(self) -> str:
        low, high = self.confidence_interval
        return (
            f"{type(self).__name__}({self.estimate:.4f} ± {self.standard_error:.4f}, "
            f"{self.confidence:.0%} interval {low:.4f} to {high:.4f}, {counted(self.num_prompts, 'prompt')})"
        )


@dataclass(frozen=True, eq=False, repr=False)
class Difference(Estimate):
    """Paired difference of two estimates on the same prompts, with a two-sided test of no difference."""

    p_value: float

    @property
    def resolved(self) -> bool:
        """Whether the interval excludes zero."""
        low, high = self.confidence_interval
        return low > 0 or high < 0


def mean_estimate(
    per_prompt: ArrayLike, *, confidence: float = 0.95, bounds: Ends = UNBOUNDED, long_tail: bool = False
) -> Estimate:
    """Mean of one number per prompt; its interval is the wider of Student's t and Hall's transformed t at each end.

    Where prompts show no spread, the interval is what so many equal values leave possible within `bounds` (see
    `infalign.estimators.intervals.unseen_ends`); without bounds it is the whole real line. With one prompt the standard
    error is NaN and the interval is `bounds`.

    Args:
        per_prompt: (P,) independent values.
        confidence: Level of the interval, between 0 and 1.
        bounds: Least and largest value that a prompt can have, if they are known. The interval stays within them.
        long_tail: Whether values are known to have a long upper tail, as KLs have. A sample then shows less skewness
            than there is, and the upper end is computed with `intervals.KL_TAIL` times as much.

    Raises:
        InputError: If a value is not finite, or there is none.
    """
    values = checked(per_prompt, "per_prompt", axes="P")
    estimate, standard_error = mean_and_error(values, confidence)
    if values.size == 1:
        ends = bounds
    elif standard_error == 0:
        ends = intervals.unseen_ends(estimate, bounds, values.size, confidence)
    else:
        t = intervals.t_quantile(values.size, confidence)
        shown = intervals.skewness(values)
        skew = intervals.told_from_none(shown, values.size)
        upper_skew = max(skew, intervals.KL_TAIL * shown) if long_tail else skew
        hall = intervals.hall_ends(estimate, standard_error, skew, values.size, t, upper_skew=upper_skew)
        ends = intervals.widest((estimate - t * standard_error, estimate + t * standard_error), hall)
    return Estimate(estimate, standard_error, intervals.within(ends, bounds), values, confidence, bounds=bounds)


def share_estimate(per_prompt: ArrayLike, *, confidence: float = 0.95, least_error: float = 0.0) -> Estimate:
    """Mean of one share in [0, 1] per prompt; see `WinRate` for its interval.

    With one prompt the standard error is NaN and the interval [0, 1].

    Args:
        per_prompt: (P,) independent shares.
        confidence: Level of the interval, between 0 and 1.
        least_error: What the standard error is known to be at least, where a few prompts may agree by chance.

    Raises:
        InputError: If a share is not finite or lies outside [0, 1], or there is none.
    """
    values = checked(per_prompt, "per_prompt", axes="P")
    if values.min() < 0 or values.max() > 1:
        raise InputError("shares must lie in [0, 1]", where="per_prompt")
    num_prompts, bounds = values.size, (0.0, 1.0)
    estimate, spread_error = mean_and_error(values, confidence)
    if num_prompts == 1:
        return Estimate(estimate, spread_error, bounds, values, confidence, bounds=bounds)
    standard_error, variance = max(spread_error, least_error), estimate * (1 - estimate)
    t, ends = intervals.t_quantile(num_prompts, confidence), list[Ends]()
    if spread_error == 0:
        ends.append(intervals.unseen_ends(estimate, bounds, num_prompts, confidence))
    elif skew := intervals.SHARE_TAIL * intervals.told_from_none(intervals.skewness(values), num_prompts):
        low, high = intervals.hall_ends(estimate, spread_error, skew, num_prompts, t, upper_skew=skew)
        ends.append((estimate, high) if skew > 0 else (low, estimate))  # on the side of the tail
    if variance == 0 or standard_error > 0:
        # Where all is won or all lost, the number of prompts is the least that the effective number can be.
        effective = variance / standard_error**2 if variance > 0 else num_prompts
        ends.append(intervals.wilson_ends(estimate, effective, t))
    interval = intervals.within(intervals.widest(*ends), bounds)
    return Estimate(estimate, standard_error, interval, values, confidence, bounds=bounds)


def paired_difference(a: Estimate, b: Estimate, *, confidence: float | None = None) -> Difference:
    """Difference a − b of two estimates on the same prompts, in the same order.

    Pairing removes what the prompts, and reference samples if they are shared, have in common. Where the two agree
    on every prompt the difference is 0, and the interval is what so many prompts leave possible for others; so it
    is for a model against itself, whose difference is known to be exactly 0 for another reason than the numbers.

    Args:
        a: First estimate.
        b: Second estimate, on the same prompts.
        confidence: Level of the interval; that of `a` if None.

    Raises:
        InputError: If the numbers of prompts differ.
    """
    if a.num_prompts != b.num_prompts:
        raise InputError(
            f"a paired difference needs the same prompts: one side has {a.num_prompts} and the other {b.num_prompts}",
            hint="Evaluate both on the same list of prompts, in the same order",
        )
    differences = a.per_prompt - b.per_prompt
    # Equal values summed in another order differ by rounding, which must not count as a resolved difference.
    rounding = 1e-13 * np.maximum(np.abs(a.per_prompt), np.abs(b.per_prompt))
    differences[np.abs(differences) <= rounding] = 0.0
    return difference_estimate(
        differences,
        confidence=a.confidence if confidence is None else confidence,
        bounds=(a.bounds[0] - b.bounds[1], a.bounds[1] - b.bounds[0]),
    )


def difference_estimate(differences: ArrayLike, *, confidence: float = 0.95, bounds: Ends = UNBOUNDED) -> Difference:
    """Mean of per-prompt differences with the interval of `mean_estimate` and the two-sided test that agrees with it.

    Args:
        differences: (P,) one difference per prompt.
        confidence: Level of the interval.
        bounds: Least and largest difference that a prompt can have, if known: (−1, 1) for win rates.

    Raises:
        InputError: If a value is not finite, or there is none.
    """
    mean = mean_estimate(differences, confidence=confidence, bounds=bounds)
    if mean.num_prompts == 1:
        p_value = 1.0
    elif mean.standard_error == 0:
        p_value = intervals.unseen_p_value(mean.estimate, bounds, mean.num_prompts)
    else:
        t = mean.estimate / mean.standard_error
        skew = intervals.told_from_none(intervals.skewness(mean.per_prompt), mean.num_prompts)
        hall = intervals.straightened(t, skew, mean.num_prompts)
        # Both have to leave zero on the same side, or nothing is claimed.
        smaller = min(abs(t), abs(hall)) if t * hall > 0 else 0.0
        p_value = 2 * float(stdtr(mean.num_prompts - 1, -smaller))
    return Difference(
        mean.estimate,
        mean.standard_error,
        mean.confidence_interval,
        mean.per_prompt,
        confidence,
        p_value,
        bounds=bounds,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment: p-values that hold their level for the whole family of comparisons at once.

    Args:
        p_values: One p-value for each comparison of the family, in any order.

    Returns:
        Adjusted p-values in the same order; comparing each with α keeps the chance of any false claim below α.
    """
    if not p_values:
        return []
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(values.size, 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in adjusted]


def mean_and_error(values: FloatArray, confidence: float) -> tuple[float, float]:
    """Mean of independent values and its standard error."""
    if not 0 < confidence < 1:
        raise InputError(f"the confidence level must lie between 0 and 1, not {confidence}", where="confidence")
    return float(values.mean()), intervals.spread(values) / math.sqrt(values.size)


def checked(values: ArrayLike, name: str, *, axes: str, finite: bool = False) -> FloatArray:
    """The values as a float array with the named axes, none of them empty, free of NaN (and infinities if `finite`)."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"not an array of numbers with the same count of values for every prompt ({error})", where=name
        ) from error
    if array.ndim != len(axes) or 0 in array.shape:
        raise InputError(
            f"the shape must be ({', '.join(axes)}), none of them zero, not {array.shape}",
            where=name,
            hint="Give one row for each prompt, also if there is only one",
        )
    bad = ~np.isfinite(array) if finite or len(axes) == 1 else np.isnan(array)
    if bad.any():
        first = np.argwhere(bad)[0]
        place = f"prompt {first[0]}" + (f", sample {first[1]}" if array.ndim == 2 else "")
        raise InputError(
            f"{int(bad.sum())} of {array.size} values are {'NaN' if np.isnan(array[bad]).all() else 'not finite'} "
            f"(first: {place}; {counted(int(np.unique(np.argwhere(bad)[:, 0]).size), 'prompt')} affected)",
            where=name,
            hint="Score those responses again or leave their prompts out on purpose; they are never averaged away",
        )
    return array


def checked_pair(rewards_PG: ArrayLike, ref_rewards_PK: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Both reward arrays as checked matrices with one row for each prompt."""
    rewards = checked(rewards_PG, "rewards_PG", axes="PG")
    ref_rewards = checked(ref_rewards_PK, "ref_rewards_PK", axes="PK")
    if rewards.shape[0] != ref_rewards.shape[0]:
        raise InputError(
            f"policy rewards cover {counted(rewards.shape[0], 'prompt')} and reference rewards {ref_rewards.shape[0]}",
            where="rewards_PG, ref_rewards_PK",
            hint="Give one row for each prompt in both, in the same order",
        )
    return rewards, ref_rewards
