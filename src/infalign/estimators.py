"""Unbiased estimates, with honest errors, of what an aligned policy achieves (M10, M11).

Everything here is a function of arrays. Prompts are the independent unit throughout: a prompt's samples are first
reduced to one number, and errors come from the spread of those numbers (standard errors clustered by prompt).

Every procedure with a finite n is estimated exactly from one set of samples: the expectation over *all* n-subsets is a
weighted sum over ranks (M10), so nothing is resampled and every n up to the number of samples comes from the same pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtr, stdtrit  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

from infalign.errors import InputError
from infalign.procedures import InferenceProcedure

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.intp]
_Weigh = Callable[[FloatArray], FloatArray]


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
            f"{self.confidence:.0%} interval {low:.4f} to {high:.4f}, {self.num_prompts} prompts)"
        )


@dataclass(frozen=True, eq=False, repr=False)
class WinRate(Estimate):
    """Win rate of a procedure on the policy over one on the reference (M8, estimated by M10).

    The interval is Wilson's score interval with the effective number of prompts, W(1 − W)/SE², and Student's t quantile
    (Kott and Carr 1997, for clustered samples). It lies within [0, 1], is mirrored when the models are swapped, and
    keeps its level nearer the ends than W ± t·SE. If every prompt is won, or every prompt lost, there is no spread to
    measure: the effective number is then the number of prompts, the least it can be.
    """

    procedure: str


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
    values = _checked(per_prompt, "per_prompt", axes="P")
    estimate, standard_error, margin = _mean_and_margin(values, confidence)
    return Estimate(estimate, standard_error, (estimate - margin, estimate + margin), values, confidence)


def share_estimate(per_prompt: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Mean of one share in [0, 1] per prompt with Wilson's interval at the effective number of prompts; see `WinRate`.

    With one prompt the standard error is NaN and the interval [0, 1].

    Args:
        per_prompt: (P,) independent shares.
        confidence: Level of the interval, between 0 and 1.

    Raises:
        InputError: If a share is not finite or lies outside [0, 1], or there is none.
    """
    values = _checked(per_prompt, "per_prompt", axes="P")
    if values.min() < 0 or values.max() > 1:
        raise InputError("shares must lie in [0, 1]", where="per_prompt")
    num_prompts = values.size
    estimate, standard_error, _ = _mean_and_margin(values, confidence)
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


def win_rate(
    rewards_PG: ArrayLike,
    ref_rewards_PK: ArrayLike,
    procedure: InferenceProcedure,
    *,
    opponent: InferenceProcedure | None = None,
    confidence: float = 0.95,
) -> WinRate:
    """Unbiased inference-time win rate of the policy over the reference (M10), ties counted ½.

    Args:
        rewards_PG: (P, G) rewards of G fresh policy responses for each prompt; any real scale, only order matters.
        ref_rewards_PK: (P, K) rewards of K fresh reference responses to the same prompts.
        procedure: What is run on the policy; its n must be finite and at most G.
        opponent: What is run on the reference (n at most K); the same procedure if None.
        confidence: Level of the interval, between 0 and 1.

    Returns:
        The win rate, its error clustered by prompt, and one unbiased value per prompt. With one prompt the standard
        error is NaN and the interval [0, 1].

    Raises:
        InputError: If a reward is NaN, the prompts differ in number, or there are fewer samples than n.
    """
    return win_rates(rewards_PG, ref_rewards_PK, [procedure], opponent=opponent, confidence=confidence)[0]


