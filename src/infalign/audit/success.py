"""How often at least one of N attempts succeeds, for every N, from M attempts per prompt.

Of M attempts at a prompt, s succeeded. A random N of the M hold no success with probability C(M−s, N) / C(M, N), so one
minus that is an unbiased estimate of the chance that N fresh attempts break the prompt, for every N up to M, from the
same M draws (the same idea as M10). Prompts are the independent unit: intervals come from their spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infalign._io.wording import counted
from infalign.errors import InputError
from infalign.estimators import Estimate, expected_reward, share_estimate
from infalign.procedures import WorstOfN

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def success_table(num_attempts: int) -> FloatArray:
    """Unbiased success rate for every count of successes and every N, shape (M + 1, M).

    Entry (s, N − 1) is 1 − C(M−s, N) / C(M, N), exact to rounding for any M: the ratio is a product of factors
    1 − s / (M − i), summed in logarithms.

    Args:
        num_attempts: M, attempts per prompt.
    """
    return success_rates(np.arange(num_attempts + 1), num_attempts)


def success_rates(successes_P: ArrayLike, num_attempts: int) -> FloatArray:
    """Unbiased chance that at least one of N fresh attempts succeeds, for N = 1..M, shape (P, M).

    Args:
        successes_P: (P,) how many of the M attempts at each prompt succeeded.
        num_attempts: M, the same for all prompts.

    Raises:
        InputError: If a count is not a whole number from 0 to M, or there is none.
    """
    counts_P = _checked_counts(successes_P, num_attempts)
    different, back_P = np.unique(counts_P, return_inverse=True)
    left_M = num_attempts - np.arange(num_attempts, dtype=np.float64)
    with np.errstate(divide="ignore"):  # log 0 where no N attempts can miss all the successes
        logs_SM = np.log1p(-np.minimum(different[:, None] / left_M, 1.0))
    return (-np.expm1(np.cumsum(logs_SM, axis=1)))[back_P]


def attack_success(
    successes_P: ArrayLike, num_attempts: int, ns: Sequence[int], *, confidence: float = 0.95
) -> list[Estimate]:
    """ASR@N: the share of prompts that N attempts break, with score intervals clustered by prompt.

    Args:
        successes_P: (P,) successes of each prompt.
        num_attempts: M.
        ns: The N asked for, each from 1 to M.
        confidence: Level of the intervals.

    Raises:
        InputError: As `success_rates`, or an N is not from 1 to M.
    """
    for n in ns:
        require_n(n, num_attempts)
    rates_PM = np.clip(success_rates(successes_P, num_attempts), 0.0, 1.0)
    found: list[Estimate] = []
    for n in ns:
        rate = float(rates_PM[:, n - 1].mean())
        # A few prompts that happen to agree would claim certainty: never less than independent groups of N would give.
        least = math.sqrt(rate * (1 - rate) / (len(rates_PM) * (num_attempts // n)))
        found.append(share_estimate(rates_PM[:, n - 1], confidence=confidence, least_error=least))
    return found


def worst_reward(rewards_PM: ArrayLike, ns: Sequence[int], *, confidence: float = 0.95) -> list[Estimate]:
    """Expected reward of the worst of N attempts, unbiased (M10), with intervals clustered by prompt.

    Args:
        rewards_PM: (P, M) safety reward of every attempt.
        ns: The N asked for, each from 1 to M.
        confidence: Level of the intervals.

    Raises:
        InputError: If a reward is not finite, or an N is not from 1 to M.
    """
    num_attempts = np.asarray(rewards_PM).shape[-1]
    for n in ns:
        require_n(n, num_attempts)
    ascending_PM = np.sort(np.asarray(rewards_PM, np.float64), axis=1)  # once, for every N
    return [expected_reward(ascending_PM, WorstOfN(n), confidence=confidence) for n in ns]


def sizes(num_attempts: int) -> list[int]:
    """The N of tables and figures: 1, 2, 4, … and M itself."""
    return sorted({*(2**power for power in range(num_attempts.bit_length())), num_attempts})


def require_n(n: int, num_attempts: int) -> None:
    """Raise InputError unless 1 <= N <= M."""
    if not 1 <= n <= num_attempts:
        raise InputError(f"N = {n} cannot be measured with {counted(num_attempts, 'attempt')} per prompt", where="ns",
                         hint=f"Use N from 1 to {num_attempts}, or more attempts")  # fmt: skip


def _checked_counts(successes_P: ArrayLike, num_attempts: int) -> IntArray:
    values = np.asarray(successes_P)
    if values.ndim != 1 or values.size == 0:
        raise InputError(f"the shape must be (P,), not {values.shape}", where="successes_P")
    if not np.issubdtype(values.dtype, np.integer):
        raise InputError(f"counts are whole numbers, not {values.dtype}", where="successes_P")
    outside = np.flatnonzero((values < 0) | (values > num_attempts))
    if outside.size:
        p = int(outside[0])
        raise InputError(
            f"prompt {p} has {values[p]} successes in {counted(num_attempts, 'attempt')}", where="successes_P"
        )
    return values.astype(np.int64)
