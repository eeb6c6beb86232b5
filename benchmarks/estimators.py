"""Win-rate estimators: bias, coverage, variance against naive estimators, and speed.

    python benchmarks/estimators.py [--quick] [--json]

Ground truth. Reference rewards are standard normal; policy rewards are shifted by δ, which differs between prompts
(mean 0.4, standard deviation 0.5). With ties, rewards are rounded to whole numbers. Truth comes from quadrature over δ,
so the bias column has no error but that of the estimates' own mean. The tables of `benchmarks/intervals.py` follow.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass

import numpy as np
from scipy import stats

import intervals  # beside this file
from infalign.estimators import win_rate, win_rates
from infalign.procedures import BestOfN, InferenceProcedure, WorstOfN

SHIFT_MEAN, SHIFT_SD = 0.4, 0.5


def draw(
    rng: np.random.Generator, num_prompts: int, num_samples: int, ties: bool, shift_mean: float = SHIFT_MEAN
) -> tuple[np.ndarray, np.ndarray]:
    """Policy and reference rewards, (P, M) each."""
    shift_P1 = shift_mean + SHIFT_SD * rng.standard_normal((num_prompts, 1))
    rewards = shift_P1 + rng.standard_normal((num_prompts, num_samples))
    ref_rewards = rng.standard_normal((num_prompts, num_samples))
    return (rewards.round(), ref_rewards.round()) if ties else (rewards, ref_rewards)


def true_win_rate(procedure: InferenceProcedure, ties: bool, shift_mean: float = SHIFT_MEAN) -> float:
    """Population win rate by Gauss-Hermite quadrature over δ and a fine sum over the reward."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    edges = np.arange(-12.5, 13.5) if ties else np.linspace(-9, 11, 40_001)
    total = 0.0
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        ours = procedure.distortion(stats.norm.cdf(edges - shift_mean - SHIFT_SD * node))
        theirs = procedure.distortion(stats.norm.cdf(edges))
        # P(win) + ½ P(tie), cell by cell; with cells of 5e-4 the tie term is the trapezoid rule.
        total += weight * float(np.sum(np.diff(ours) * 0.5 * (theirs[1:] + theirs[:-1])))
    return total