def win_rates(
    rewards_PG: ArrayLike,
    ref_rewards_PK: ArrayLike,
    procedures: Sequence[InferenceProcedure],
    *,
    opponent: InferenceProcedure | None = None,
    judged_by: tuple[ArrayLike, ArrayLike] | None = None,
    confidence: float = 0.95,
) -> list[WinRate]:
    """`win_rate` for several procedures in one pass over the same samples; rewards are sorted and merged once.

    Args:
        rewards_PG: (P, G) rewards of the policy's responses, by which procedures choose.
        ref_rewards_PK: (P, K) rewards of the reference's responses.
        procedures: Procedures, each with finite n at most G.
        opponent: What is run on the reference; for each procedure the same one if None.
        judged_by: (P, G) and (P, K) scores of the same responses by another reward, for example one that training never
            saw: procedures choose by the first, and what they return is compared by the second. None compares by the
            first as well.
        confidence: Level of the intervals, between 0 and 1.

    Returns:
        One win rate for each procedure, in order.

    Raises:
        InputError: As `win_rate`, or if the judge's scores do not have the shape of the rewards.
    """
    rewards_PG, ref_rewards_PK = _checked_pair(rewards_PG, ref_rewards_PK)
    if judged_by is None:
        weigh: _Weigh = _spread_over_sorted
        ref_weigh: _Weigh = _spread_over_sorted
        judge_PG, judge_ref_PK = np.sort(rewards_PG, axis=1), np.sort(ref_rewards_PK, axis=1)
    else:
        judge_PG, judge_ref_PK = _checked_pair(*judged_by)
        if judge_PG.shape != rewards_PG.shape or judge_ref_PK.shape != ref_rewards_PK.shape:
            raise InputError(
                f"scores of shape {judge_PG.shape} and {judge_ref_PK.shape} for rewards of shape {rewards_PG.shape} "
                f"and {ref_rewards_PK.shape}",
                where="judged_by",
                mend="Score every response with both rewards",
            )
        weigh, judge_PG = _chosen_by(rewards_PG, judge_PG)
        ref_weigh, judge_ref_PK = _chosen_by(ref_rewards_PK, judge_ref_PK)
    below_PG, upto_PG = _merged_ranks(judge_PG, judge_ref_PK)
    return [
        _win_rate_interval(
            _win_rate_per_prompt(below_PG, upto_PG, weigh, ref_weigh, ref_rewards_PK.shape[1], procedure, opponent),
            procedure,
            confidence,
        )
        for procedure in procedures
    ]


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
            mend="Evaluate both on the same list of prompts, in the same order",
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


def expected_reward(rewards_PG: ArrayLike, procedure: InferenceProcedure, *, confidence: float = 0.95) -> Estimate:
    """Unbiased expected reward of the response that a procedure returns.

    Unlike a win rate it depends on the reward's scale; prompts weigh equally.

    Args:
        rewards_PG: (P, G) rewards of G responses for each prompt.
        procedure: Procedure with finite n at most G.
        confidence: Level of the interval.

    Raises:
        InputError: If a reward is not finite or G < n.
    """
    sorted_PG = np.sort(_checked(rewards_PG, "rewards_PG", axes="PG", finite=True), axis=1)
    per_prompt = np.zeros(sorted_PG.shape[0])
    for weight, component in procedure.components:
        per_prompt += weight * (sorted_PG @ component.selection_weights(sorted_PG.shape[1]))
    return mean_estimate(per_prompt, confidence=confidence)


