"""FittedProcedure: the distortion of a black-box procedure, from what it returned when run on the reference.

Run any procedure (a cheaper verifier that chooses, beam search, controlled decoding) on the reference, calibrate the
rewards of its outputs: their ranks are a sample from H itself, because the reference's F is the identity. H is fitted
by maximum likelihood as a mixture of order statistics of M samples, k-th of M with weight w_k: smooth, monotone, exact
for Best-of-N and every other order statistic with N <= M, and readable ("behaves like 8th of 8 with probability 0.7").
M is chosen by cross-validated likelihood.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

from infalign._io.wording import counted
from infalign.errors import InputError
from infalign.numerics import special
from infalign.numerics.quadrature import Array, unit_interval
from infalign.procedures.base import InferenceProcedure, whole_number
from infalign.procedures.order_statistics import OrderStatistic

_DEGREES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_FOLDS = 5
_MAX_BINS = 1024


@dataclass(frozen=True)
class FittedProcedure(InferenceProcedure):
    """A black-box procedure as a mixture of order statistics; usually made by `from_ranks`.

    Args:
        weights: w_1..w_M, not negative, summing to 1: the weight of "k-th smallest of M".
        num_samples: How many ranks it was fitted to, for its uncertainty.
        misfit: Largest distance between H and the ranks' own distribution: what order statistics of M cannot follow,
            such as a procedure that always returns from the top tenth.
        rank_counts: With ranks among K references, how many had 0..K of them below; empty for exact ranks.
    """

    weights: tuple[float, ...]
    num_samples: int
    misfit: float = 0.0
    rank_counts: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        try:
            weights = tuple(float(weight) for weight in self.weights)
        except (TypeError, ValueError) as error:
            raise InputError(f"a weight is not a number ({error})", where="FittedProcedure") from error
        if not weights or not all(math.isfinite(weight) and weight >= 0 for weight in weights):
            raise InputError("a weight is negative or not finite, or there is none", where="FittedProcedure")
        total = math.fsum(weights)
        if abs(total - 1.0) > 1e-6:
            raise InputError(f"the weights sum to {total:g}", where="FittedProcedure", hint="Make them sum to 1")
        object.__setattr__(self, "weights", tuple(weight / total for weight in weights))
        object.__setattr__(self, "num_samples", whole_number(self.num_samples, "num_samples", "FittedProcedure"))
        object.__setattr__(self, "rank_counts", tuple(float(count) for count in self.rank_counts))
        if not 0.0 <= self.misfit <= 1.0 or any(count < 0 for count in self.rank_counts):
            raise InputError("misfit must lie in [0, 1] and no rank count be negative", where="FittedProcedure")

    @classmethod
    def from_ranks(
        cls, ranks: npt.ArrayLike, *, num_ref: int | None = None, max_degree: int = _DEGREES[-1], seed: int = 0
    ) -> FittedProcedure:
        """Fit H to the calibrated rewards of a procedure's outputs on the reference.

        Args:
            ranks: Any shape: one calibrated reward in [0, 1] per output, best from many prompts.
            num_ref: K, if the ranks were calibrated with K reference rollouts: the noise of such ranks is then part of
                the likelihood (beta-binomial) and not mistaken for randomness of the procedure. The ranks must then be
                multiples of 1/(2K); leave it out for calibrated rewards that were smoothed.
            max_degree: Largest M tried; `selection_weights` needs that many samples per prompt.
            seed: Of the cross-validation's folds.

        Raises:
            InputError: If there are fewer than 20 ranks, one is NaN or outside [0, 1], one does not fit `num_ref`, or
                they take only a few values and `num_ref` is not given.
        """
        values = unit_interval(ranks, "from_ranks", "Calibrate the rewards first").ravel()
        if values.size < 20:
            raise InputError(
                f"{counted(values.size, 'rank')} {'is' if values.size == 1 else 'are'} too few",
                where="from_ranks",
                hint="Give at least 20",
            )
        if num_ref is None:
            distinct = np.unique(values).size
            if distinct < 5:
                raise InputError(
                    f"the {values.size} ranks take only {distinct} value{'s' if distinct > 1 else ''}",
                    where="from_ranks",
                    hint="If they were calibrated with K reference rollouts, give num_ref=K",
                )
        else:
            num_ref = whole_number(num_ref, "num_ref", "from_ranks")
            doubled = 2.0 * num_ref * values
            off = np.abs(doubled - np.rint(doubled)) > 1e-6 * num_ref
            if off.any():
                raise InputError(
                    f"a rank of {values[off][0]:.6g} does not come from {num_ref} reference rollouts: "
                    f"it is not a multiple of 1/{2 * num_ref}",
                    where="from_ranks",
                    hint="Correct num_ref, or leave it out if the calibrated rewards were smoothed",
                )
        fold = np.random.default_rng(seed).permutation(values.size) % _FOLDS
        scores: list[float] = []
        degrees = [degree for degree in _DEGREES if degree <= max(min(values.size // 5, max_degree), 1)]
        for degree in degrees:
            held_out = 0.0
            for part in range(_FOLDS):
                weights = _fit(values[fold != part], degree, num_ref)
                held_out += float(np.log(_likelihood(values[fold == part], degree, num_ref) @ weights + 1e-300).sum())
            scores.append(held_out)
            if len(scores) >= 4 and max(scores[-3:]) < max(scores[:-3]) - 2.0:
                break  # more order statistics only fit noise from here on
        weights = _fit(values, degrees[int(np.argmax(scores))], num_ref)
        fitted = cls(tuple(weights.tolist()), values.size)
        if num_ref is not None:
            return replace(fitted, rank_counts=tuple(_rank_counts(values, num_ref).tolist()))
        ordered, steps = np.sort(values), np.arange(values.size + 1) / values.size
        level = fitted.distortion(ordered)
        misfit = float(np.maximum(np.abs(level - steps[1:]), np.abs(level - steps[:-1])).max())
        return replace(fitted, misfit=min(misfit, 1.0))

    def distortion(self, q: npt.ArrayLike) -> Array:
        """H(q) = sum_k w_k I_q(k, M-k+1)."""
        return np.minimum(_bernstein(np.concatenate([[0.0], np.cumsum(self.weights)]), q), 1.0)

    def density(self, q: npt.ArrayLike) -> Array:
        """h(q), a mixture of Beta(k, M-k+1) densities."""
        return len(self.weights) * _bernstein(np.asarray(self.weights), q)

    def density_slope(self, q: npt.ArrayLike) -> Array:
        """h'(q)."""
        degree = len(self.weights)
        if degree == 1:
            return np.zeros_like(unit_interval(q, "FittedProcedure"))
        return degree * (degree - 1) * _bernstein(np.diff(self.weights), q)

    def selection_weights(self, m: int) -> Array:
        """M10 for the mixture: the k-th of M with weight w_k; needs m >= M samples."""
        degree = len(self.weights)
        parts = [OrderStatistic(k=k, n=degree).selection_weights(m) for k in range(1, degree + 1)]
        return np.asarray(self.weights) @ np.stack(parts)

    @property
    def label(self) -> str:
        """The name in tables."""
        return f"fitted ({len(self.weights)} order statistics, {self.num_samples} ranks)"

    def standard_error(self, q: npt.ArrayLike) -> Array:
        """The sampling error of H(q), without the `misfit`, which is no matter of chance.

        For exact ranks sqrt(H (1-H) / num_samples), that of the plain empirical CDF, so conservative. Ranks among K
        references are noisy, and taking the noise out has a price: the spread of 50 refits is added (in squares).
        """
        level = self.distortion(q)
        variance: Array = level * (1.0 - level) / self.num_samples
        if self.rank_counts:
            refits = np.stack([refit.distortion(q) for refit in self.bootstrap(50)])
            variance = variance + np.asarray(refits.var(axis=0, ddof=1), dtype=np.float64)
        return np.sqrt(np.asarray(variance, dtype=np.float64))

    def confidence_band(self, q: npt.ArrayLike, level: float = 0.95) -> tuple[Array, Array]:
        """A band that holds the true H everywhere with the given confidence, whatever its shape.

        For exact ranks: H here, give or take the margin of Dvoretzky, Kiefer, Wolfowitz and Massart for the ranks' own
        distribution, and the `misfit`. For ranks among K references: all distributions whose ranks would have a CDF
        within that margin of the one seen (by linear programs). With few references it is wide, because then
        many procedures look alike.

        Args:
            q: Points in [0, 1].
            level: Confidence, between 0 and 1.
        """
        if isinstance(level, str) or not 0.0 < level < 1.0:
            raise InputError(f"level = {level!r} is not between 0 and 1", where="confidence_band")
        margin = math.sqrt(math.log(2.0 / (1.0 - level)) / (2.0 * self.num_samples))
        centre = self.distortion(q)
        if not self.rank_counts:
            margin += self.misfit
            return np.maximum(centre - margin, 0.0), np.minimum(centre + margin, 1.0)
        knots, lows, highs = _compatible(np.asarray(self.rank_counts), margin)
        points = unit_interval(q, "FittedProcedure")
        # Between two knots an increasing H lies above its value at the lower and below that at the upper one.
        below = np.searchsorted(knots, points, side="right") - 1
        above = np.searchsorted(knots, points, side="left")
        return np.minimum(lows[below], centre), np.maximum(highs[above], centre)

    def bootstrap(self, count: int, seed: int = 0) -> list[FittedProcedure]:
        """Refits to fresh samples from this fit: put each through `plan` to see what the uncertainty does to it.

        Args:
            count: How many.
            seed: Of the samples.

        Raises:
            InputError: If count is not a whole number of at least 1.
        """
        count = whole_number(count, "count", "bootstrap")
        rng = np.random.default_rng(seed)
        degree, num_ref = len(self.weights), len(self.rank_counts) - 1 if self.rank_counts else None
        refits: list[FittedProcedure] = []
        for _ in range(count):
            k = rng.choice(degree, size=self.num_samples, p=self.weights) + 1
            ranks = rng.beta(k, degree - k + 1)
            if num_ref is not None:
                ranks = rng.binomial(num_ref, ranks) / num_ref
            refit = FittedProcedure(tuple(_fit(ranks, degree, num_ref).tolist()), self.num_samples)
            counts = () if num_ref is None else tuple(_rank_counts(ranks, num_ref).tolist())
            refits.append(replace(refit, misfit=self.misfit, rank_counts=counts))
        return refits

    def to_dict(self) -> dict[str, Any]:
        """See the base class."""
        stored: dict[str, Any] = {"kind": "fitted", "weights": list(self.weights), "num_samples": self.num_samples}
        if self.rank_counts:
            return {**stored, "rank_counts": list(self.rank_counts)}
        return {**stored, "misfit": self.misfit}


