"""How good the self-consistent transform (M13, M17) is: against noise, unlike prompts, few references, sharp tilts.

    python benchmarks/self_consistent.py           # all parts, some ten minutes; NumPy only, seeded
    python benchmarks/self_consistent.py prompts references

`stability`: an ideal policy follows the transform at a limited pace while the transform follows the policy's rollouts,
as in training; what share of the optimum's objective W − β KL it holds once settled, and how much that wanders.

`forms`: prompts whose policies differ (the calibrated reward's distribution is u^a, a lognormal). The pooled form
values a response by the distribution over all prompts; the sample form by the other G − 1 rollouts of its own prompt
(its marginal contribution to M10, over all subsets). Bias and variance of the centred values, in units of the variance
of the true ones.

`prompts`: two kinds of prompts, half each, on which the policy can tell the reward with correlation .65 and .75 (the
Gaussian channel, M14), in a training of 16 × 16 rollouts: F̂ pooled, and of each prompt.

`references`: what a policy that sees ranks among K references makes of two ways to pay them: the log-mean-exp of M6
with ranks spread evenly, and the mean with ranks spread by their posterior (M17).

`cap`: how many of 256 rollouts carry the gradient, (Σ|A|)²/ΣA², and what a cap on the tilt costs at 0.5 nats.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy.special import gammaln, ndtr, ndtri
from scipy.stats import binom

from infalign.procedures import BestOfN, InferenceProcedure, WorstOfN
from infalign.theory.finite_k import _heights, _kls, _win_rates
from infalign.theory.plan import optimum_at_kl
from infalign.theory.winrate import Objective
from infalign.training.rank_value import RankScale
from infalign.training.ranked import RankedRollouts
from infalign.training.self_consistent import CELLS, SelfConsistentTransform
from infalign.training.tilt import FLOOR, highest_under_cap, log_partition

MIDDLES = (np.arange(CELLS) + 0.5) / CELLS
EDGES = np.linspace(0.0, 1.0, CELLS + 1)


def rollouts(rank_B: np.ndarray, num_ref: int, prompt_B: np.ndarray | None = None) -> RankedRollouts:
    """Rollouts of these ranks, without ties; all of one prompt if no other is given."""
    none_B = np.zeros(len(rank_B), dtype=np.int64)
    rank_B = rank_B.astype(np.int64)
    prompt_B = none_B if prompt_B is None else prompt_B
    return RankedRollouts(prompt_B, rank_B, none_B, np.full(len(rank_B), num_ref), rank_B.astype(float), none_B)


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
    chance_CK = binom.pmf(np.arange(num_ref + 1)[None, :], num_ref, MIDDLES[:, None])
    shares = []
    for step in range(steps):
        density = np.exp(log_density - log_density.max())
        density /= density.mean()
        drawn = rng.choice(CELLS, prompts * generations, p=density / CELLS)
        ranks = rng.binomial(num_ref, MIDDLES[drawn])  # among references drawn afresh, as over many prompts
        transform.update(rollouts(ranks, num_ref))
        log_density += pace * (chance_CK @ transform.reward(num_ref).by_rank / best.beta - log_density)
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


class Channel:
    """Policies of kinds of prompts, each a tilt of a score s ~ N(0, 1) that predicts the reward with correlation ρ."""

    scores = np.linspace(-6.0, 6.0, 241)
    prior = np.exp(-(scores**2) / 2) / np.exp(-(scores**2) / 2).sum()

    def __init__(self, procedure: InferenceProcedure, beta: float, predictabilities: tuple[float, ...]) -> None:
        normal = np.concatenate([[-40.0], ndtri(EDGES[1:-1]), [40.0]])
        self.objective, self.beta = Objective.of(procedure), beta
        self.opponents = self.objective.opponent_densities(EDGES)
        self.cells = [
            np.diff(ndtr((normal - rho * self.scores[:, None]) / np.sqrt(1 - rho**2)), axis=1)
            for rho in predictabilities
        ]
        self.tilts = [np.zeros_like(self.scores) for _ in predictabilities]

    def shares(self, kind: int) -> np.ndarray:
        """The policy's distribution of s."""
        policy = self.prior * np.exp(self.tilts[kind] - self.tilts[kind].max())
        return policy / policy.sum()

    def cdf(self, kind: int) -> np.ndarray:
        """F at the edges."""
        return np.concatenate([[0.0], np.cumsum(self.shares(kind) @ self.cells[kind])]).clip(0.0, 1.0)

    def value(self, cdf: np.ndarray) -> np.ndarray:
        """R(u)/β in the middle of the cells at this F."""
        full = integrate(self.objective.reward_slope(cdf, self.opponents), EDGES)
        return (full[1:] + full[:-1]) / (2 * self.beta)

    def move(self, kind: int, tilt: np.ndarray, pace: float) -> None:
        """Towards the best that the score can do for a tilt of u."""
        self.tilts[kind] += pace * (self.cells[kind] @ tilt - self.tilts[kind])

    def reached(self) -> tuple[float, float]:
        """Win rate and KL, means over the kinds."""
        found = []
        for kind in range(len(self.tilts)):
            share, loss = self.shares(kind), self.objective.loss_density(self.cdf(kind), self.opponents)
            kl = float(share @ np.log(np.maximum(share, 1e-300) / self.prior))
            found.append((1.0 - float((loss[1:] + loss[:-1]).mean() / 2), kl))
        win_rate, kl = np.mean(found, axis=0)
        return float(win_rate), float(kl)

    def settle(self, pooled: bool = False, cap: float | None = None, steps: int = 250, pace: float = 0.05) -> Channel:
        """Follow the true F, of each kind or of all, without noise; the tilt with the floor where there is a cap."""
        for _ in range(steps):
            own = [self.cdf(kind) for kind in range(len(self.tilts))]
            for kind, cdf in enumerate(own):
                value = self.value(np.mean(own, axis=0) if pooled else cdf)
                self.move(kind, value if cap is None else bounded(value, cap), pace)
        return self


