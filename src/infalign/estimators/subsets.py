"""Win rates and rewards of procedures from one set of samples per prompt (M10).

Every procedure with a finite n is estimated exactly: the expectation over *all* n-subsets is a weighted sum over ranks,
so nothing is resampled and every n up to the number of samples comes from the same pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infalign.errors import InputError
from infalign.estimators.clustered import Estimate, FloatArray, checked, checked_pair, mean_estimate, share_estimate
from infalign.procedures import InferenceProcedure

IntArray = NDArray[np.intp]
_Weigh = Callable[[FloatArray], FloatArray]


@dataclass(frozen=True, eq=False, repr=False)
class WinRate(Estimate):
    """Win rate of a procedure on the policy over one on the reference (M8, estimated by M10).

    The interval is Wilson's score interval with the effective number of prompts, W(1 − W)/SE², and Student's t quantile
    (Kott and Carr 1997, for clustered samples). Where values are clearly skewed, as near 0 and 1, the end on the side
    of their tail is that of Hall's transformed t if this is farther out. It lies within [0, 1] and is mirrored when
    the models are swapped. If all prompts have one value there is no spread to measure: the interval is then what so
    many equal values leave possible for others.
    """

    procedure: str


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
    rewards_PG, ref_rewards_PK = checked_pair(rewards_PG, ref_rewards_PK)
    if judged_by is None:
        weigh: _Weigh = _spread_over_sorted
        ref_weigh: _Weigh = _spread_over_sorted
        judge_PG, judge_ref_PK = np.sort(rewards_PG, axis=1), np.sort(ref_rewards_PK, axis=1)
    else:
        judge_PG, judge_ref_PK = checked_pair(*judged_by)
        if judge_PG.shape != rewards_PG.shape or judge_ref_PK.shape != ref_rewards_PK.shape:
            raise InputError(
                f"scores of shape {judge_PG.shape} and {judge_ref_PK.shape} for rewards of shape {rewards_PG.shape} "
                f"and {ref_rewards_PK.shape}",
                where="judged_by",
                hint="Score every response with both rewards",
            )
        weigh, judge_PG = _chosen_by(rewards_PG, judge_PG)
        ref_weigh, judge_ref_PK = _chosen_by(ref_rewards_PK, judge_ref_PK)
    below_PG, upto_PG = merged_ranks(judge_PG, judge_ref_PK)
    return [
        _win_rate_interval(
            _win_rate_per_prompt(below_PG, upto_PG, weigh, ref_weigh, ref_rewards_PK.shape[1], procedure, opponent),
            procedure,
            confidence,
        )
        for procedure in procedures
    ]


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
    sorted_PG = np.sort(checked(rewards_PG, "rewards_PG", axes="PG", finite=True), axis=1)
    per_prompt = np.zeros(sorted_PG.shape[0])
    for weight, component in procedure.components:
        per_prompt += weight * (sorted_PG @ component.selection_weights(sorted_PG.shape[1]))
    return mean_estimate(per_prompt, confidence=confidence)


def merged_ranks(sorted_PG: FloatArray, sorted_ref_PK: FloatArray) -> tuple[IntArray, IntArray]:
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


def _spread_over_sorted(weights_M: FloatArray) -> FloatArray:
    """Weights of responses that stand in the order by which they are chosen: the same (1, M) for all prompts."""
    return weights_M[None, :]


def _chosen_by(rewards_PM: FloatArray, judge_PM: FloatArray) -> tuple[_Weigh, FloatArray]:
    """Judge's scores in ascending order, and the map from selection weights by reward to weights in that order (P, M).

    Among equal rewards a procedure returns any one with equal chance, so tied responses share their weights.
    """
    by_judge_PM = np.argsort(judge_PM, axis=1, kind="stable")
    # Equal rewards occupy ranks below..upto; a response's share is the mean of the weights over them.
    below_PM, upto_PM = merged_ranks(np.sort(rewards_PM, axis=1), np.sort(rewards_PM, axis=1))
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


def _win_rate_interval(per_prompt: FloatArray, procedure: InferenceProcedure, confidence: float) -> WinRate:
    share = share_estimate(per_prompt, confidence=confidence)
    return WinRate(
        share.estimate,
        share.standard_error,
        share.confidence_interval,
        per_prompt,
        confidence,
        procedure.label,
        bounds=share.bounds,
    )
