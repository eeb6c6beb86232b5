"""How far fits of g, and what they predict, are from the truth: Gaussian channels of known optimum.

python benchmarks/reshape_fit.py                # about five minutes on one core
python benchmarks/reshape_fit.py --repeats 20   # coverage as well as accuracy
"""

from __future__ import annotations

import argparse
import time
from typing import Literal

import numpy as np
from scipy.special import expit, ndtr, ndtri

from infalign.procedures import BestOfN, InferenceProcedure, WorstOfN
from infalign.reshape import Goal, Pool, Reshaping, ReshapingData, best_density, fit_reshaping_to
from infalign.reshape.pool import Contest
from infalign.theory.winrate import Objective

S = np.linspace(-7.0, 7.0, 161)
P = np.exp(-0.5 * S**2) / np.exp(-0.5 * S**2).sum()
U = np.concatenate([[0.0], expit(np.linspace(-14.0, 14.0, 201)), [1.0]])
Setting = tuple[InferenceProcedure, Literal["mixture", "reshaped"], float, int, int, float]


def truth(reshaping: Reshaping, procedure: InferenceProcedure, rho: float, shifts: np.ndarray) -> tuple[float, float]:
    """Exact KL and win rate, averaged over prompts whose aligned model shifts the score by `shifts`."""
    by_score = ndtr((ndtri(U)[:, None] - rho * S) / np.sqrt(1 - rho**2))
    opponent, kls, rates = procedure.distortion(U), [], []
    for shift in shifts:
        log_density = reshaping.log_density(shift * S - shift**2 / 2)
        log_density = log_density - np.log(P @ np.exp(log_density))
        mass = P * np.exp(log_density)
        output = procedure.distortion(np.clip(by_score @ mass, 0, 1))
        kls.append(mass @ log_density)
        rates.append(1 - np.sum(0.5 * (output[1:] + output[:-1]) * np.diff(opponent)))
    return float(np.mean(kls)), float(np.mean(rates))


def draw(rng: np.random.Generator, shifts: np.ndarray, rho: float, num_ref: int, num_aligned: int) -> ReshapingData:
    """Rollouts of reference and aligned model with rewards."""

    def side(count: int, moved: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        s = rng.standard_normal((len(shifts), count)) + moved
        rewards = rho * s + np.sqrt(1 - rho**2) * rng.standard_normal(s.shape)
        return shifts[:, None] * s - shifts[:, None] ** 2 / 2, rewards

    log_ratios_PK, rewards_PK = side(num_ref, 0.0)
    if num_aligned == 0:
        return ReshapingData.from_rewards(log_ratios_PK, rewards_PK)
    log_ratios_PG, rewards_PG = side(num_aligned, shifts[:, None])
    return ReshapingData.from_rewards(
        log_ratios_PK, rewards_PK, aligned_log_ratios_PG=log_ratios_PG, aligned_rewards_PG=rewards_PG
    )


def study(setting: Setting, prompts: int, repeats: int, budget: float) -> str:
    """One row of the table."""
    procedure, kind, shift, num_ref, num_aligned, rho = setting
    population = np.clip(np.random.default_rng(99).normal(shift, 0.2 * shift, 200), 0.2, None)
    # The limit: a fit to a fine grid of scores and noises with their exact probabilities, for a few prompts.
    score, noise = np.linspace(-5.5, 5.5, 81), ndtri((np.arange(48) + 0.5) / 48)
    probability = np.repeat(np.exp(-0.5 * score**2) / np.exp(-0.5 * score**2).sum() / len(noise), len(noise))
    reward = (rho * score[:, None] + np.sqrt(1 - rho**2) * noise).ravel()
    few = np.quantile(population, [0.1, 0.3, 0.5, 0.7, 0.9])
    ratios = np.stack([np.repeat(shift * score - shift**2 / 2, len(noise)) for shift in few])
    grid = Pool.enumerated(np.tile(probability, (5, 1)), ratios, np.tile(reward, (5, 1)))
    limit, _ = best_density(grid, Objective.of(procedure), kl_budget=budget, kind=kind)
    limit_kl, limit_rate = truth(limit, procedure, rho, population)
    rows, plain, covered, seconds = [], [], np.zeros(2), 0.0
    for repeat in range(repeats):
        rng = np.random.default_rng(repeat)
        shifts = np.clip(rng.normal(shift, 0.2 * shift, prompts), 0.2, None)
        data = draw(rng, shifts, rho, num_ref, num_aligned)
        started = time.process_time()
        fitted = fit_reshaping_to(data, Goal(procedure, kl_budget=budget), kind=kind)
        seconds += time.process_time() - started
        kl, rate = truth(fitted, procedure, rho, population)
        predicted = fitted.predictions
        assert predicted is not None
        found = (predicted.kl, predicted.win_rates[procedure.label])
        rows.append((kl, rate, found[0].estimate, found[1].estimate, found[1].standard_error))
        covered += [
            p.confidence_interval[0] <= t <= p.confidence_interval[1] for p, t in zip(found, (kl, rate), strict=True)
        ]
        pool = Pool.of(data)
        tilted = pool.tilted(fitted.log_density(pool.log_ratio))
        own = truth(fitted, procedure, rho, shifts)[1]
        plain.append(Contest(pool, Objective.of(procedure)).win_rate_P(tilted.mass_PS).mean() - own)
    kl, rate, said_kl, said_rate, error = np.mean(rows, axis=0)
    slope = max((limit_rate - 0.5) / max(2 * limit_kl, 1e-9), 0.0)  # W grows about like the root of KL
    return (
        f"| {procedure.label} | {kind} | {rho:g} | {num_ref} + {num_aligned} | {kl:.3f} | {said_kl:.3f} | {rate:.4f} | "
        f"{said_rate:.4f} ± {error:.4f} | {np.mean(plain):+.4f} | {limit_rate - rate - slope * (limit_kl - kl):+.4f} | "
        f"{covered[0] / repeats:.0%}, {covered[1] / repeats:.0%} | {seconds / repeats:.1f} s |"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=0.5)
    options = parser.parse_args()
    print(f"{options.prompts} prompts, {options.budget} nats, {options.repeats} repeats; ±: the mean standard error\n")
    columns = ["procedure", "kind", "ρ", "K + G", "true KL", "predicted", "true W", "predicted", "plain error"]
    columns += ["lost to noise", "covered: KL, W", "CPU"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    settings: list[Setting] = [
        (BestOfN(16), "reshaped", 2.3, 64, 64, 0.6),
        (BestOfN(16), "mixture", 2.3, 64, 64, 0.6),
        (BestOfN(16), "reshaped", 2.3, 256, 64, 0.6),
        (BestOfN(16), "reshaped", 2.3, 64, 64, 0.9),
        (BestOfN(16), "reshaped", 2.3, 128, 0, 0.6),
        (BestOfN(4), "reshaped", 2.3, 64, 64, 0.6),
        (BestOfN(64), "reshaped", 2.3, 256, 64, 0.6),
        (WorstOfN(4), "reshaped", 1.0, 64, 64, 0.6),
        (WorstOfN(16), "reshaped", 1.0, 64, 64, 0.6),
        (WorstOfN(16), "reshaped", 1.0, 128, 0, 0.6),
        (WorstOfN(16), "reshaped", 1.0, 256, 64, 0.9),
    ]
    for setting in settings:
        print(study(setting, options.prompts, options.repeats, options.budget), flush=True)
