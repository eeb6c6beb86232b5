"""Training inside a mixture with the reference (M19): only a share of what is used comes from the trained model.

The policy in use is m = (1 − ε) p + ε q: p the reference, q the model that is trained, ε the mixture weight. With the
log-ratio ℓ = log q − log p the gradient of the objective with respect to q is q's own policy gradient, with the reward
of m and the *softened* log-ratio log(m/p) = log(1 − ε + ε e^ℓ) in place of ℓ: its slope is 0 far below ℓ = −log ε and 1
far above. So q is free to leave the reference wherever m hardly notices.

The transform that suits the inside of a mixture is the identity, that is calibrated RLHF. Its best mixture has the
density max(1 − ε, exp(u/β − c)): flat at the bottom and rising at the top, nearly the shape of the optimum for
Best-of-N. At half a nat and the weight of `ideal_weight` it wins 0.965 for Best-of-16, where the optimum wins 0.972 and
identity alone 0.805. Its reward is spread over all rollouts, where a sharp transform's lies on one or two of a step.

Everything about m is estimated from q's rollouts alone.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize

from infalign.errors import InputError
from infalign.theory.optimal import OptimalTransform
from infalign.transforms import RewardTransform

Float = NDArray[np.float64]

CELLS = 4096
_SHARPEST = 1e-4  # β over the range of Φ: a sharper tilt would put all mass into a few cells
_optimize = cast(Any, optimize)

LARGEST_IDEAL_WEIGHT = 0.8
"""Above it the optimum is hardly a mixture with the reference, as for Worst-of-N: training inside one gains nothing."""


def check_weight(weight: float, where: str = "mixture weight") -> float:
    """The weight as a float.

    Raises:
        InputError: If it is not in (0, 1].
    """
    if not (math.isfinite(weight) and 0 < weight <= 1):
        raise InputError(f"{weight} is not a share above 0 and at most 1", where=where, hint="Try 0.25")
    return float(weight)


def ideal_weight(optimum: OptimalTransform) -> float:
    """The share of the ideal optimum (M9) that is not the reference: 1 − min f, with f its density over ranks.

    The optimal density never falls below its value at rank 0, so that f = (1 − ε) + ε·(something that is nowhere
    negative) for every ε from this one on. For Best-of-16 at half a nat it is 0.23; for Worst-of-N it is nearly 1.
    """
    return 1.0 - float(optimum.tilt.density(0.0))


def best_mixture(transform: RewardTransform, beta: float, weight: float) -> Float:
    """Density over ranks of the best mixture for a fixed transform, max(1 − ε, exp(Φ/β − c)), at `CELLS` midpoints.

    Args:
        transform: Φ.
        beta: KL coefficient, in units of Φ per nat.
        weight: ε.
    """
    tilt = transform((np.arange(CELLS) + 0.5) / CELLS) / beta
    floor = 0.0 if weight == 1.0 else 1.0 - weight
    return np.maximum(floor, np.exp(tilt - mixture_log_partition(tilt, weight)))


def beta_in_mixture(transform: RewardTransform, weight: float, kl: float) -> float:
    """The β at which the best mixture for a fixed transform has a KL.

    Args:
        transform: Φ.
        weight: ε.
        kl: Of the mixture, in nats.

    Raises:
        InputError: If a mixture of this weight cannot have that KL; says what it can have.
    """
    scale = float(transform(1.0)) - float(transform(0.5 / CELLS))

    def gap(log_beta: float) -> float:
        density = best_mixture(transform, math.exp(log_beta), weight)
        return float((density * np.log(np.maximum(density, 1e-300))).mean()) - kl

    low, high = math.log(scale * _SHARPEST), math.log(scale * 100.0)
    if gap(low) < 0:
        raise InputError(
            f"a mixture with {weight:.3g} of a trained model cannot spend {kl:g} nats, only about {gap(low) + kl:.3g}",
            where="training.mixture",
            hint="Give a larger weight, or a smaller KL",
        )
    return math.exp(float(_optimize.brentq(gap, low, high, xtol=1e-6)))


def softened_log_ratio(log_ratios: ArrayLike, weight: float) -> Float:
    """The log-ratio of the mixture, log(1 − ε + ε e^ℓ), any shape, in nats.

    Args:
        log_ratios: ℓ = log q(y|x) − log p(y|x) of whole responses.
        weight: ε, the share of the mixture that q has.
    """
    log_ratios = np.asarray(log_ratios, dtype=np.float64)
    if weight == 1.0:
        return log_ratios
    return np.logaddexp(math.log1p(-weight), math.log(weight) + log_ratios)


def mixture_kl(log_ratios: ArrayLike, weight: float) -> Float:
    """Terms whose mean over rollouts of q is KL(m‖p), any shape, in nats.

    KL(m‖p) = (1 − ε) E_p[log(m/p)] + ε E_q[log(m/p)]. The first expectation is turned into one over q after its
    constant log(1 − ε) is taken out: E_p[log(1 + r e^ℓ)] = E_q[e^−ℓ log(1 + r e^ℓ)] with r = ε / (1 − ε). These terms
    lie between 0 and r, so that the importance weights e^−ℓ do no harm.

    Args:
        log_ratios: ℓ of rollouts of q.
        weight: ε.
    """
    log_ratios = np.asarray(log_ratios, dtype=np.float64)
    if weight == 1.0:
        return log_ratios
    log_r = math.log(weight) - math.log1p(-weight)
    scaled = log_ratios + log_r  # log(r e^ℓ)
    # e^−ℓ log(1 + r e^ℓ) = r · log1p(x)/x at x = r e^ℓ; for tiny x the ratio is 1.
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        ratio = np.where(scaled < -30, 1.0, np.logaddexp(0.0, scaled) * np.exp(-scaled))
    from_reference = math.log1p(-weight) + math.exp(log_r) * ratio
    return (1 - weight) * from_reference + weight * softened_log_ratio(log_ratios, weight)


def mixture_log_partition(tilt_by_rank: Float, weight: float) -> float:
    """Log Z of the best mixture for a tilt: the c with E_p max(1 − ε, exp(tilt − c)) = 1, in nats.

    At the optimum m/p is exp(tilt − c) where that exceeds 1 − ε; elsewhere q has no mass, and m/p is 1 − ε. With ε = 1
    this is log E_p exp(tilt), the log-partition of M6.

    Args:
        tilt_by_rank: Φ_K(b)/β in nats for the equally likely ranks b = 0..K, shape (K + 1,).
        weight: ε.
    """
    descending = np.sort(np.asarray(tilt_by_rank, dtype=np.float64))[::-1]
    count = len(descending)
    if weight == 1.0:
        return float(np.logaddexp.reduce(descending) - math.log(count))
    # With the best j ranks above the floor: c_j = log Σ_{best j} exp(tilt) − log(count − (count − j)(1 − ε)).
    j = np.arange(1, count + 1)
    candidates = np.logaddexp.accumulate(descending) - np.log(count - (count - j) * (1 - weight))
    # The right j is the largest whose own j-th rank still lies above the floor.
    above = descending - candidates >= math.log1p(-weight) - 1e-12
    return float(candidates[np.flatnonzero(above)[-1]])
