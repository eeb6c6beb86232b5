"""How good the self-consistent transform (M13) is: stability with few rollouts, and against an unpooled sample form.

    python benchmarks/self_consistent.py           # both parts, under two minutes; NumPy only, seeded

`stability`: an ideal policy follows the transform at a limited pace while the transform follows the policy's rollouts,
as in training; what share of the optimum's objective W − β KL it holds once settled, and how much that wanders.

`forms`: prompts whose policies differ (the calibrated reward's distribution is u^a, a lognormal). The pooled form
values a response by the distribution over all prompts; the sample form by the other G − 1 rollouts of its own prompt
(its marginal contribution to M10, over all subsets). Bias and variance of the centred values, in units of the variance
of the true ones.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy.special import gammaln

from infalign.procedures import BestOfN, InferenceProcedure, WorstOfN
from infalign.theory.plan import optimum_at_kl
from infalign.theory.winrate import Objective
from infalign.training.self_consistent import CELLS, SelfConsistentTransform

MIDDLES = (np.arange(CELLS) + 0.5) / CELLS


def objective_of(density: np.ndarray, procedure: InferenceProcedure, beta: float) -> float:
    """W − β KL of a policy with this density of quantiles on the cells."""
    cdf = np.concatenate([[0.0], np.cumsum(density) / CELLS])
    objective = Objective.of(procedure)
    edges = np.linspace(0.0, 1.0, CELLS + 1)
    loss = objective.loss_density(np.clip(cdf, 0, 1), objective.opponent_densities(edges))
    kl = float((density * np.log(np.maximum(density, 1e-300))).mean())
    return 1 - float((loss[1:] + loss[:-1]).mean() / 2) - beta * kl


def settle(procedure: InferenceProcedure, kl: float, prompts: int, generations: int, memory: float, pace: float,
           num_ref: int, steps: int, seed: int) -> np.ndarray:  # fmt: skip
    """Share of the optimum's objective over the last third of the steps."""
    rng = np.random.default_rng(seed)
    best = optimum_at_kl(procedure, kl)
    transform = SelfConsistentTransform(procedure, memory=memory)
    log_density = np.zeros(CELLS)
    top = best.win_rate - best.beta * best.kl
    shares = []
    for step in range(steps):
        density = np.exp(log_density - log_density.max())
        density /= density.mean()
        drawn = rng.choice(CELLS, prompts * generations, p=density / CELLS)
        ranks = rng.binomial(num_ref, MIDDLES[drawn])  # among references drawn afresh, as over many prompts
        transform.update(ranks.astype(float), np.full(ranks.size, num_ref))
        value = transform.value() / best.beta
        log_density += pace * ((value[1:] + value[:-1]) / 2 - log_density)
        log_density -= np.log(np.exp(log_density - log_density.max()).mean()) + log_density.max()
        if step >= 2 * steps // 3:
            density = np.exp(log_density)
            shares.append((objective_of(density / density.mean(), procedure, best.beta) - 0.5) / (top - 0.5))
    return np.array(shares)


def stability(options: argparse.Namespace) -> None:
    """Table of settled objective shares."""
    print(f"Share of the optimum's objective once settled, {options.kl} nats, pace {options.pace}: mean (lowest)")
    print(f"{'procedure':14s}{'memory':>8s}" + "".join(f"{f'{p} x {g}':>18s}" for p, g in options.sizes))
    for procedure in (BestOfN(4), BestOfN(16), WorstOfN(4), WorstOfN(16)):
        for memory in (0.0, 0.8, 0.95):
            row = f"{procedure.label:14s}{memory:8.2f}"
            for prompts, generations in options.sizes:
                shares = np.concatenate([
                    settle(procedure, options.kl, prompts, generations, memory, options.pace, 64, 150, seed)
                    for seed in range(options.seeds)
                ])  # fmt: skip
                row += f"{shares.mean():10.3f} ({shares.min():.2f})".rjust(18)
            print(row, flush=True)


