"""Attack success beyond the attempts that were made: two laws, their uncertainty, bounds, and when not to believe them.

- Beta-binomial: each prompt breaks at its own rate p, and p ~ Beta(α, β) over prompts, fitted by maximum likelihood to
  the success counts. ASR@N = 1 − E(1 − p)^N = 1 − B(α, β + N) / B(α, β).
- Power law: −log ASR@N = a N^(−b), least squares on logarithms (Hughes et al. 2024, arXiv 2412.03556).
- Bounds without a law: ASR@N rises and is concave in N whatever the prompts, so beyond M it lies between ASR@M and the
  tangent there, whose slope is the chance that the M-th attempt is the first success: (prompts broken exactly once) /
  (P M), the Good–Turing estimate.

Both laws are refitted to resampled prompts for their intervals. A law is an assumption about attempts nobody made:
`Extrapolation.doubts` says what speaks against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infalign._io.wording import counted
from infalign.audit.success import attack_success, sizes, success_rates
from infalign.errors import InputError
from infalign.estimators import share_estimate
from infalign.numerics import special

FloatArray = NDArray[np.float64]

RESAMPLES = 200
_FEW_BROKEN = 10  # prompts with a success below which either law follows single prompts
_FAR = 4  # times the attempts made: from there on, simulated audits often missed (benchmarks/audit.py)


@dataclass(frozen=True)
class Curve:
    """A success rate for each N, with the ends of its interval."""

    rate: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class BetaBinomial:
    """Rates over prompts p ~ Beta(alpha, beta)."""

    alpha: float
    beta: float

    def rate(self, ns: ArrayLike) -> FloatArray:
        """ASR@N."""
        n = np.asarray(ns, np.float64)
        return -np.expm1(special.betaln(self.alpha, self.beta + n) - special.betaln(self.alpha, self.beta))


@dataclass(frozen=True)
class PowerLaw:
    """−log ASR@N = scale · N^(−exponent)."""

    scale: float
    exponent: float

    def rate(self, ns: ArrayLike) -> FloatArray:
        """ASR@N."""
        return np.exp(-self.scale * np.asarray(ns, np.float64) ** -self.exponent)


@dataclass(frozen=True)
class Extrapolation:
    """Predicted ASR@N beyond the attempts made.

    Attributes:
        ns: The N, each above the attempts made.
        beta_binomial: Prediction of the beta-binomial; None where nothing succeeded.
        power_law: Prediction of the power law; None where it cannot be fitted.
        bounds: Between which ASR@N lies without assuming a law; `rate` is the tangent at M.
        alpha: Of the beta-binomial.
        beta: Of the beta-binomial.
        scale: Of the power law.
        exponent: Of the power law.
        doubts: Why the predictions should not be trusted; empty where nothing speaks against them.
    """

    ns: list[int]
    beta_binomial: Curve | None
    power_law: Curve | None
    bounds: Curve
    alpha: float | None
    beta: float | None
    scale: float | None
    exponent: float | None
    doubts: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return asdict(self)


def fit_beta_binomial(
    successes_P: ArrayLike, num_attempts: int, weights_P: ArrayLike | None = None
) -> BetaBinomial | None:
    """Maximum likelihood on success counts; None where every count is 0 or every count is M.

    Counts that vary no more than one common rate would give push α + β to its bound of 10⁶, which is that one rate.

    Args:
        successes_P: (P,) successes of each prompt.
        num_attempts: M.
        weights_P: (P,) how often each prompt counts.
    """
    from scipy import optimize  # pyright: ignore[reportMissingTypeStubs]  (here, for it takes a moment to import)

    counts_P = np.asarray(successes_P, np.int64)
    weights_P = np.ones(counts_P.size) if weights_P is None else np.asarray(weights_P, np.float64)
    totals_S = np.bincount(counts_P, weights_P, num_attempts + 1)
    counts_S = np.flatnonzero(totals_S).astype(np.float64)
    shares_S = totals_S[totals_S > 0] / totals_S.sum()
    mean = float(shares_S @ counts_S) / num_attempts
    if mean in (0.0, 1.0):
        return None

    def loss(at: FloatArray) -> tuple[float, FloatArray]:
        # In the mean and the size α + β: nearly independent, where α and β move together along a ridge.
        share, size = 1.0 / (1.0 + math.exp(-at[0])), math.exp(at[1])
        alpha, beta = share * size, (1.0 - share) * size
        fit_S = special.betaln(counts_S + alpha, num_attempts - counts_S + beta) - special.betaln(alpha, beta)
        common = special.psi(size) - special.psi(num_attempts + size)
        by_alpha = float(shares_S @ (special.psi(counts_S + alpha) - special.psi(alpha) + common))
        by_beta = float(shares_S @ (special.psi(num_attempts - counts_S + beta) - special.psi(beta) + common))
        slope = [size * share * (1.0 - share) * (by_alpha - by_beta), alpha * by_alpha + beta * by_beta]
        return -float(shares_S @ fit_S), -np.array(slope)

    found: Any = cast(Any, optimize).minimize(
        loss, [math.log(mean / (1 - mean)), 0.0], jac=True, method="L-BFGS-B", bounds=[(-30, 30), (-12, math.log(1e6))]
    )
    share, size = 1.0 / (1.0 + math.exp(-found.x[0])), math.exp(found.x[1])
    return BetaBinomial(share * size, (1.0 - share) * size)


def fit_power_law(rates_N: ArrayLike, ns: Sequence[int]) -> PowerLaw | None:
    """Least squares of log(−log ASR@N) on log N over the N where ASR is neither 0 nor 1; None for fewer than two.

    Args:
        rates_N: (N,) measured ASR.
        ns: The N.
    """
    rates = np.asarray(rates_N, np.float64)
    inside = (rates > 0.0) & (rates < 1.0)
    if inside.sum() < 2:
        return None
    x, y = np.log(np.asarray(ns, np.float64)[inside]), np.log(-np.log(rates[inside]))
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    return PowerLaw(math.exp(float(y.mean()) - slope * float(x.mean())), -slope)


def bounds(successes_P: ArrayLike, num_attempts: int, ns: Sequence[int], *, confidence: float = 0.95) -> Curve:
    """Between which ASR@N lies beyond M without assuming a law: ASR@M below, the tangent at M above.

    Args:
        successes_P: (P,) successes of each prompt.
        num_attempts: M.
        ns: The N, above M.
        confidence: Level; the two ends of `high` (the height at M and the slope) each hold at half the miss rate.
    """
    counts_P = np.asarray(successes_P, np.int64)
    if not counts_P.any():
        # Exact at M (the rule of three), and a concave curve from 0 rises no faster than N / M beyond.
        high = _rule_of_three(counts_P.size, confidence)
        return Curve([0.0] * len(ns), [0.0] * len(ns), [min(1.0, high * n / num_attempts) for n in ns])
    measured = attack_success(counts_P, num_attempts, [num_attempts], confidence=(1 + confidence) / 2)[0]
    once = share_estimate((counts_P == 1).astype(np.float64), confidence=(1 + confidence) / 2)
    further_N = [(n - num_attempts) / num_attempts for n in ns]
    return Curve(
        rate=[min(1.0, measured.estimate + once.estimate * further) for further in further_N],
        low=[measured.confidence_interval[0]] * len(ns),
        high=[min(1.0, measured.confidence_interval[1] + once.confidence_interval[1] * f) for f in further_N],
    )


def extrapolate(
    successes_P: ArrayLike,
    num_attempts: int,
    ns: Sequence[int],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Extrapolation:
    """ASR@N for N beyond the attempts made.

    Args:
        successes_P: (P,) successes of each prompt in M attempts.
        num_attempts: M.
        ns: The N, each above M.
        confidence: Level of the intervals.
        resamples: How many times prompts are drawn anew with replacement, for the intervals of the laws.
        seed: Of the resampling.

    Raises:
        InputError: A count is impossible, or an N is not above M.
    """
    inside = [n for n in ns if n <= num_attempts]
    if inside:
        raise InputError(f"N = {inside[0]} was measured with {counted(num_attempts, 'attempt')}", where="extrapolate",
                         hint="Ask for N above the attempts made")  # fmt: skip
    fit_ns = sizes(num_attempts)
    rates_PN = success_rates(successes_P, num_attempts)[:, [n - 1 for n in fit_ns]]
    counts_P = np.asarray(successes_P, np.int64)
    num_prompts = counts_P.size
    law, power = fit_beta_binomial(counts_P, num_attempts), fit_power_law(rates_PN.mean(axis=0), fit_ns)
    drawn_BP = np.random.default_rng(seed).multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), resamples)
    beta_BN, power_BN = np.empty((resamples, len(ns))), np.empty((resamples, len(ns)))
    for b, weights_P in enumerate(drawn_BP):
        # A sample of prompts none of which (or each of which always) broke predicts no success, or nothing but.
        flat = float(weights_P @ counts_P > 0)
        if law is not None:
            refit = fit_beta_binomial(counts_P, num_attempts, weights_P)
            beta_BN[b] = flat if refit is None else refit.rate(ns)
        if power is not None:
            refit = fit_power_law(weights_P @ rates_PN / num_prompts, fit_ns)
            power_BN[b] = flat if refit is None else refit.rate(ns)
    found = Extrapolation(
        ns=list(ns),
        beta_binomial=None if law is None else _curve(law.rate(ns), beta_BN, confidence),
        power_law=None if power is None else _curve(power.rate(ns), power_BN, confidence),
        bounds=bounds(counts_P, num_attempts, ns, confidence=confidence),
        alpha=None if law is None else law.alpha,
        beta=None if law is None else law.beta,
        scale=None if power is None else power.scale,
        exponent=None if power is None else power.exponent,
        doubts=[],
    )
    found.doubts.extend(_doubts(found, counts_P, num_attempts, confidence))
    return found


@dataclass(frozen=True)
class HoldOut:
    """What the first attempts alone would have predicted of all of them.

    Attributes:
        fitted: Attempts per prompt that the laws saw.
        n: The N predicted: all attempts made.
        measured: ASR there.
        beta_binomial: Its prediction, as rate, low, high; None where there was none.
        power_law: The same for the power law.
    """

    fitted: int
    n: int
    measured: float
    beta_binomial: tuple[float, float, float] | None
    power_law: tuple[float, float, float] | None

    def doubts(self) -> list[str]:
        """Which law missed."""
        found: list[str] = []
        for name, predicted in (("beta-binomial", self.beta_binomial), ("power law", self.power_law)):
            if predicted is not None and (
                _clearly_below(self.measured, predicted[1]) or _clearly_below(predicted[2], self.measured)
            ):
                rate, low, high = (100 * value for value in predicted)
                found.append(
                    f"From the first {counted(self.fitted, 'attempt')} the {name} would have predicted {rate:.1f}% "
                    f"({low:.1f} to {high:.1f}) at N = {self.n}; {100 * self.measured:.1f}% were measured."
                )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return asdict(self)


def hold_out(
    successes_PM: ArrayLike, fitted: int, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> HoldOut:
    """Fit the laws to the first attempts and compare what they predict of all M with what was measured.

    Args:
        successes_PM: (P, M) whether each attempt succeeded.
        fitted: How many attempts the laws see, fewer than M.
        confidence: Level of the intervals.
        resamples: As `extrapolate`.
        seed: As `extrapolate`.

    Raises:
        InputError: As `extrapolate`.
    """
    successes = np.asarray(successes_PM, np.bool_)
    num_attempts = successes.shape[1]
    first_P = successes[:, :fitted].sum(axis=1)
    found = extrapolate(first_P, fitted, [num_attempts], confidence=confidence, resamples=resamples, seed=seed)
    beta_binomial, power_law = (
        None if curve is None else (curve.rate[0], curve.low[0], curve.high[0])
        for curve in (found.beta_binomial, found.power_law)
    )
    measured = float(successes.any(axis=1).mean())
    return HoldOut(fitted, num_attempts, measured, beta_binomial, power_law)


def _rule_of_three(num_prompts: int, confidence: float) -> float:
    """The largest share of prompts that can break where none of P did, at this confidence: about 3 / P at 95%."""
    return 1.0 - (1.0 - confidence) ** (1.0 / num_prompts)


def _curve(rate_N: FloatArray, resampled_BN: FloatArray, confidence: float) -> Curve:
    low_N, high_N = np.quantile(resampled_BN, [0.5 - confidence / 2, 0.5 + confidence / 2], axis=0)
    return Curve(rate_N.tolist(), np.minimum(low_N, rate_N).tolist(), np.maximum(high_N, rate_N).tolist())


def _doubts(found: Extrapolation, counts_P: NDArray[np.int64], num_attempts: int, confidence: float) -> list[str]:
    if not found.ns:
        return []
    num_prompts, broken = counts_P.size, int((counts_P > 0).sum())
    if broken == 0:
        return [
            f"No attempt has succeeded yet, so there is nothing to extrapolate from: only an upper bound is known. At "
            f"N = {num_attempts} it is {100 * _rule_of_three(num_prompts, confidence):.1f}% of such prompts, and it "
            "grows in proportion to N beyond."
        ]
    if broken == num_prompts:
        # What the laws would say beyond is then no matter, and neither is whether they agree.
        return [f"Every prompt broke within {counted(num_attempts, 'attempt')}: nothing is left to extrapolate."]
    doubts: list[str] = []
    if broken < _FEW_BROKEN:
        doubts.append(f"Only {counted(broken, 'prompt')} broke: the laws follow single prompts.")
    if max(found.ns) > _FAR * num_attempts:
        doubts.append(
            f"Beyond N = {_FAR * num_attempts} the predictions reach more than {_FAR} times past the attempts made; "
            "intervals there often miss if prompts do not follow the law."
        )
    for name, curve in (("beta-binomial", found.beta_binomial), ("power law", found.power_law)):
        if curve is None:
            continue
        beyond = [n for n, rate, high in zip(found.ns, curve.rate, found.bounds.high, strict=True) if rate > high]
        below = [n for n, rate, low in zip(found.ns, curve.rate, found.bounds.low, strict=True) if rate < low]
        if beyond or below:
            way = "more than any prompts with these counts could give" if beyond else "less than was already measured"
            doubts.append(f"At N = {(beyond or below)[0]} the {name} predicts {way}.")
    if found.beta_binomial is not None and found.power_law is not None:
        one, other = found.beta_binomial, found.power_law
        apart = [
            n
            for at, n in enumerate(found.ns)
            if _clearly_below(other.high[at], one.low[at]) or _clearly_below(one.high[at], other.low[at])
        ]
        if apart:
            to_the_end = apart == found.ns[-len(apart) :]
            where = f"From N = {apart[0]} on" if to_the_end else f"At N = {', '.join(map(str, apart))}"
            doubts.append(f"{where} the two laws disagree beyond their intervals.")
    return doubts


def _clearly_below(rate: float, other: float) -> bool:
    """Whether a rate is below another in what people are shown, tenths of a percent; less is no disagreement."""
    return round(rate, 3) < round(other, 3)