def _bernstein(coefficients: Array, q: npt.ArrayLike) -> Array:
    """sum_j c_j binom(d, j) q^j (1-q)^(d-j) with d = len(c) - 1."""
    points = unit_interval(q, "FittedProcedure")
    degree = coefficients.size - 1
    j = np.arange(degree + 1, dtype=np.float64)
    log_binomials = special.gammaln(degree + 1.0) - special.gammaln(j + 1.0) - special.gammaln(degree - j + 1.0)
    flat = points.reshape(-1, 1)
    basis = np.exp(log_binomials + special.xlogy(j, flat) + special.xlog1py(degree - j, -flat))
    return (basis @ coefficients).reshape(points.shape)


def _likelihood(ranks: Array, degree: int, num_ref: int | None) -> Array:
    """Density of every rank under "k-th of `degree`", shape (len(ranks), degree)."""
    k = np.arange(1, degree + 1, dtype=np.float64)
    other = degree - k + 1.0
    if num_ref is None:
        return special.beta_density(k, other, ranks[:, None])

    def beta_binomial(count: Array) -> Array:
        column = count[:, None]
        choose = -special.betaln(column + 1.0, num_ref - column + 1.0) - math.log(num_ref + 1.0)
        return np.exp(choose + special.betaln(column + k, num_ref - column + other) - special.betaln(k, other))

    counts = np.rint(2.0 * ranks * num_ref) / 2.0
    # A tie with one reference reward is half a count on either side.
    return 0.5 * (beta_binomial(np.floor(counts)) + beta_binomial(np.ceil(counts)))


