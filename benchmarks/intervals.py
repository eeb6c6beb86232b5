"""How often nominal 95 % intervals hold, by simulation, where few or unusual prompts make it hard.

    python benchmarks/intervals.py [--trials 4000] [--json]

Every row draws data sets of P prompts from a population whose truth is known, and counts the intervals that hold it:
`coverage`, with `above` and `below` the shares of intervals that lie wholly above or below the truth; `plain_t` is the
coverage of mean ± t·SE on the same data. `benchmarks/estimators.py` prints these tables after its own.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable

import numpy as np
from scipy.special import ndtr, stdtrit

from infalign.estimators import (
    Estimate,
    difference_estimate,
    efficiency_of,
    sequence_kl,
    share_estimate,
    useful_kl,
)
from infalign.evaluation.compare import matched_difference
from infalign.procedures import FittedProcedure

Array = np.ndarray
Draw = Callable[[np.random.Generator, int], Array]
Row = dict[str, object]
Population = tuple[str, float, Draw]  # name, true mean, P values of it
PROMPTS = (10, 20, 50, 200)


def _lognormal(sigma: float) -> Population:
    return f"lognormal {sigma:g}", 1.0, lambda rng, p: np.exp(sigma * rng.standard_normal(p) - sigma**2 / 2)


def _gamma(shape: float) -> Population:
    return f"gamma {shape:g}", 1.0, lambda rng, p: rng.gamma(shape, 1 / shape, p)


def _some_far(rng: np.random.Generator, p: int) -> Array:
    return np.where(rng.random(p) < 0.1, 5.0, 0.5) * rng.gamma(4, 0.25, p) / 0.95


def _noisy(rng: np.random.Generator, p: int) -> Array:
    """Means of 16 log ratios each: KL κ with variance 2κ/16, as of Gaussian shifts; κ lognormal with mean ½."""
    kl_P = 0.5 * np.exp(1.2 * rng.standard_normal(p) - 0.72)
    return kl_P + np.sqrt(2 * kl_P / 16) * rng.standard_normal(p)


KLS: tuple[Population, ...] = (
    ("normal, sd 0.3", 1.0, lambda rng, p: 1 + 0.3 * rng.standard_normal(p)),
    _gamma(4),
    _gamma(1),
    _gamma(0.5),
    _lognormal(0.6),
    _lognormal(1.0),
    _lognormal(1.2),
    _lognormal(1.5),
    ("lognormal 1.2, sampled", 0.5, _noisy),
    ("one prompt in ten at 10 times the others", 1.0, _some_far),
)


def _beta(mean: float, weight: float) -> Population:
    draw: Draw = lambda rng, p: rng.beta(mean * weight, (1 - mean) * weight, p)  # noqa: E731
    return f"Beta({mean * weight:.3g}, {(1 - mean) * weight:.3g})", mean, draw


def _shifted(shift: float, spread: float) -> Population:
    """True Best-of-4 win rates of prompts whose rewards are shifted by N(shift, spread²)."""
    u = np.linspace(-9, 9, 4001)
    shifts = np.linspace(shift - 6 * spread, shift + 6 * spread, 400)
    rates = np.array([1 - np.trapezoid(ndtr(u - one) ** 4, ndtr(u) ** 4) for one in shifts])
    weights = np.exp(-0.5 * ((shifts - shift) / spread) ** 2)
    draw: Draw = lambda rng, p: np.interp(shift + spread * rng.standard_normal(p), shifts, rates)  # noqa: E731
    return f"Best-of-4, shift {shift:g} ± {spread:g}", float((weights * rates).sum() / weights.sum()), draw


SHARES: tuple[Population, ...] = (
    _beta(0.6, 40),
    _beta(0.7, 3),
    _beta(0.9, 3),
    _beta(0.95, 2),
    _beta(0.98, 5),
    _shifted(1.2, 0.5),
    _shifted(2, 0.5),
    _shifted(2, 1),
    _shifted(3, 1),
    ("won or lost, 0.9", 0.9, lambda rng, p: (rng.random(p) < 0.9) * 1.0),
    ("won or lost, 0.96", 0.96, lambda rng, p: (rng.random(p) < 0.96) * 1.0),
    ("0, ½ or 1, 0.95", 0.95, lambda rng, p: rng.binomial(2, 0.95, p) / 2),
    ("tied, one prompt in ten won", 0.55, lambda rng, p: np.where(rng.random(p) < 0.1, 1.0, 0.5)),
    ("tied, one prompt in fifty won", 0.51, lambda rng, p: np.where(rng.random(p) < 0.02, 1.0, 0.5)),
    _beta(0.98, 1),
)


def _sparse(share: float, low: float, high: float) -> Population:
    draw: Draw = lambda rng, p: np.where(rng.random(p) < share, rng.uniform(low, high, p), 0.0)  # noqa: E731
    return f"{share:.0%} of prompts differ, by {low:g} to {high:g}", share * (low + high) / 2, draw


def _two_betas(a: float, b: float, weight: float) -> Population:
    first, second = _beta(a, weight), _beta(b, weight)
    return f"{first[0]} less {second[0]}", a - b, lambda rng, p: first[2](rng, p) - second[2](rng, p)


DIFFERENCES: tuple[Population, ...] = (
    _two_betas(0.8, 0.75, 5),
    _two_betas(0.95, 0.8, 5),
    _two_betas(0.98, 0.9, 3),
    _sparse(0.2, -0.5, 0.5),
    _sparse(0.3, 0, 0.5),
    _sparse(0.1, 0, 1),
    _sparse(0.02, 0, 1),
)


def count(intervals: list[tuple[float, float]], truth: float) -> Row:
    """Coverage with both kinds of misses, in percent."""
    low, high = np.array(intervals).T
    above, below = 100 * float((low > truth).mean()), 100 * float((high < truth).mean())
    return {"coverage": 100 - above - below, "above": above, "below": below}


def of_means(
    kind: str,
    populations: tuple[Population, ...],
    estimate: Callable[[Array], Estimate],
    rng: np.random.Generator,
    trials: int,
    prompts: tuple[int, ...] = PROMPTS,
) -> list[Row]:
    """Coverage of an estimate of a mean over prompts."""
    rows: list[Row] = []
    for name, truth, draw in populations:
        for p in prompts:
            found, plain = list[tuple[float, float]](), 0
            for _ in range(trials):
                values_P = draw(rng, p)
                found.append(estimate(values_P).confidence_interval)
                margin = float(stdtrit(p - 1, 0.975)) * values_P.std(ddof=1) / math.sqrt(p)
                plain += abs(values_P.mean() - truth) <= margin
            rows.append(
                {"of": kind, "values": name, "P": p, "truth": truth}
                | count(found, truth)
                | {"plain_t": 100 * plain / trials}
            )
    return rows


def kls(rng: np.random.Generator, trials: int, prompts: tuple[int, ...] = PROMPTS) -> list[Row]:
    """Sequence KL."""
    return of_means("KL", KLS, lambda values_P: sequence_kl(values_P[:, None]), rng, trials, prompts)


def shares(rng: np.random.Generator, trials: int, prompts: tuple[int, ...] = PROMPTS) -> list[Row]:
    """Win rates near the ends of their range."""
    return of_means("win rate", SHARES, share_estimate, rng, trials, prompts)


def differences(rng: np.random.Generator, trials: int, prompts: tuple[int, ...] = PROMPTS) -> list[Row]:
    """Paired differences of win rates."""
    return of_means(
        "difference", DIFFERENCES, lambda d_P: difference_estimate(d_P, bounds=(-1.0, 1.0)), rng, trials, prompts
    )


def matched(rng: np.random.Generator, trials: int, prompts: tuple[int, ...] = PROMPTS) -> list[Row]:
    """Difference at matched KL against the same quantity of the population; the KL of the baseline may be near 0."""
    rows: list[Row] = []
    for kl, base_kl, noise in ((0.6, 0.4, 0.1), (0.5, 0.05, 0.1), (0.5, 0.0, 0.1)):
        win, base_win = 0.8, 0.5 + 0.3 * math.sqrt(base_kl)
        truth = 0.5 + base_kl / kl * (win - 0.5) - base_win
        for p in prompts:
            found = list[tuple[float, float]]()
            for _ in range(trials):
                kls_P = kl * np.exp(0.6 * rng.standard_normal(p) - 0.18) + noise * rng.standard_normal(p)
                base_P = base_kl * np.exp(0.6 * rng.standard_normal(p) - 0.18) + noise * rng.standard_normal(p)
                wins_P, base_wins_P = rng.beta(8 * win, 8 * (1 - win), p), rng.beta(8 * base_win, 8 * (1 - base_win), p)
                found.append(matched_difference(wins_P, base_wins_P, kls_P, base_P).confidence_interval)
            rows.append(
                {"of": "at matched KL", "values": f"KL {kl:g} against {base_kl:g}", "P": p, "truth": truth}
                | count(found, truth)
            )
    return rows


def efficiencies(rng: np.random.Generator, trials: int, prompts: tuple[int, ...] = PROMPTS) -> list[Row]:
    """Lower bound of the KL efficiency: rewards follow the shifted score with correlation ρ, so the truth is ρ²."""
    rows: list[Row] = []
    for shift, spread, rho in ((1.0, 0.4, 0.7), (0.5, 0.3, 0.6), (2.0, 0.5, 0.8)):
        for p in prompts:
            bounds, estimates = list[tuple[float, float]](), list[float]()
            for _ in range(trials):
                shift_P1 = shift + spread * rng.standard_normal((p, 1))
                score_PG = shift_P1 + rng.standard_normal((p, 16))
                reward_PG = rho * score_PG + math.sqrt(1 - rho**2) * rng.standard_normal((p, 16))
                useful = useful_kl(reward_PG, rng.standard_normal((p, 32)))
                got = efficiency_of(useful, sequence_kl(shift_P1 * score_PG - shift_P1**2 / 2))
                bounds.append((got.at_least, math.inf))
                estimates.append(got.efficiency)
            rows.append(
                {"of": "KL efficiency, at least", "values": f"shift {shift:g} ± {spread:g}, ρ {rho:g}", "P": p}
                | {"truth": rho**2, "mean estimate": float(np.mean(estimates))}
                | {"mean bound": float(np.mean([low for low, _ in bounds]))}
                | count(bounds, rho**2)
            )
    return rows


DISTORTIONS: tuple[tuple[str, Draw, Callable[[Array], Array]], ...] = (
    ("top tenth", lambda rng, n: 0.9 + 0.1 * rng.random(n), lambda q: np.clip(10 * q - 9, 0, 1)),
    ("middle fifth", lambda rng, n: 0.4 + 0.2 * rng.random(n), lambda q: np.clip(5 * q - 2, 0, 1)),
    ("Best-of-4", lambda rng, n: rng.random((n, 4)).max(axis=1), lambda q: q**4),
)


def bands(rng: np.random.Generator, trials: int) -> list[Row]:
    """`FittedProcedure`: whether the band holds H everywhere, and the claimed error of H(0.8) over the real one."""
    q, rows = np.linspace(0, 1, 201), list[Row]()
    for name, draw, truth in DISTORTIONS:
        for num_ref in (None, 8, 32):
            hits, widths, at, claimed = 0, list[float](), list[float](), list[float]()
            for _ in range(trials):
                ranks = draw(rng, 300)
                if num_ref is not None:
                    ranks = rng.binomial(num_ref, ranks) / num_ref
                fitted = FittedProcedure.from_ranks(ranks, num_ref=num_ref)
                low, high = fitted.confidence_band(q)
                hits += bool(((low <= truth(q) + 1e-9) & (truth(q) <= high + 1e-9)).all())
                widths.append(float((high - low).mean()))
                at.append(float(fitted.distortion(0.8)))
                if len(claimed) < 8:
                    claimed.append(float(fitted.standard_error(0.8)))
            spread = float(np.std(at, ddof=1))
            rows.append(
                {"procedure": name, "ranks": 300, "K": num_ref or "exact", "coverage": 100 * hits / trials}
                | {"mean width": float(np.mean(widths)), "error of H(0.8)": spread, "claimed": float(np.mean(claimed))}
            )
    return rows


def landings(rng: np.random.Generator, trials: int) -> list[Row]:
    """Where training lands on average, as a multiple of the KL budget: `aim` beside taking the round nearest to it."""
    from infalign.training.landing import Round, aim  # needs torch

    rows: list[Row] = []
    for sigma in (0.6, 1.0, 1.2):
        for p in (16, 64):
            landed, nearest, inside = list[float](), list[float](), 0
            for _ in range(trials):
                kl_P = 1.4 * np.exp(sigma * rng.standard_normal(p) - sigma**2 / 2)  # budget 1, KL 1.4 at scale 1
                scale, rounds = 1.0, list[Round]()
                for _ in range(5):
                    shown_P = kl_P * scale**2 * (1 + 0.02 * rng.standard_normal())
                    rounds.append(Round(scale, float(shown_P.mean()), float(shown_P.std(ddof=1) / math.sqrt(p))))
                    scale = aim(rounds, 1.0).scale
                end = aim(rounds, 1.0)
                landed.append(1.4 * end.scale**2)
                inside += abs(landed[-1] - end.kl) <= float(stdtrit(p - 1, 0.975)) * end.standard_error
                nearest.append(1.4 / (kl_P.mean() * (1 + 0.02 * rng.standard_normal())))
            rows.append(
                {"KLs": f"lognormal {sigma:g}", "P": p, "landed": float(np.mean(landed))}
                | {"nearest round": float(np.mean(nearest)), "error": float(np.std(landed))}
                | {"± t·error holds": 100 * inside / trials}
            )
    return rows


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table."""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def everything(rng: np.random.Generator, trials: int) -> dict[str, list[Row]]:
    """All tables."""
    return {
        "Sequence KL": kls(rng, trials),
        "Win rates": shares(rng, trials),
        "Differences": differences(rng, trials),
        "At matched KL": matched(rng, trials),
        "KL efficiency": efficiencies(rng, max(trials // 10, 20)),
        "Fitted procedures": bands(rng, max(trials // 100, 10)),
        "Landing": landings(rng, max(trials // 4, 50)),
    }


def main() -> None:
    """Run everything and print Markdown or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4000, help="data sets for each row; slow rows take fewer")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    options = parser.parse_args()
    found = everything(np.random.default_rng(20250101), options.trials)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for title, rows in found.items():
        print(f"## {title}\n\n{table(rows)}\n")


if __name__ == "__main__":
    main()
