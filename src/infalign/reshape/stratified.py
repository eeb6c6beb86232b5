"""Exact counts: n₁ of N candidates from one model, n₂ from another, and one of the N returned by rank.

In a mixture each candidate comes from a model at random; with exact counts the numbers are fixed. The candidates then
differ in distribution, so this is a procedure of its own: it maps several CDFs to one. With n_m candidates of a model
whose CDF is F_m, the number of candidates at or below a reward is a sum of independent binomials (Poisson
binomial). The k-th smallest is at or below it if at least k are; for the best of all, that is the product of F_m^{n_m}.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

from infalign.errors import InputError
from infalign.estimators.clustered import Estimate, mean_estimate
from infalign.numerics.quadrature import unit_interval
from infalign.procedures import InferenceProcedure, Standard, whole_number
from infalign.procedures.order_statistics import BestOfN, OrderStatistic, WorstOfN
from infalign.reshape.data import Ragged, ReshapingData, Rollouts
from infalign.reshape.pool import Pool
from infalign.reshape.reshaping import Reshaping

Float = NDArray[np.float64]
IntArray = NDArray[np.intp]


@dataclass(frozen=True)
class ExactCounts:
    """The k-th smallest of candidates drawn in fixed numbers from several models.

    Args:
        counts: How many candidates each model gives, at least 0 and together at least 1.
        k: Which candidate is returned, counted from the worst; None for the best.
    """

    counts: tuple[int, ...]
    k: int | None = None

    def __post_init__(self) -> None:
        where = "ExactCounts"
        counts = tuple(whole_number(count, "counts", where) if count != 0 else 0 for count in self.counts)
        if sum(counts) < 1:
            raise InputError("no candidate at all", where=where, hint="Give counts such as (12, 4)")
        k = sum(counts) if self.k is None else whole_number(self.k, "k", where)
        if k > sum(counts):
            raise InputError(f"k = {k} is more than the {sum(counts)} candidates", where=where)
        object.__setattr__(self, "counts", counts)
        object.__setattr__(self, "k", k)

    @classmethod
    def of(cls, procedure: InferenceProcedure, counts: Sequence[int]) -> ExactCounts:
        """The counterpart of Best-of-N, Worst-of-N, an order statistic or one sample, with its N split as told.

        Raises:
            InputError: If the procedure returns no fixed rank of n candidates, or the counts do not sum to n.
        """
        rank = order_statistic(procedure)
        if sum(counts) != procedure.n:
            raise InputError(f"counts {tuple(counts)} do not sum to {procedure.n}", where="ExactCounts.of")
        return cls(tuple(counts), rank)

    @property
    def n(self) -> int:
        """N, all candidates together."""
        return sum(self.counts)

    @property
    def rank(self) -> int:
        """The k of the k-th smallest."""
        assert self.k is not None, "set when it was made"
        return self.k

    @property
    def label(self) -> str:
        """A short name, such as "best of 12 + 4"."""
        split = " + ".join(str(count) for count in self.counts)
        which = {self.n: "best", 1: "worst"}.get(self.rank, f"rank {self.rank}")
        return f"{which} of {split}"

    def distortion(self, cdfs: ArrayLike) -> Float:
        """CDF of the returned candidate from the models' CDFs.

        Args:
            cdfs: Values in [0, 1], shape (M, ...), one row for each model.

        Returns:
            Shape (...). With one model this is the order statistic's H.
        """
        points = unit_interval(cdfs, "distortion(cdfs)")
        if len(points) != len(self.counts):
            raise InputError(f"{len(points)} CDFs for {len(self.counts)} models", where="distortion(cdfs)")
        chance = _poisson_binomial(self.counts, points)
        return np.clip(chance[self.rank :].sum(axis=0), 0.0, 1.0)

    def win_rate(self, cdfs: ArrayLike, u: ArrayLike, opponent: InferenceProcedure | None = None) -> float:
        """Win rate over the reference from the models' CDFs (M8 with this distortion).

        Args:
            cdfs: (M, S) each model's CDF of calibrated rewards at the points `u`.
            u: (S,) points from 0 to 1, ascending, close enough for the trapezoid rule.
            opponent: What is run on the reference; the same rank of the same number of its samples if None.
        """
        points = unit_interval(u, "win_rate(u)")
        output = self.distortion(cdfs)
        rival = (OrderStatistic(self.rank, self.n) if opponent is None else opponent).distortion(points)
        return float(1.0 - np.sum(0.5 * (output[1:] + output[:-1]) * np.diff(rival)))


def order_statistic(procedure: InferenceProcedure) -> int:
    """The k for which a procedure returns the k-th smallest of its n candidates.

    Raises:
        InputError: If it is no order statistic.
    """
    if isinstance(procedure, BestOfN):
        return procedure.n
    if isinstance(procedure, OrderStatistic):
        return procedure.k
    if isinstance(procedure, (WorstOfN, Standard)):
        return 1
    raise InputError(
        f"{procedure.label} returns no fixed rank of n candidates",
        where="exact counts",
        hint="Use Best-of-N, Worst-of-N or an order statistic",
    )


def stratified_win_rate(
    rewards: Sequence[Ragged],
    ref_rewards_PK: Ragged,
    procedure: ExactCounts,
    *,
    opponent: InferenceProcedure | None = None,
    confidence: float = 0.95,
) -> Estimate:
    """Unbiased win rate over the reference of exact counts, from samples of each model (M10 with several models).

    Every choice of n_m of a model's samples counts once: nothing is drawn with replacement. Equal rewards count ½.

    Args:
        rewards: For each model its (P, G_m) rewards, or one array for each prompt; at least n_m for each prompt. Where
            the reference is one of the models, give other samples of it than `ref_rewards_PK`.
        ref_rewards_PK: (P, K) rewards of the opponent's reference samples, or one array for each prompt.
        procedure: The split.
        opponent: What is run on the reference, with finite n at most K; the same rank of the same number if None.
        confidence: Level of the interval.

    Raises:
        InputError: If a reward is NaN, the prompts differ in number, or there are too few samples.
    """
    samples = [_sorted_rows(values, "rewards") for values in rewards]
    refs = _sorted_rows(ref_rewards_PK, "ref_rewards_PK")
    if len(samples) != len(procedure.counts):
        raise InputError(f"{len(samples)} sets of rewards for {len(procedure.counts)} models", where="rewards")
    if {len(rows) for rows in samples} != {len(refs)}:
        raise InputError("the sets of rewards are for different numbers of prompts", where="rewards")
    for count, rows in zip(procedure.counts, samples, strict=True):
        least = min(len(row) for row in rows)
        if least < count:
            raise InputError(f"{least} samples for {count} candidates", where="rewards", hint="Draw more")
    rival = OrderStatistic(procedure.rank, procedure.n) if opponent is None else opponent
    per_prompt = np.zeros(len(refs))
    for at, ref_K in enumerate(refs):
        mass_K = sum(weight * part.selection_weights(len(ref_K)) for weight, part in rival.components)
        ordered = [rows[at] for rows in samples]
        sizes = [len(row) for row in ordered]
        # Chance that the returned candidate is above each reference sample, and that it is not below.
        above, not_below = (
            np.stack([len(row) - np.searchsorted(row, ref_K, side=side) for row in ordered])
            for side in ("right", "left")
        )
        won = _chance_above(procedure, sizes, above) + _chance_above(procedure, sizes, not_below)
        per_prompt[at] = 0.5 * (mass_K @ won)
    return mean_estimate(per_prompt, confidence=confidence)


@dataclass(frozen=True, eq=False)
class Split:
    """One way to split N candidates among reference and aligned models.

    Attributes:
        procedure: The counts, the reference's first.
        win_rate: Estimated win rate over the reference, with its error.
        kl: KL in nats of one candidate picked at random, a draw of the mixture with weights n_m/N.
    """

    procedure: ExactCounts
    win_rate: Estimate
    kl: Estimate


def best_split(
    data: ReshapingData,
    procedure: InferenceProcedure,
    *,
    kl_budget: float | None = None,
    opponent: InferenceProcedure | None = None,
) -> list[Split]:
    """Ways to split a procedure's N candidates among the reference and the aligned models, the best first.

    Half of the reference's rollouts are candidates and half the opponent's, then the other way round, so no rollout
    meets itself. The first estimate is a little high, as the highest of several noisy ones.

    Args:
        data: Rollouts of the reference and of each aligned model.
        procedure: Best-of-N, Worst-of-N or an order statistic.
        kl_budget: Highest KL of a candidate in nats; None for no limit.
        opponent: What is run on the reference; the same procedure if None.

    Returns:
        One entry for each split that the rollouts and the budget allow, in order of estimated win rate.

    Raises:
        InputError: If the procedure is no order statistic, the aligned models have no rollouts, a prompt has fewer
            than 2 N reference rollouts, or there are more than 5,000 splits.
    """
    k, n = order_statistic(procedure), procedure.n
    assert n is not None, "an order statistic draws a finite number"
    where = "best_split"
    if len(data.aligned) != data.num_models:
        raise InputError("the aligned models have no rollouts", where=where, hint="Give some of each")
    ref, *aligned = [_rows(group) for group in (data.ref, *data.aligned)]
    order = np.random.default_rng(0)
    shuffled = [order.permutation(row) for row in ref]
    halves = [[row[: len(row) // 2] for row in shuffled], [row[len(row) // 2 :] for row in shuffled]]
    limits = [min(len(row) for row in rows) for rows in (halves[0], *aligned)]
    if limits[0] < n:
        raise InputError("too few reference rollouts", where=where, hint=f"Give at least {2 * n} for each prompt")
    counts_of_splits = list(islice(_splits(n, limits), 5001))
    if len(counts_of_splits) > 5000:
        raise InputError("more than 5,000 ways to split", where=where, hint="Use fewer models")
    pool = Pool.of(data)
    found: list[Split] = []
    for counts in counts_of_splits:
        mixture = Reshaping.mixture(*(count / n for count in counts[1:]))
        ratios = pool.log_ratio_PSM if data.num_models > 1 else pool.log_ratio
        kl = mean_estimate(pool.tilted(mixture.log_density(ratios)).kl_P)
        if kl_budget is not None and kl.estimate > kl_budget:
            continue
        made = ExactCounts(counts, k)
        rates = [
            stratified_win_rate([ours, *aligned], theirs, made, opponent=opponent or procedure).per_prompt
            for ours, theirs in (halves, halves[::-1])
        ]
        found.append(Split(made, mean_estimate((rates[0] + rates[1]) / 2), kl))
    return sorted(found, key=lambda split: -split.win_rate.estimate)


def _rows(rollouts: Rollouts) -> list[Float]:
    return [place[real] for place, real in zip(rollouts.place_PG, rollouts.real_PG, strict=True)]


def _splits(total: int, limits: Sequence[int]) -> Iterator[tuple[int, ...]]:
    if len(limits) == 1:
        if total <= limits[0]:
            yield (total,)
        return
    for count in range(min(total, limits[0]) + 1):
        for rest in _splits(total - count, limits[1:]):
            yield (count, *rest)


def _poisson_binomial(counts: Sequence[int], chances: Float) -> Float:
    """Distribution of how many of Σ n_m independent candidates lie at or below a point; shape (N + 1, ...)."""
    total = np.ones((1, *chances.shape[1:]))
    for count, chance in zip(counts, chances, strict=True):
        j = np.arange(count + 1).reshape(-1, *[1] * chance.ndim)
        log_choose = gammaln(count + 1.0) - gammaln(j + 1.0) - gammaln(count - j + 1.0)
        total = _convolved(total, np.exp(log_choose) * chance**j * (1.0 - chance) ** (count - j))
    return total


def _chance_above(procedure: ExactCounts, sizes: Sequence[int], above_MK: IntArray) -> Float:
    """Chance that the returned candidate is one of those counted above, over all choices without replacement.

    Args:
        procedure: The split.
        sizes: G_m of each model.
        above_MK: How many samples of each model are above each of K points.
    """
    total = np.ones((1, above_MK.shape[1]))
    for count, size, above_K in zip(procedure.counts, sizes, above_MK, strict=True):
        j = np.arange(count + 1)[:, None]
        total = _convolved(total, _hypergeometric(size, above_K[None, :], count, j))
    # The k-th smallest of N is above a point if at least N − k + 1 candidates are.
    return total[procedure.n - procedure.rank + 1 :].sum(axis=0)


def _hypergeometric(size: int, marked: IntArray, drawn: int, j: IntArray) -> Float:
    """Chance that j of `drawn` samples out of `size` are marked ones."""

    def log_choose(n: IntArray, k: IntArray) -> Float:
        inside = (k >= 0) & (k <= n)
        k = np.where(inside, k, 0)
        n = np.maximum(n, k)
        return np.where(inside, gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0), -np.inf)

    whole = log_choose(np.asarray(size), np.asarray(drawn))
    return np.exp(log_choose(marked, j) + log_choose(size - marked, drawn - j) - whole)


def _convolved(a: Float, b: Float) -> Float:
    out = np.zeros((len(a) + len(b) - 1, *np.broadcast_shapes(a.shape[1:], b.shape[1:])))
    for shift, row in enumerate(b):
        out[shift : shift + len(a)] += a * row
    return out


def _sorted_rows(values: Ragged, where: str) -> list[Float]:
    rows = [np.sort(np.asarray(row, dtype=np.float64)) for row in values]
    if not rows or any(row.ndim != 1 or not row.size for row in rows):
        raise InputError("not one row of samples for each prompt", where=where)
    if any(np.isnan(row).any() for row in rows):
        raise InputError("a reward is NaN", where=where, hint="Score that response again, or leave its prompt out")
    return rows