def bounded(tilt: np.ndarray, cap: float | None) -> np.ndarray:
    """As training bounds it: cap, then floor; log Z subtracted."""
    cut = np.minimum(tilt, highest_under_cap(tilt, cap))
    return np.maximum(cut - log_partition(cut), -FLOOR)


def beta_for(procedure: InferenceProcedure, kinds: tuple[float, ...], kl: float, cap: float | None = None) -> float:
    """The β at which the settled policies spend this KL on average."""

    def spent(log_beta: float) -> float:
        return Channel(procedure, np.exp(log_beta), kinds).settle(cap=cap, steps=200).reached()[1]

    # From above: a sharp tilt with a floor under it is carried by so few that a smaller β can spend less.
    low = 0.0
    while spent(low) < kl and low > np.log(2e-3):
        low -= 0.25
    high = low + 0.25
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > kl else (low, middle)
    return float(np.exp((low + high) / 2))


def train(channel: Channel, transform: SelfConsistentTransform, pooled: bool, seed: int, pace: float) -> float:
    """J over the last third of 300 steps of 16 prompts × 16 rollouts, 128 prompts in turn, 256 references."""
    rng, order, values = np.random.default_rng(seed), np.array([], dtype=int), []
    for step in range(300):
        order = order if len(order) else rng.permutation(128)
        batch, order = order[:16], order[16:]
        kind_P, rank_PG = batch % len(channel.tilts), np.empty((16, 16), dtype=int)
        for p, kind in enumerate(kind_P):
            share = np.diff(channel.cdf(kind))
            rank_PG[p] = rng.binomial(256, MIDDLES[rng.choice(CELLS, 16, p=share / share.sum())])
        paid = np.stack([channel.value(transform.cdf_of(None if pooled else int(prompt))) for prompt in batch])
        for kind in np.unique(kind_P):
            channel.move(kind, paid[kind_P == kind].mean(axis=0), pace)
        transform.update(rollouts(rank_PG.ravel(), 256, np.repeat(batch, 16)))
        if step >= 200:
            win_rate, kl = channel.reached()
            values.append(win_rate - channel.beta * kl)
    return float(np.mean(values))


def prompts(options: argparse.Namespace) -> None:
    """Table of W − β KL with F̂ pooled and of each prompt."""
    print("\nW − β KL at 0.5 nats, trained with 16 × 16 rollouts, mean of the last third and over seeds")
    print(f"{'procedure':14s}{'ρ':>12s}{'β':>8s}{'F known':>9s}{'pooled F known':>16s}{'F̂ pooled':>10s}{'F̂ own':>8s}")
    for procedure in (BestOfN(4), BestOfN(16), WorstOfN(16)):
        for kinds in ((0.65, 0.75), (0.7, 0.7)):
            beta = beta_for(procedure, kinds, options.kl)
            row = f"{procedure.label:14s}{', '.join(map(str, kinds)):>12s}{beta:8.3f}"
            for pooled, width in ((False, 9), (True, 16)):
                win_rate, kl = Channel(procedure, beta, kinds).settle(pooled, steps=600).reached()
                row += f"{win_rate - beta * kl:{width}.4f}"
            for pooled, width in ((True, 10), (False, 8)):
                trained = [
                    train(Channel(procedure, beta, kinds), SelfConsistentTransform(procedure), pooled, seed, 0.05)
                    for seed in range(options.seeds)
                ]
                row += f"{np.mean(trained):{width}.4f}"
            print(row, flush=True)