def sample_values(quantiles: np.ndarray, n: int) -> np.ndarray:
    """Marginal contribution of each of G rollouts to the Best-of-n win rate, less what it is without that rollout.

    Both over all subsets: E max(u_i, best of n − 1 others)^n − E (best of n others)^n; shape (X, G) in and out.
    """
    size = quantiles.shape[1]
    order = np.argsort(quantiles, axis=1)
    wins = np.take_along_axis(quantiles, order, axis=1) ** n
    others = size - 1

    def share(below: np.ndarray, drawn: int) -> np.ndarray:
        """Chance that a subset of `drawn` of the others lies among the lowest `below`."""
        counts = np.where(below >= drawn, below, drawn)
        value = np.exp(
            gammaln(counts + 1) - gammaln(counts - drawn + 1) - gammaln(others + 1) + gammaln(others - drawn + 1)
        )
        return np.where(below >= drawn, value, 0.0)

    def mean_best(values: np.ndarray, drawn: int) -> np.ndarray:
        """E of the best of `drawn` of these sorted values."""
        up_to = share(np.arange(others + 1), drawn)
        return values @ np.diff(up_to)

    out = np.empty_like(quantiles)
    for rank in range(size):
        rest = np.delete(wins, rank, axis=1)
        raised = np.maximum(rest, wins[:, [rank]])
        floor = wins[:, rank]  # where all n − 1 others are below, u_i itself is the best
        below = share(np.array([rank]), n - 1)[0]
        up_to = np.diff(share(np.arange(others + 1), n - 1))
        up_to[:rank] = 0.0
        value = below * floor + raised @ up_to - mean_best(rest, n)
        np.put_along_axis(out, order[:, [rank]], value[:, None], axis=1)
    return n * out


def forms(options: argparse.Namespace) -> None:
    """Table of bias and variance of pooled and sample form, Best-of-N."""
    print(f"\nError of a response's centred value, in units of the true values' variance; {options.prompts} prompts")
    print(f"{'N':>4s}{'G':>5s}{'spread of a':>13s}{'pooled bias²':>14s}{'sample variance':>17s}{'sample bias²':>14s}")
    grid = np.linspace(0, 1, 2001)
    rng = np.random.default_rng(1)
    for n in (4, 16):
        for size in (8, 16, 32, 64):
            if size <= n:
                continue
            for spread in (0.0, 0.3, 0.8):
                power_X = 3.0 * np.exp(spread * rng.standard_normal(options.prompts))
                cdf_XU = grid[None, :] ** power_X[:, None]
                true_XU = integrate(n * n * grid ** (n - 1) * cdf_XU ** (n - 1), grid)
                pooled_U = integrate(n * n * grid ** (n - 1) * cdf_XU.mean(axis=0) ** (n - 1), grid)
                draws_XG = rng.random((options.prompts, size)) ** (1 / power_X[:, None])
                true_XG = np.stack([np.interp(draws_XG[x], grid, true_XU[x]) for x in range(options.prompts)])
                weights_XU = np.diff(cdf_XU, axis=1)
                true_mean_X = (weights_XU * (true_XU[:, 1:] + true_XU[:, :-1]) / 2).sum(axis=1)
                pooled_mean_X = (weights_XU * (pooled_U[1:] + pooled_U[:-1]) / 2).sum(axis=1)
                truth = true_XG - true_mean_X[:, None]
                pooled = np.interp(draws_XG, grid, pooled_U) - pooled_mean_X[:, None]
                sampled = sample_values(draws_XG, n)
                signal = truth.var()
                # The sample form's error given the response: its mean over responses of one size shows a bias.
                error = sampled - truth
                bins = np.digitize(draws_XG ** power_X[:, None], np.linspace(0, 1, 21)[1:-1])
                bias = sum((bins == b).mean() * error[bins == b].mean() ** 2 for b in range(20))
                print(f"{n:4d}{size:5d}{spread:13.1f}{np.square(pooled - truth).mean() / signal:14.3f}"
                      f"{error.var() / signal:17.3f}{bias / signal:14.4f}", flush=True)  # fmt: skip


def integrate(slope: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Antiderivative from 0 along the last axis, by trapezoids."""
    steps = (slope[..., 1:] + slope[..., :-1]) / 2 * np.diff(grid)
    return np.concatenate([np.zeros((*slope.shape[:-1], 1)), np.cumsum(steps, axis=-1)], axis=-1)


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kl", type=float, default=0.5)
    parser.add_argument("--pace", type=float, default=0.1, help="share of the way to the target that a step moves")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=400)
    options = parser.parse_args()
    options.sizes = [(16, 16), (4, 16), (4, 4), (1, 4)]
    stability(options)
    forms(options)


if __name__ == "__main__":
    main()
