"""Calibration from K reference rollouts instead of infinitely many: the rank-conditional tilt (M6) and what is lost.

A response with b of K reference rewards below its own has the unknown quantile U ~ Beta(b+1, K-b+1). Rewarding Φ(b/K)
tilts too much; rewarding Φ_K(b) = β log E[exp(Φ(U)/β) | b] keeps the normaliser exact.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from infalign.errors import InputError
from infalign.numerics import special
from infalign.numerics.quadrature import adapt, expit, mesh_with_knots
from infalign.procedures import whole_number
from infalign.theory.optimal import OptimalTransform
from infalign.theory.winrate import Objective
from infalign.transforms import Log, RewardTransform, check_is_transform, positive_beta, rounding

Array = npt.NDArray[np.float64]

_NEGLIGIBLE = 1e-17
"""Share of an integral that is left out at either end."""

_CHUNK = 4_000_000
"""Largest number of array entries held at once."""

_ROWS = 128
"""Ranks whose posteriors are integrated together, over the nodes that one of them needs."""

_MOST_SIMULATED = 5_000
"""Largest K that is simulated: with more, what is lost is far below the error of the simulation."""

_PIECE_NODES = 6
"""Gauss nodes between two neighbouring reference rewards: exact for Best-of-N up to N = 6, and pieces are short."""


def rank_conditional_tilt(transform: RewardTransform, beta: float, num_ref: int) -> Array:
    """M6: Φ_K(b) = β log E[exp(Φ(U)/β)] with U ~ Beta(b+1, K-b+1), for b = 0..K.

    The normaliser stays exact: the mean of exp(Φ_K(b)/β) over b is ∫ exp(Φ(u)/β) du.

    Args:
        transform: Φ.
        beta: KL coefficient, in units of Φ per nat.
        num_ref: K, the number of reference rewards a response is compared with.

    Returns:
        Shape (K + 1,), not decreasing, finite (for `Log` too).

    Raises:
        InputError: If beta is not positive or num_ref is less than 1.
    """
    check_is_transform(transform, "rank_conditional_tilt")
    beta = positive_beta(beta)
    num_ref = check_num_ref(num_ref)
    ranks = np.arange(num_ref + 1, dtype=np.float64)
    normalisers = special.betaln(ranks + 1.0, num_ref - ranks + 1.0)
    if isinstance(transform, Log):
        # E[U^(1/β)] is a ratio of Beta functions.
        return beta * (special.betaln(ranks + 1.0 + 1.0 / beta, num_ref - ranks + 1.0) - normalisers)
    # A posterior is about 2/sqrt(K) wide in the logit coordinate; the tilt may move and sharpen its peak.
    spacing = min(2.0, max(6.0 / math.sqrt(num_ref + 1.0 / beta), 0.005))
    top = float(transform(1.0)) / beta
    start = mesh_with_knots(transform.knots, spacing)
    mesh, _ = adapt(lambda mesh: np.exp(transform(mesh.u) / beta - top), start, rounding(top))
    with np.errstate(divide="ignore"):
        log_weights = np.log(mesh.weights).ravel() + transform(mesh.u).ravel() / beta - top
    log_u, log_v = np.log(expit(mesh.t)).ravel(), np.log(expit(-mesh.t)).ravel()
    rows = min(max(_CHUNK // log_u.size, 1), _ROWS)
    parts: list[Array] = []
    for first in range(0, num_ref + 1, rows):
        b = ranks[first : first + rows, None]
        # The integrands move to the right as b grows (their likelihood ratio is a power of u / (1 - u)): between where
        # the first begins and the last ends lies what the ones between them need.
        from_left, from_right = (log_weights + b[row, 0] * log_u + (num_ref - b[row, 0]) * log_v for row in (0, -1))
        low = int(np.searchsorted(np.cumsum(_normalised(from_left)), _NEGLIGIBLE))
        high = log_u.size - int(np.searchsorted(np.cumsum(_normalised(from_right)[::-1]), _NEGLIGIBLE))
        near = slice(low, high)
        parts.append(special.logsumexp(log_weights[near] + b * log_u[near] + (num_ref - b) * log_v[near], axis=1))
    return np.maximum.accumulate(beta * (np.concatenate(parts) - normalisers + top))


def _normalised(logs: Array) -> Array:
    weights = np.exp(logs - logs.max())
    return weights / weights.sum()


def tilt_at_ranks(
    tilt_by_rank: npt.ArrayLike, beta: float, ranks: npt.ArrayLike, ties: npt.ArrayLike | None = None
) -> Array:
    """Φ_K at midranks: what a response is rewarded that ties with reference rewards.

    A response that beats a references and ties with j of them has the ranks a..a+j with equal chance if ties are broken
    at random; its reward is β log of the mean of exp(Φ_K/β) over them, which keeps the normaliser of M6 exact. Without
    the number of ties, a half-integer midrank is taken as one tie, and a whole one as none.

    Args:
        tilt_by_rank: Φ_K(0..K), from `rank_conditional_tilt`.
        beta: KL coefficient it was made with.
        ranks: Midranks a + j/2, multiples of one half in [0, K], any shape.
        ties: j, the number of reference rewards equal to the response's, same shape; None to infer 0 or 1.

    Raises:
        InputError: If a midrank is out of range, not a multiple of one half, or does not fit its number of ties.
    """
    table = np.asarray(tilt_by_rank, dtype=np.float64)
    midranks = np.asarray(ranks, dtype=np.float64)
    doubled = np.rint(2.0 * midranks)
    if midranks.size and not (np.abs(doubled - 2.0 * midranks) < 1e-6).all():
        raise InputError("a midrank is not a multiple of one half", where="tilt_at_ranks")
    count = doubled % 2 if ties is None else np.asarray(ties, dtype=np.float64)
    first = (doubled - count) / 2
    last = first + count
    if midranks.size and not (first.min() >= 0 and last.max() < table.size and (first % 1 == 0).all()):
        raise InputError(f"a midrank does not fit 0..{table.size - 1} and its ties", where="tilt_at_ranks")
    top = table.max()
    sums = np.concatenate([[0.0], np.cumsum(np.exp((table - top) / positive_beta(beta)))])
    low, high = first.astype(np.intp), last.astype(np.intp)
    with np.errstate(divide="ignore"):
        blocks = top + beta * np.log((sums[high + 1] - sums[low]) / (count + 1.0))
    # A single rank needs no sum, and a block far below the top would lose its digits in one.
    pairs = beta * (np.logaddexp(table[low] / beta, table[high] / beta) - math.log(2.0))
    return np.where(count == 0, table[low], np.where(count == 1, pairs, np.clip(blocks, table[low], table[high])))


@dataclass(frozen=True)
class FiniteKPrediction:
    """What a policy reaches whose rewards were calibrated with K reference rollouts per prompt.

    Attributes:
        num_ref: K.
        beta: KL coefficient.
        kl: Expected KL(π‖p) over prompts, in nats.
        kl_standard_error: Its simulation error.
        win_rate: Expected win rate of the procedure.
        win_rate_standard_error: Its simulation error.
        win_rate_lost: What is missing to the win rate with infinitely many rollouts at the same KL.
        num_prompts: Prompts simulated.
    """

    num_ref: int
    beta: float
    kl: float
    kl_standard_error: float
    win_rate: float
    win_rate_standard_error: float
    win_rate_lost: float
    num_prompts: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def finite_k_prediction(
    optimum: OptimalTransform,
    num_ref: int,
    *,
    match_kl: bool = True,
    num_prompts: int | None = None,
    seed: int = 0,
) -> FiniteKPrediction:
    """The expected KL and win rate when the optimal transform is used with K reference rollouts per prompt.

    On one prompt the K reference quantiles are uniform, the response's reward Φ_K(b) (M6) depends on the rank b alone,
    and the policy is exp(Φ_K(b)/β) between neighbours. The expectation over the reference quantiles is simulated.

    Args:
        optimum: The optimal transform with infinitely many rollouts.
        num_ref: K.
        match_kl: Choose β anew so that the expected KL is the optimum's; otherwise keep the optimum's β.
        num_prompts: Prompts to simulate, at least 2; by default 200,000/(K+1), between 200 and 4,000.
        seed: Of the simulation.

    Raises:
        InputError: If K rollouts cannot spend that KL, or K is above 5,000, where the loss is too small.
    """
    num_ref = check_num_ref(num_ref)
    if num_ref > _MOST_SIMULATED:
        raise InputError(
            f"what {num_ref} rollouts lose is too little to be simulated",
            where="num_ref",
            hint=f"Ask for at most {_MOST_SIMULATED}; the loss falls about as 1/K",
        )
    if num_prompts is not None and whole_number(num_prompts, "num_prompts", "finite_k_prediction") < 2:
        raise InputError("one prompt shows no simulation error", where="num_prompts", hint="Use at least 2")
    prompts = num_prompts or int(np.clip(200_000 // (num_ref + 1), 200, 4000))
    gaps_PK = np.random.default_rng(seed).standard_exponential((prompts, num_ref + 1))
    gaps_PK /= gaps_PK.sum(axis=1, keepdims=True)
    beta = optimum.beta
    if match_kl:
        beta = _matched_beta(optimum, num_ref, gaps_PK)
    heights_PK = _heights(rank_conditional_tilt(optimum.transform, beta, num_ref) / beta, gaps_PK)
    kls = _kls(heights_PK, gaps_PK)
    win_rates = _win_rates(optimum.solution.objective, heights_PK, gaps_PK)
    win_rate = float(win_rates.mean())
    return FiniteKPrediction(
        num_ref=num_ref,
        beta=beta,
        kl=float(kls.mean()),
        kl_standard_error=float(kls.std(ddof=1)) / math.sqrt(prompts),
        win_rate=win_rate,
        win_rate_standard_error=float(win_rates.std(ddof=1)) / math.sqrt(prompts),
        win_rate_lost=optimum.win_rate - win_rate,
        num_prompts=prompts,
    )


def _matched_beta(optimum: OptimalTransform, num_ref: int, gaps_PK: Array) -> float:
    """The β at which the expected KL with K rollouts is the optimum's; the same simulated prompts throughout."""
    from scipy import optimize  # pyright: ignore[reportMissingTypeStubs]

    scipy_optimize: Any = optimize

    def gap(log_beta: float) -> float:
        beta = math.exp(log_beta)
        logs = rank_conditional_tilt(optimum.transform, beta, num_ref) / beta
        return float(_kls(_heights(logs, gaps_PK), gaps_PK).mean()) / optimum.kl - 1.0

    # However large the reward of the highest rank, no more than its share of the reference can be spent.
    top = np.full(num_ref + 1, -1e300)
    top[-1] = 0.0
    most = float(_kls(_heights(top, gaps_PK), gaps_PK).mean())
    if optimum.kl >= 0.999 * most:
        raise InputError(
            f"{num_ref} reference rollouts per prompt cannot spend {optimum.kl:.4g} nats, only about {most:.3g}",
            where="num_ref",
            hint="Use more rollouts or a smaller KL",
        )
    high = math.log(optimum.beta)
    while gap(high) > 0:
        high += 0.25
    low = high
    while gap(low) < 0:
        low -= 0.5
        if low < math.log(optimum.beta) - 12.0:
            raise InputError(
                f"{num_ref} reference rollouts per prompt hardly spend {optimum.kl:.4g} nats",
                where="num_ref",
                hint="Use more rollouts or a smaller KL",
            )
    if low == high:
        return math.exp(low)
    return math.exp(float(scipy_optimize.brentq(gap, low, high, xtol=1e-6)))