def coverage(rng: np.random.Generator, trials: int) -> list[dict[str, object]]:
    """Bias and coverage of nominal 95 % intervals for each setting."""
    rows: list[dict[str, object]] = []
    for ties in (False, True):
        for num_prompts in (10, 30, 200):
            for n, num_samples in ((1, 4), (4, 4), (4, 16), (4, 128), (16, 16), (16, 128)):
                count = max(trials // (8 if num_samples == 128 and num_prompts == 200 else 1), 1)
                for procedure in (BestOfN(n), WorstOfN(n)):
                    truth, hits, estimates = true_win_rate(procedure, ties), 0, []
                    for _ in range(count):
                        got = win_rate(*draw(rng, num_prompts, num_samples, ties), procedure)
                        hits += got.confidence_interval[0] <= truth <= got.confidence_interval[1]
                        estimates.append(got.estimate)
                    rows.append(
                        {
                            "rewards": "tied" if ties else "continuous",
                            "P": num_prompts,
                            "M": num_samples,
                            "procedure": procedure.label,
                            "W": truth,
                            "bias": float(np.mean(estimates)) - truth,
                            "bias_error": float(np.std(estimates, ddof=1) / np.sqrt(count)),
                            "coverage": hits / count,
                            "coverage_error": float(np.sqrt(hits / count * (1 - hits / count) / count)),
                        }
                    )
    return rows


def coverage_near_one(rng: np.random.Generator, trials: int) -> list[dict[str, object]]:
    """Where the interval is at its limits: nearly every prompt is won. Beside it W ± t·SE, on the same data."""
    rows: list[dict[str, object]] = []
    for shift_mean in (1.2, 2.0):
        for num_prompts in (5, 10, 20, 50, 200):
            truth, hits, plain = true_win_rate(BestOfN(4), False, shift_mean), 0, 0
            for _ in range(trials):
                got = win_rate(*draw(rng, num_prompts, 16, False, shift_mean), BestOfN(4))
                hits += got.confidence_interval[0] <= truth <= got.confidence_interval[1]
                plain += abs(got.estimate - truth) <= stats.t.ppf(0.975, num_prompts - 1) * got.standard_error
            rows.append({"P": num_prompts, "M": 16, "W": truth, "coverage": hits / trials, "plain_t": plain / trials})
    return rows


@dataclass(frozen=True)
class WithReplacement(BestOfN):
    """Best-of-n from n draws *with* replacement out of the M stored samples: the weights of the empirical CDF."""

    def selection_weights(self, m: int) -> np.ndarray:
        """Chance that the largest of n draws out of 1..m is i."""
        return np.diff((np.arange(m + 1) / m) ** self.n)


def one_group(rewards_PM: np.ndarray, ref_rewards_PM: np.ndarray, n: int) -> np.ndarray:
    """Best of the first n samples of each side, once for each prompt."""
    ours, theirs = rewards_PM[:, :n].max(axis=1), ref_rewards_PM[:, :n].max(axis=1)
    return (ours > theirs) + 0.5 * (ours == theirs)


def against_naive(rng: np.random.Generator, num_draws: int) -> list[dict[str, object]]:
    """Bias of drawing with replacement and variance of one group, side by side on the same samples."""
    rows: list[dict[str, object]] = []
    for n, num_samples in ((4, 4), (4, 8), (4, 16), (4, 64), (16, 16), (16, 32), (16, 128)):
        batches = [draw(rng, 5000, num_samples, False) for _ in range(max(num_draws // (5000 * num_samples), 1))]
        ours = np.concatenate([win_rate(a, b, BestOfN(n)).per_prompt for a, b in batches])
        repeated = np.concatenate([win_rate(a, b, WithReplacement(n)).per_prompt for a, b in batches])
        single = np.concatenate([one_group(a, b, n) for a, b in batches])
        truth = true_win_rate(BestOfN(n), False)
        rows.append(
            {
                "procedure": f"Best-of-{n}",
                "M": num_samples,
                "W": truth,
                "bias_unbiased": float(ours.mean()) - truth,
                "bias_with_replacement": float(repeated.mean()) - truth,
                "bias_error": float(ours.std() / np.sqrt(ours.size)),
                "variance_ratio_one_group": float(single.var() / ours.var()),
            }
        )
    return rows


def speed(rng: np.random.Generator, num_prompts: int) -> dict[str, object]:
    """Time of all N in one pass against 1,000 resamples for Best-of-4 alone, run on a fortieth of the prompts."""
    rewards, ref_rewards = draw(rng, num_prompts, 128, False)
    procedures = [BestOfN(2**power) for power in range(7)]
    start = time.perf_counter()
    win_rates(rewards, ref_rewards, procedures)
    ours = time.perf_counter() - start
    few = num_prompts // 40
    start = time.perf_counter()
    for _ in range(1000):
        picked = rng.integers(0, 128, size=(few, 4))
        np.take_along_axis(rewards[:few], picked, 1).max(1) > np.take_along_axis(ref_rewards[:few], picked, 1).max(1)  # noqa: B015
    loop = (time.perf_counter() - start) * 40
    return {
        "prompts": num_prompts,
        "samples": 128,
        "procedures": len(procedures),
        "seconds": ours,
        "resampling_one_procedure_over_all_of_ours": loop / ours,
    }


def table(rows: list[dict[str, object]]) -> str:
    """Rows as a Markdown table."""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run everything and print Markdown or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the simulations")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    options = parser.parse_args()
    rng = np.random.default_rng(20250101)
    scale = 1 if options.quick else 10
    results = {
        "coverage": coverage(rng, 400 * scale),
        "coverage_near_one": coverage_near_one(rng, 400 * scale),
        "naive": against_naive(rng, 4_000_000 * scale),
        "speed": speed(rng, 10_000),
        "intervals": intervals.everything(rng, 400 * scale),
    }
    if options.json:
        print(json.dumps(results, indent=2))
        return
    print("## Bias and coverage of 95 % intervals\n\n" + table(results["coverage"]))
    print("\n## Coverage where nearly every prompt is won\n\n" + table(results["coverage_near_one"]))
    print("\n## Against naive estimators, same samples\n\n" + table(results["naive"]))
    print("\n## Speed\n\n" + table([results["speed"]]))
    for title, rows in results["intervals"].items():
        print(f"\n## {title}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
