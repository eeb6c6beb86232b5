"""Ends of confidence intervals for a mean over prompts: where Student's t fails, and what holds instead.

Few prompts, skewed values, values at the end of their range, and values that are all equal each make `mean ± t·SE` too
narrow on one side. Every interval of this package is built from the pieces here, and takes the wider one at each end.
How often each holds is in docs/evaluation.md, from benchmarks/estimators.py.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

FloatArray = NDArray[np.float64]
Ends = tuple[float, float]

UNBOUNDED: Ends = (-math.inf, math.inf)
# A sample of P values shows less skewness than there is in a long tail. So the end on its side is computed with so many
# times the skewness; found by simulation (benchmarks/intervals.py).
KL_TAIL, SHARE_TAIL = 1.5, 1.25


def t_quantile(num_prompts: int, confidence: float) -> float:
    """Two-sided quantile of Student's t with P − 1 degrees of freedom."""
    return float(stdtrit(num_prompts - 1, 0.5 + confidence / 2))


def spread(values_P: FloatArray) -> float:
    """Sample standard deviation; exactly 0 for values that differ by rounding alone, NaN for one value."""
    if values_P.size == 1:
        return math.nan
    equal = float(np.ptp(values_P)) <= 1e-14 * float(np.abs(values_P).max())
    return 0.0 if equal else float(values_P.std(ddof=1))


def skewness(values_P: FloatArray) -> float:
    """Sample skewness with the usual correction for P (G₁); 0 where it cannot be known."""
    num_prompts, deviation = values_P.size, spread(values_P)
    if num_prompts < 3 or not deviation > 0:
        return 0.0
    standard_P: FloatArray = (values_P - values_P.mean()) / deviation
    third = float((standard_P**3).mean())
    return third * num_prompts**2 / ((num_prompts - 1) * (num_prompts - 2))


def told_from_none(skew: float, num_prompts: int) -> float:
    """Skewness drawn towards 0 by what P normal values show by chance (James and Stein's positive part)."""
    if num_prompts < 3 or skew == 0:
        return 0.0
    p = num_prompts
    by_chance = 6 * p * (p - 1) / ((p - 2) * (p + 1) * (p + 3))  # variance of G₁ of normal values
    return skew * max(0.0, 1 - by_chance / skew**2)


def straightened(t: float, skew: float, num_prompts: int) -> float:
    """Hall's transformation of a t statistic, which removes most of its skewness (Hall 1992, J. R. Stat. Soc. B 54).

    g(T) = T + b T² + b² T³/3 + b/2 with b = skewness / (3 √P). It is increasing, so tests and intervals agree.
    """
    b = skew / (3 * math.sqrt(num_prompts))
    return t + b * t**2 + b**2 * t**3 / 3 + b / 2


def bent(level: float, skew: float, num_prompts: int) -> float:
    """Inverse of `straightened`."""
    b = skew / (3 * math.sqrt(num_prompts))
    if abs(b) < 1e-5:  # what the general form loses to rounding
        return level - b * level**2 - b / 2
    return (float(np.cbrt(1 + 3 * b * (level - b / 2))) - 1) / b


def hall_ends(mean: float, error: float, skew: float, num_prompts: int, t: float, *, upper_skew: float) -> Ends:
    """The interval of Hall's transformed t.

    Args:
        mean: Mean over prompts.
        error: Its standard error.
        skew: Skewness of the values, see `told_from_none`.
        num_prompts: P.
        t: Quantile of Student's t.
        upper_skew: Skewness that the upper end is computed with.
    """
    return mean - error * bent(t, skew, num_prompts), mean - error * bent(-t, upper_skew, num_prompts)


def wilson_ends(share: float, effective: float, t: float) -> Ends:
    """Wilson's score interval of a share at an effective number of prompts."""
    centre = (share + t**2 / (2 * effective)) / (1 + t**2 / effective)
    half = math.sqrt(t**2 * share * (1 - share) / effective + (t**2 / (2 * effective)) ** 2) / (1 + t**2 / effective)
    return max(0.0, centre - half), min(1.0, centre + half)


def unseen_ends(value: float, bounds: Ends, num_prompts: int, confidence: float) -> Ends:
    """What P equal values leave possible for the mean of values within bounds (the "rule of three").

    Prompts of another kind may make up a share of 1 − (α/2)^(1/P) and all be missing from the sample with a chance
    of α/2; at worst they lie at an end of the range. Without bounds nothing can be said: the whole line.
    """
    unseen = 1 - (0.5 - confidence / 2) ** (1 / num_prompts)
    low, high = bounds
    return (
        low if math.isinf(low) else value + unseen * (low - value),
        high if math.isinf(high) else value + unseen * (high - value),
    )


def unseen_p_value(value: float, bounds: Ends, num_prompts: int) -> float:
    """Two-sided p-value of a mean of zero when P values all equal `value`; agrees with `unseen_ends`."""
    far = bounds[0] if value > 0 else bounds[1]
    if value == 0 or math.isinf(far):
        return 1.0
    return min(1.0, 2 * (-far / (value - far)) ** num_prompts)


def widest(first: Ends, *others: Ends) -> Ends:
    """The lowest lower end and the highest upper end."""
    intervals = (first, *others)
    return min(low for low, _ in intervals), max(high for _, high in intervals)


def within(ends: Ends, bounds: Ends) -> Ends:
    """The interval without what lies outside the bounds."""
    return max(ends[0], bounds[0]), min(ends[1], bounds[1])