def _heights(logs: Array, gaps_PK: Array) -> Array:
    """Density of the policy between neighbouring reference quantiles, normalised on every prompt."""
    weights = np.exp(logs - logs.max())
    return weights / (gaps_PK @ weights)[:, None]


def _kls(heights_PK: Array, gaps_PK: Array) -> Array:
    """KL of every prompt's policy."""
    logs = np.log(np.maximum(heights_PK, 1e-300))
    return (gaps_PK * (heights_PK * logs - heights_PK + 1.0)).sum(axis=1)


def _win_rates(objective: Objective, heights_PK: Array, gaps_PK: Array) -> Array:
    """M8 on every prompt: F is linear between neighbours, so a few Gauss nodes there suffice."""
    x, w = np.polynomial.legendre.leggauss(_PIECE_NODES)
    places, weights = (x + 1.0) / 2.0, w / 2.0
    left_u, left_F = np.cumsum(gaps_PK, axis=1) - gaps_PK, np.cumsum(heights_PK * gaps_PK, axis=1)
    left_F -= heights_PK * gaps_PK
    loss = np.zeros(gaps_PK.shape[0])
    for place, weight in zip(places, weights, strict=True):
        u = np.clip(left_u + place * gaps_PK, 0.0, 1.0)
        cdf = np.clip(left_F + place * heights_PK * gaps_PK, 0.0, 1.0)
        loss += weight * (gaps_PK * objective.loss_density(cdf, objective.opponent_densities(u))).sum(axis=1)
    return 1.0 - loss


def check_num_ref(num_ref: int) -> int:
    """K as an int.

    Raises:
        InputError: If it is not a whole number of at least 1.
    """
    return whole_number(num_ref, "num_ref", "num_ref")