def sequence_kl(log_ratios_PG: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Sequence-level KL in nats, averaged over prompts, with its clustered error.

    Args:
        log_ratios_PG: (P, G) for responses drawn from the policy, log π(y|x) − log p(y|x) summed over the whole
            response, end token included. Or, for less variance and the same mean, the sum over visited prefixes of the
            exact per-token KL. For the opposite direction KL(p‖π): responses of the reference, log p − log π.
        confidence: Level of the interval.

    Returns:
        The estimate. It is not clipped: from log ratios a value below zero can occur by chance near zero.

    Raises:
        InputError: If a log ratio is not finite.
    """
    return mean_estimate(
        _checked(log_ratios_PG, "log_ratios_PG", axes="PG", finite=True).mean(axis=1), confidence=confidence
    )


@dataclass(frozen=True, eq=False)
class KLEfficiency:
    """How much of the divergence moved reward ranks (M11).

    Attributes:
        useful_kl: KL(f̂ ‖ uniform) in nats; f̂ is the density of calibrated rewards pooled over prompts.
        kl: The sequence-level KL it is compared with, in nats.
        efficiency: `useful_kl` / `kl`, from 0 to 1 up to sampling error.
        standard_error: Of the efficiency; takes in the error of `kl` if that was given as an estimate.
    """

    useful_kl: Estimate
    kl: float
    efficiency: float
    standard_error: float


def kl_efficiency(
    calibrated_rewards_PG: ArrayLike, kl: Estimate | float, *, num_ref: int | None = None, confidence: float = 0.95
) -> KLEfficiency:
    """Share of the KL that moved calibrated rewards away from uniform (M11).

    Valid where calibrated rewards of the reference are uniform, that is without ties (M4). With ties use `useful_kl`,
    which needs the rewards themselves.

    Args:
        calibrated_rewards_PG: (P, G) calibrated rewards of policy responses, in [0, 1].
        kl: Sequence-level KL in nats, positive; an estimate on the same prompts gives the ratio a joint error.
        num_ref: Number K of reference rollouts behind each calibrated reward, so that its grid of K + 1 values is
            spread evenly over [0, 1]; None treats values as exact.
        confidence: Level of the interval of the useful KL.

    Raises:
        InputError: If a value lies outside [0, 1] or `kl` is not positive.
    """
    calibrated_PG = _checked(calibrated_rewards_PG, "calibrated_rewards_PG", axes="PG", finite=True)
    if calibrated_PG.min() < 0 or calibrated_PG.max() > 1:
        raise InputError(
            "calibrated rewards must lie in [0, 1]", where="calibrated_rewards_PG", mend="Calibrate them first"
        )
    if num_ref is None:
        low_PG = high_PG = calibrated_PG
    else:
        low_PG = calibrated_PG * num_ref / (num_ref + 1)
        high_PG = low_PG + 1 / (num_ref + 1)
    return efficiency_of(_kl_from_uniform(low_PG, high_PG, confidence), kl)


def useful_kl(rewards_PG: ArrayLike, ref_rewards_PK: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """KL in nats between the reward ranks of the policy and those of the reference, pooled over prompts (M11).

    By data processing it is at most the sequence-level KL. A response tied with reference responses is spread
    evenly over the ranks it could have, which keeps the reference exactly uniform however many ties there are.

    The estimate is the plug-in value of a histogram less its first-order bias ½ Σ Var(f̂_b)/f_b, with variances
    taken between prompts. Pooling and binning lose information, so it errs to the low side.

    Args:
        rewards_PG: (P, G) rewards of policy responses.
        ref_rewards_PK: (P, K) rewards of reference responses to the same prompts.
        confidence: Level of the interval.

    Raises:
        InputError: As `win_rate`.
    """
    rewards_PG, ref_rewards_PK = _checked_pair(rewards_PG, ref_rewards_PK)
    below_PG, upto_PG = _merged_ranks(np.sort(rewards_PG, axis=1), np.sort(ref_rewards_PK, axis=1))
    cells = ref_rewards_PK.shape[1] + 1
    return _kl_from_uniform(below_PG / cells, (upto_PG + 1) / cells, confidence)


def efficiency_of(useful: Estimate, kl: Estimate | float) -> KLEfficiency:
    """Ratio of the useful KL to the KL with a first-order error; joint if both are estimates on the same prompts.

    Args:
        useful: The useful KL.
        kl: Sequence-level KL in nats, positive.

    Raises:
        InputError: If `kl` is not positive.
    """
    kl_value = kl.estimate if isinstance(kl, Estimate) else float(kl)
    if not kl_value > 0:
        raise InputError(f"KL efficiency needs a positive KL, not {kl_value}", where="kl")
    ratio = useful.estimate / kl_value
    if isinstance(kl, Estimate) and kl.num_prompts == useful.num_prompts:
        standard_error = mean_estimate((useful.per_prompt - ratio * kl.per_prompt) / kl_value).standard_error
    else:
        standard_error = useful.standard_error / kl_value
    return KLEfficiency(useful, kl_value, ratio, standard_error)


def _spread_over_sorted(weights_M: FloatArray) -> FloatArray:
    """Weights of responses that stand in the order by which they are chosen: the same (1, M) for all prompts."""
    return weights_M[None, :]


def _chosen_by(rewards_PM: FloatArray, judge_PM: FloatArray) -> tuple[_Weigh, FloatArray]:
    """Judge's scores in ascending order, and the map from selection weights by reward to weights in that order (P, M).

    Among equal rewards a procedure returns any one with equal chance, so tied responses share their weights.
    """
    by_judge_PM = np.argsort(judge_PM, axis=1, kind="stable")
    # Equal rewards occupy ranks below..upto; a response's share is the mean of the weights over them.
    below_PM, upto_PM = _merged_ranks(np.sort(rewards_PM, axis=1), np.sort(rewards_PM, axis=1))
    place_PM = np.argsort(np.argsort(rewards_PM, axis=1, kind="stable"), axis=1, kind="stable")
    place_PM = np.take_along_axis(place_PM, by_judge_PM, axis=1)
    below_PM = np.take_along_axis(below_PM, place_PM, axis=1)
    upto_PM = np.take_along_axis(upto_PM, place_PM, axis=1)

    def weigh(weights_M: FloatArray) -> FloatArray:
        cumulative = np.concatenate(([0.0], np.cumsum(weights_M)))
        return (cumulative[upto_PM] - cumulative[below_PM]) / (upto_PM - below_PM)

    return weigh, np.take_along_axis(judge_PM, by_judge_PM, axis=1)


def _win_rate_per_prompt(
    below_PG: IntArray,
    upto_PG: IntArray,
    weigh: _Weigh,
    ref_weigh: _Weigh,
    num_ref: int,
    procedure: InferenceProcedure,
    opponent: InferenceProcedure | None,
) -> FloatArray:
    """M10 for each prompt; a mixture is a mixture of objectives, so its components play separately."""
    num_prompts, num_policy = below_PG.shape
    per_prompt = np.zeros(num_prompts)
    for weight, component in procedure.components:
        weights_PG = weigh(component.selection_weights(num_policy))
        rivals = ((1.0, component),) if opponent is None else opponent.components
        for rival_weight, rival in rivals:
            # Mass of the opponent's output on the lowest 0..K reference samples: beating below_PG of them wins all of
            # that mass, and a tie up to upto_PG shares what lies between.
            mass_PK = np.cumsum(ref_weigh(rival.selection_weights(num_ref)), axis=1)
            mass_PK1 = np.pad(mass_PK, ((0, 0), (1, 0)))
            if len(mass_PK1) == 1:
                share_PG = 0.5 * (mass_PK1[0][below_PG] + mass_PK1[0][upto_PG])
            else:
                sure_PG = np.take_along_axis(mass_PK1, below_PG, axis=1)
                share_PG = 0.5 * (sure_PG + np.take_along_axis(mass_PK1, upto_PG, axis=1))
            per_prompt += (
                weight * rival_weight * np.einsum("pg,pg->p", share_PG, np.broadcast_to(weights_PG, share_PG.shape))
            )
    return np.clip(per_prompt, 0.0, 1.0)  # rounding alone can leave the range


def _merged_ranks(sorted_PG: FloatArray, sorted_ref_PK: FloatArray) -> tuple[IntArray, IntArray]:
    """For each policy reward the number of reference rewards of its prompt below it, and below or equal."""
    num_policy, num_ref = sorted_PG.shape[1], sorted_ref_PK.shape[1]

    def ref_before(
        first: FloatArray, second: FloatArray, is_policy: Callable[[IntArray], NDArray[np.bool_]]
    ) -> IntArray:
        # A stable sort keeps `first` ahead of `second` among equals, and each side in its own order.
        order = np.argsort(np.concatenate((first, second), axis=1), axis=1, kind="stable")
        position_PG: IntArray = np.nonzero(is_policy(order))[1].reshape(-1, num_policy)
        return np.asarray(position_PG - np.arange(num_policy), dtype=np.intp)

    below_PG = ref_before(sorted_PG, sorted_ref_PK, lambda order: order < num_policy)
    upto_PG = ref_before(sorted_ref_PK, sorted_PG, lambda order: order >= num_ref)
    return below_PG, upto_PG


def _win_rate_interval(per_prompt: FloatArray, procedure: InferenceProcedure, confidence: float) -> WinRate:
    share = share_estimate(per_prompt, confidence=confidence)
    return WinRate(
        share.estimate, share.standard_error, share.confidence_interval, per_prompt, confidence, procedure.label
    )


def _mean_and_margin(values: FloatArray, confidence: float) -> tuple[float, float, float]:
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


def _kl_from_uniform(low_PG: FloatArray, high_PG: FloatArray, confidence: float) -> Estimate:
    """KL(f̂ ‖ uniform) for responses whose quantile lies somewhere in [low, high], each spread evenly over its cell."""
    num_prompts, num_policy = low_PG.shape
    num_bins = int(np.clip(math.ceil(2 * (num_prompts * num_policy) ** (1 / 3)), 8, 64))
    width_PG = np.maximum(high_PG - low_PG, 1e-12)
    cumulative_PB = np.zeros((num_prompts, num_bins + 1))
    cumulative_PB[:, -1] = 1.0
    for index in range(1, num_bins):
        cumulative_PB[:, index] = np.clip((index / num_bins - low_PG) / width_PG, 0.0, 1.0).mean(axis=1)
    share_PB = np.diff(cumulative_PB, axis=1)
    share_PB = share_PB[:, share_PB.any(axis=0)]  # empty bins add nothing to Σ f log f
    pooled_B = share_PB.mean(axis=0)
    influence_P = share_PB @ np.log(pooled_B * num_bins)
    if num_prompts > 1:
        variance_B = share_PB.var(axis=0, ddof=1) / num_prompts
    else:
        variance_B = pooled_B * (1 - pooled_B) / num_policy
    bias = 0.5 * float(np.sum(variance_B / pooled_B))
    return mean_estimate(influence_P - bias, confidence=confidence)


def _checked_pair(rewards_PG: ArrayLike, ref_rewards_PK: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Both reward arrays as checked matrices with one row for each prompt."""
    rewards = _checked(rewards_PG, "rewards_PG", axes="PG")
    ref_rewards = _checked(ref_rewards_PK, "ref_rewards_PK", axes="PK")
    if rewards.shape[0] != ref_rewards.shape[0]:
        raise InputError(
            f"policy rewards cover {rewards.shape[0]} prompts and reference rewards {ref_rewards.shape[0]}",
            where="rewards_PG, ref_rewards_PK",
            mend="Give one row for each prompt in both, in the same order",
        )
    return rewards, ref_rewards


def _checked(values: ArrayLike, name: str, *, axes: str, finite: bool = False) -> FloatArray:
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
            mend="Give one row for each prompt, also if there is only one",
        )
    bad = ~np.isfinite(array) if finite or len(axes) == 1 else np.isnan(array)
    if bad.any():
        first = np.argwhere(bad)[0]
        place = f"prompt {first[0]}" + (f", sample {first[1]}" if array.ndim == 2 else "")
        raise InputError(
            f"{int(bad.sum())} of {array.size} values are {'NaN' if np.isnan(array[bad]).all() else 'not finite'} "
            f"(first: {place}; {int(np.unique(np.argwhere(bad)[:, 0]).size)} prompts affected)",
            where=name,
            mend="Score those responses again or leave their prompts out on purpose; they are never averaged away",
        )
    return array
