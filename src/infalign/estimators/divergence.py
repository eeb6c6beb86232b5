"""How far a policy is from the reference: sequence KL, and the part of it that moved reward ranks (M11)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from infalign.errors import InputError
from infalign.estimators.clustered import Estimate, FloatArray, checked, checked_pair, mean_estimate
from infalign.estimators.intervals import UNBOUNDED, t_quantile
from infalign.estimators.subsets import merged_ranks

LEAST_KL = 0.01  # nats; what a policy can gain below this is within the noise of any evaluation of ordinary size


@dataclass(frozen=True, eq=False)
class KLEfficiency:
    """How much of the divergence moved reward ranks, at least (M11).

    Attributes:
        useful_kl: KL(f̂ ‖ uniform) in nats; f̂ is the density of calibrated rewards pooled over prompts.
        kl: The sequence-level KL it is compared with, in nats.
        efficiency: `useful_kl` / `kl`, from 0 to 1 up to sampling error. Pooling, binning and the noise of few
            references make it err low.
        standard_error: Of `efficiency`; takes in the error of `kl` if that was given as an estimate. It does not say
            how far the efficiency itself may be above.
        at_least: Lower end of a one-sided interval at the confidence of `useful_kl`: what can be claimed.
    """

    useful_kl: Estimate
    kl: float
    efficiency: float
    standard_error: float
    at_least: float


def sequence_kl(log_ratios_PG: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Sequence-level KL in nats, averaged over prompts, with its clustered error.

    Args:
        log_ratios_PG: (P, G) for responses drawn from the policy, log π(y|x) − log p(y|x) summed over the whole
            response, end token included. Or, for less variance and the same mean, the sum over visited prefixes of the
            exact per-token KL. For the opposite direction KL(p‖π): responses of the reference, log p − log π.
        confidence: Level of the interval.

    Returns:
        The estimate. It is not clipped: from log ratios a value below zero can occur by chance near zero. KLs of
        prompts have a long upper tail, which the upper end allows for. If every log ratio is exactly 0 the policy gave
        every response the reference's probability to the last bit: KL and interval are then 0, by identity.

    Raises:
        InputError: If a log ratio is not finite.
    """
    log_ratios_PG = checked(log_ratios_PG, "log_ratios_PG", axes="PG", finite=True)
    bounds = UNBOUNDED if log_ratios_PG.any() else (0.0, 0.0)
    return mean_estimate(log_ratios_PG.mean(axis=1), confidence=confidence, bounds=bounds, long_tail=True)


def moved(kl: float, low: float | None) -> bool:
    """Whether a policy can be told from the reference: the one rule behind every ratio to a KL or to a gain.

    A policy has not moved if the interval of its KL includes 0, or if its KL is below `LEAST_KL`. What is divided by
    such a KL, or by the gain to be had at it, is noise.

    Args:
        kl: Sequence KL in nats.
        low: Lower end of its interval; None or −∞ where there is none.
    """
    return low is not None and low > 0 and kl >= LEAST_KL


def useful_kl(rewards_PG: ArrayLike, ref_rewards_PK: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """KL in nats between the reward ranks of the policy and those of the reference, pooled over prompts (M11).

    By data processing it is at most the sequence-level KL. A response tied with reference responses is spread
    evenly over the ranks it could have, which keeps the reference exactly uniform however many ties there are.

    The estimate is the plug-in value of a histogram less its first-order bias ½ Σ Var(f̂_b)/f_b, with variances
    taken between prompts. Pooling prompts, binning, and the noise of ranks among K references lose information, so it
    errs to the low side of the mean over prompts of KL(f ‖ uniform). Hence the interval is one-sided: a lower bound.

    Args:
        rewards_PG: (P, G) rewards of policy responses.
        ref_rewards_PK: (P, K) rewards of reference responses to the same prompts.
        confidence: Level of the interval.

    Raises:
        InputError: As `win_rate`.
    """
    rewards_PG, ref_rewards_PK = checked_pair(rewards_PG, ref_rewards_PK)
    below_PG, upto_PG = merged_ranks(np.sort(rewards_PG, axis=1), np.sort(ref_rewards_PK, axis=1))
    cells = ref_rewards_PK.shape[1] + 1
    return _kl_from_uniform(below_PG / cells, (upto_PG + 1) / cells, confidence)


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
        confidence: Level of the lower bounds.

    Raises:
        InputError: If a value lies outside [0, 1] or `kl` is not positive.
    """
    calibrated_PG = checked(calibrated_rewards_PG, "calibrated_rewards_PG", axes="PG", finite=True)
    if calibrated_PG.min() < 0 or calibrated_PG.max() > 1:
        raise InputError(
            "calibrated rewards must lie in [0, 1]", where="calibrated_rewards_PG", hint="Calibrate them first"
        )
    if num_ref is None:
        low_PG = high_PG = calibrated_PG
    else:
        low_PG = calibrated_PG * num_ref / (num_ref + 1)
        high_PG = low_PG + 1 / (num_ref + 1)
    return efficiency_of(_kl_from_uniform(low_PG, high_PG, confidence), kl)


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
    at_least = _lower_end(ratio, standard_error, useful.num_prompts, useful.confidence)
    return KLEfficiency(useful, kl_value, ratio, standard_error, at_least)


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
    mean = mean_estimate(influence_P - bias, confidence=confidence)
    low = _lower_end(mean.estimate, mean.standard_error, num_prompts, confidence)
    return replace(mean, confidence_interval=(low, math.inf))


def _lower_end(estimate: float, standard_error: float, num_prompts: int, confidence: float) -> float:
    """Lower end of a one-sided interval of what is not below 0."""
    if num_prompts == 1:
        return 0.0
    return max(0.0, estimate - t_quantile(num_prompts, 2 * confidence - 1) * standard_error)