def references(options: argparse.Namespace) -> None:
    """Table of W − β KL for a policy that sees ranks among K references."""
    print("\nW − β KL of a policy that sees ranks, β planned for 0.5 nats; 500 prompts")
    print(f"{'procedure':14s}{'K':>5s}{'M6, evenly':>12s}{'mean, posterior':>17s}")
    for procedure in (BestOfN(4), BestOfN(16), WorstOfN(16)):
        best = optimum_at_kl(procedure, options.kl)
        for num_ref in (32, 128, 256):
            scale = RankScale.of(Objective.of(procedure), num_ref, EDGES)
            gaps_PK = np.random.default_rng(0).standard_exponential((500, num_ref + 1))
            gaps_PK /= gaps_PK.sum(axis=1, keepdims=True)
            row = f"{procedure.label:14s}{num_ref:5d}"
            for mean, width in ((False, 12), (True, 17)):
                tilt = np.zeros(num_ref + 1)
                for _ in range(500):
                    share_K = (_heights(tilt, gaps_PK) * gaps_PK).mean(axis=0)
                    places = np.arange(num_ref + 2) / (num_ref + 1)
                    cdf = np.interp(EDGES, places, np.concatenate([[0.0], np.cumsum(share_K)])).clip(0.0, 1.0)
                    if mean:
                        wanted = scale.reward(cdf).by_rank / best.beta
                    else:
                        full = integrate(scale.objective.reward_slope(cdf, scale.opponents), EDGES) / best.beta
                        middle = (full[1:] + full[:-1]) / 2
                        weights_KC = np.diff(scale.posterior_KC, axis=1)
                        wanted = middle.max() + np.log(np.maximum(weights_KC @ np.exp(middle - middle.max()), 1e-300))
                    tilt += 0.05 * (wanted - wanted.max() - tilt)
                heights = _heights(tilt, gaps_PK)
                win_rate = _win_rates(scale.objective, heights, gaps_PK).mean()
                row += f"{win_rate - best.beta * _kls(heights, gaps_PK).mean():{width}.4f}"
            print(row, flush=True)


def effective(advantages: np.ndarray) -> float:
    """(Σ|A|)²/ΣA² of centred advantages; 0 where all are alike."""
    size = np.abs(advantages - advantages.mean())
    if size.max() < 1e-9:
        return 0.0
    return float(size.sum() ** 2 / np.square(size).sum())


def cap(options: argparse.Namespace) -> None:
    """Table of what a cap on the tilt costs and how many rollouts carry a step; before it, what KL each β spends."""
    print("\nKL by β for Best-of-16, ρ = .55, settled, tilt with its floor")
    for most in (np.inf, 4.0, 3.0):
        spent = [
            Channel(BestOfN(16), beta, (0.55,)).settle(cap=most).reached()[1] for beta in (0.3, 0.2, 0.1, 0.05, 0.02)
        ]
        print(f"cap {most:4.1f}: " + ", ".join(f"{kl:.2f}" for kl in spent) + " nats at β = 0.3, 0.2, 0.1, 0.05, 0.02")
    print(
        "\nA cap on the tilt at 0.5 nats: β, win rate, and how many of 256 rollouts carry a step, at first and settled"
    )
    print(f"{'procedure':14s}{'ρ':>6s}{'cap':>6s}{'β':>8s}{'W':>8s}{'at first':>10s}{'settled':>9s}")
    for procedure, kinds in ((BestOfN(16), (0.55, 0.7)), (BestOfN(4), (0.6,)), (WorstOfN(16), (0.7,))):
        for rho in kinds:
            for most in (np.inf, 4.0, 3.0, 2.5):
                beta = beta_for(procedure, (rho,), options.kl, most)
                channel = Channel(procedure, beta, (rho,)).settle(cap=most, steps=400)
                win_rate, kl = channel.reached()
                if abs(kl / options.kl - 1) > 0.05:
                    print(f"{procedure.label:14s}{rho:6.2f}{most:6.1f}   out of reach ({kl:.2f} nats)", flush=True)
                    continue
                rng, first, settled = np.random.default_rng(0), [], []
                start, end = (bounded(channel.value(F), most) for F in (EDGES, channel.cdf(0)))
                ratio = np.log(channel.shares(0) / channel.prior)
                for _ in range(50):
                    first.append(effective(start[rng.integers(0, CELLS, 256)]))
                    score_B = rng.choice(len(ratio), 256, p=channel.shares(0))
                    below_BC = np.cumsum(channel.cells[0][score_B], axis=1)
                    cell_B = (below_BC < rng.random(256)[:, None]).sum(axis=1).clip(0, CELLS - 1)
                    settled.append(effective(end[cell_B] - ratio[score_B]))
                print(f"{procedure.label:14s}{rho:6.2f}{most:6.1f}{beta:8.4f}{win_rate:8.4f}"
                      f"{np.mean(first):10.0f}{np.mean(settled):9.0f}", flush=True)  # fmt: skip


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["stability", "forms", "prompts", "references", "cap"])
    parser.add_argument("--kl", type=float, default=0.5)
    parser.add_argument("--pace", type=float, default=0.1, help="share of the way to the target that a step moves")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=400, help="of the part forms")
    options = parser.parse_args()
    options.sizes = [(16, 16), (4, 16), (4, 4), (1, 4)]
    known = {"stability": stability, "forms": forms, "prompts": prompts, "references": references, "cap": cap}
    for part in options.parts:
        known[part](options)


if __name__ == "__main__":
    main()
