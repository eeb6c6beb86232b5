"""Means over prompts with clustered errors, paired differences, and many comparisons at once.

Prompts are the independent unit throughout: a prompt's samples are first reduced to one number, and errors come from
the spread of those numbers (standard errors clustered by prompt).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtr, stdtrit  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

from infalign.errors import InputError
from infalign.wording import counted

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
    """

    estimate: float
    standard_error: float
    confidence_interval: tuple[float, float]
    per_prompt: FloatArray
    confidence: float

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
    """Paired difference of two estimates on the same prompts, with a two-sided t test of no difference."""

    p_value: float

    @property
    def resolved(self) -> bool:
        """Whether the interval excludes zero."""
        low, high = self.confidence_interval
        return low > 0 or high < 0


def mean_estimate(per_prompt: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Mean of one number per prompt with Student's t interval.

    With one prompt there is no spread to measure: the standard error is NaN and the interval the whole real line.

    Args:
        per_prompt: (P,) independent values.
        confidence: Level of the interval, between 0 and 1.

    Raises:
        InputError: If a value is not finite, or there is none.
    """
    values = checked(per_prompt, "per_prompt", axes="P")
    estimate, standard_error, margin = mean_and_margin(values, confidence)
    return Estimate(estimate, standard_error, (estimate - margin, estimate + margin), values, confidence)


def share_estimate(per_prompt: ArrayLike, *, confidence: float = 0.95, least_error: float = 0.0) -> Estimate:
    """Mean of one share in [0, 1] per prompt with Wilson's interval at the effective number of prompts; see `WinRate`.

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
    num_prompts = values.size
    estimate, standard_error, _ = mean_and_margin(values, confidence)
    standard_error = max(standard_error, least_error) if num_prompts > 1 else standard_error
    variance = estimate * (1 - estimate)
    if num_prompts == 1:
        interval = (0.0, 1.0)
    elif standard_error == 0 and variance > 1e-12:
        interval = (estimate, estimate)
    else:
        effective = num_prompts if standard_error == 0 else variance / standard_error**2
        t_squared = float(stdtrit(num_prompts - 1, 0.5 + confidence / 2)) ** 2
        centre = (estimate + t_squared / (2 * effective)) / (1 + t_squared / effective)
        half = math.sqrt(t_squared * variance / effective + (t_squared / (2 * effective)) ** 2) / (
            1 + t_squared / effective
        )
        interval = (max(0.0, centre - half), min(1.0, centre + half))
    return Estimate(estimate, standard_error, interval, values, confidence)


def paired_difference(a: Estimate, b: Estimate, *, confidence: float | None = None) -> Difference:
    """Difference a − b of two estimates on the same prompts, in the same order.

    Pairing removes what the prompts, and reference samples if they are shared, have in common.

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
    return difference_estimate(differences, confidence=a.confidence if confidence is None else confidence)


def difference_estimate(differences: ArrayLike, *, confidence: float = 0.95) -> Difference:
    """Mean of per-prompt differences with Student's t interval and a two-sided t test of zero.

    Args:
        differences: (P,) one difference per prompt.
        confidence: Level of the interval.

    Raises:
        InputError: If a value is not finite, or there is none.
    """
    mean = mean_estimate(differences, confidence=confidence)
    if mean.num_prompts == 1:
        p_value = 1.0
    elif mean.standard_error == 0:
        p_value = float(mean.estimate == 0)
    else:
        p_value = 2 * float(stdtr(mean.num_prompts - 1, -abs(mean.estimate) / mean.standard_error))
    return Difference(
        mean.estimate, mean.standard_error, mean.confidence_interval, mean.per_prompt, confidence, p_value
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


def mean_and_margin(values: FloatArray, confidence: float) -> tuple[float, float, float]:
    """Mean, standard error, and half width of the t interval of independent values."""
    if not 0 < confidence < 1:
        raise InputError(f"the confidence level must lie between 0 and 1, not {confidence}", where="confidence")
    mean = float(values.mean())
    if values.size == 1:
        return mean, math.nan, math.inf
    # The spread of equal values is zero; rounding in their mean must not turn it into a resolved 1e-17.
    spread = 0.0 if np.ptp(values) <= 1e-14 * float(np.abs(values).max()) else float(values.std(ddof=1))
    standard_error = spread / math.sqrt(values.size)
    return mean, standard_error, float(stdtrit(values.size - 1, 0.5 + confidence / 2)) * standard_error


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