def _rank_counts(ranks: Array, num_ref: int) -> Array:
    """How many ranks had 0..K references below; a tie with one of them is half a count on either side."""
    doubled = np.rint(2.0 * ranks * num_ref).astype(np.intp)
    sides = np.concatenate([doubled // 2, (doubled + 1) // 2])
    return np.bincount(sides, minlength=num_ref + 1).astype(np.float64) / 2.0


def _compatible(rank_counts: Array, margin: float) -> tuple[Array, Array, Array]:
    """Knots in [0, 1], and the least and the largest H there whose ranks have a CDF within `margin` of the one seen."""
    num_ref, cells, num_knots = rank_counts.size - 1, 240, 25
    # A cell's mass may lie anywhere in it: the end that helps a constraint counts, so nothing possible is left out.
    edges = np.linspace(0.0, 1.0, cells + 1)
    counts = np.arange(num_ref)[:, None]
    reached = 1.0 - special.betainc(counts + 1.0, num_ref - counts, edges[None, :])  # P(at most b of K below | u)
    at_low, at_high = reached[:, :-1], reached[:, 1:]
    seen = np.cumsum(rank_counts)[:-1] / rank_counts.sum()
    limits = np.concatenate([seen + margin, -(seen - margin)])
    matrix = np.concatenate([at_high, -at_low])
    lows, highs = np.zeros(num_knots), np.ones(num_knots)
    lows[-1], highs[0] = 1.0, 0.0  # every H runs from 0 to 1
    for knot in range(1, num_knots - 1):
        inside = (edges[1:] <= knot / (num_knots - 1) + 1e-12).astype(np.float64)
        for sign, ends in ((1.0, lows), (-1.0, highs)):
            found: Any = linprog(sign * inside, A_ub=matrix, b_ub=limits, A_eq=np.ones((1, cells)), b_eq=[1.0])
            if found.status == 0:  # else no distribution is that near: keep what holds for any, 0 and 1
                # The solver keeps its constraints to 1e-7.
                ends[knot] = min(max(sign * float(found.fun) - sign * 1e-6, 0.0), 1.0)
    # Increasing, up to what the solver leaves; the outer ends of that are kept.
    lows, highs = np.minimum.accumulate(lows[::-1])[::-1], np.maximum.accumulate(highs)
    return np.linspace(0.0, 1.0, num_knots), lows, highs


def _fit(ranks: Array, degree: int, num_ref: int | None) -> Array:
    """Maximum likelihood weights by expectation-maximisation (the problem is concave in the weights)."""
    values, counts = np.unique(ranks, return_counts=True)
    if values.size > _MAX_BINS:
        groups = np.array_split(np.sort(ranks), _MAX_BINS)
        values, counts = np.array([group.mean() for group in groups]), np.array([group.size for group in groups])
    likelihood = _likelihood(values, degree, num_ref)
    shares = counts / counts.sum()
    weights = np.full(degree, 1.0 / degree)
    before = -math.inf
    for _ in range(500):
        mixture = likelihood @ weights + 1e-300
        score = float(shares @ np.log(mixture))
        if score - before < 1e-8:
            break
        before = score
        weights = weights * (likelihood.T @ (shares / mixture))
        weights /= weights.sum()
    return weights
