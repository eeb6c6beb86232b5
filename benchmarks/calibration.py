"""Calibration: its speed, and what K references are worth.

    python benchmarks/calibration.py [--rewards FILE.npy | --run FOLDER] [--prompts 150] [--kl 0.5 1.0] [--json]

Speed: 1,000,000 scores against 10,000 prompts × 100 references, beside sorting as many numbers, in the same run.

Worth: the win rate that the optimal transform reaches at matched KL when it sees rewards through an estimated
quantile, for an ideal policy that follows the transform exactly, with the true quantiles known. Rewards come from
synthetic families, or from a file of shape (P, M), or a run folder after `infalign rollout`: M real rewards of each
prompt's reference rollouts, of which 100 serve as references and the others as the truth. Estimators:

    plug-in       M5: the share of references beaten
    M6            the rank-conditional tilt
    loc-scale     standardised by prompt, then the quantile among all prompts' left-out residuals
    mixed         loc-scale and plug-in averaged, loc-scale counting as 8 references
    refined 48    K references and 48 draws of the policy that M6 leads to, weighted (`RefinedCalibrator`)
    refined 48*   the same when the policy also wanders: its log-ratio carries noise of 1 nat that no reward asked for
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import special, stats

from infalign.calibration.calibrator import RefinedCalibrator, RewardCalibrator
from infalign.procedures import BestOfN, InferenceProcedure, WorstOfN
from infalign.rollouts.store import RolloutStore
from infalign.theory.finite_k import rank_conditional_tilt
from infalign.theory.plan import optimum_at_kl

MOST_REFERENCES = 100


def speed(repeats: int = 5) -> dict[str, float]:
    """Seconds, the median of interleaved repeats."""
    rng = np.random.default_rng(0)
    ref_rewards_PK, rewards_PG = rng.normal(size=(10_000, 100)), rng.normal(size=(10_000, 100))
    times: dict[str, list[float]] = {"sorting 1,000,000 numbers": [], "fitting": [], "calibrating 1,000,000 scores": []}
    for _ in range(repeats):
        for name, work in (
            ("sorting 1,000,000 numbers", lambda: np.sort(rewards_PG.ravel())),
            ("fitting", lambda: RewardCalibrator().fit(ref_rewards_PK)),
        ):
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
        calibrator = RewardCalibrator().fit(ref_rewards_PK)
        start = time.perf_counter()
        calibrator.calibrate(rewards_PG)
        times["calibrating 1,000,000 scores"].append(time.perf_counter() - start)
    sorting, _, calibrating = times.values()
    ratio = float(np.median(np.array(calibrating) / np.array(sorting)))
    return {**{name: float(np.median(values)) for name, values in times.items()}, "calibrating / sorting": ratio}


# --- populations: rewards at fine quantiles of each prompt, and references drawn from the same law -------------------

Population = tuple[
    np.ndarray, np.ndarray, np.ndarray, np.ndarray
]  # truth_PM, references_PK, quantiles u_M, widths du_M


def synthetic(rng: np.random.Generator, family: str, num_prompts: int) -> Population:
    """Rewards of a family, each prompt with its own place and scale (and shape, in the last two)."""
    edges = special.expit(np.linspace(-9.5, 9.5, 3001))
    edges[0], edges[-1] = 0.0, 1.0
    u_M = special.expit(np.linspace(-9.5, 9.5, 6001)[1::2])
    place, scale = rng.normal(0, 1, num_prompts), np.exp(rng.normal(0, 0.3, num_prompts))
    skew, weight, gap = (
        np.exp(rng.uniform(-0.4, 3, num_prompts)),
        *rng.uniform([[0.1], [1]], [[0.9], [5]], (2, num_prompts)),
    )

    def bimodal(p: int, u: np.ndarray) -> np.ndarray:
        at = np.linspace(-6, 12, 4001)
        return np.interp(u, weight[p] * stats.norm.cdf(at) + (1 - weight[p]) * stats.norm.cdf(at - gap[p]), at)

    def skewed(p: int, u: np.ndarray) -> np.ndarray:
        sign = 1 if p % 2 else -1
        return sign * stats.gamma.ppf(u if sign > 0 else 1 - u, skew[p]) / np.sqrt(skew[p])

    quantile: Callable[[int, np.ndarray], np.ndarray] = {
        "Gaussian": lambda p, u: stats.norm.ppf(u),
        "Student t3": lambda p, u: stats.t.ppf(u, 3),
        "Gumbel": lambda p, u: -np.log(-np.log(u)),
        "two modes": bimodal,
        "skewed": skewed,
    }[family]
    at = [lambda u, p=p: place[p] + scale[p] * quantile(p, u) for p in range(num_prompts)]
    truth = np.stack([one(u_M) for one in at])
    return truth, np.stack([one(rng.random(MOST_REFERENCES)) for one in at]), u_M, np.diff(edges)


def real(rng: np.random.Generator, rewards_PM: np.ndarray) -> Population:
    """100 of each prompt's rewards as references, the others as the truth."""
    shuffled = rng.permuted(rewards_PM, axis=1)
    truth = np.sort(shuffled[:, MOST_REFERENCES:], axis=1)
    count = truth.shape[1]
    return truth, shuffled[:, :MOST_REFERENCES], (np.arange(count) + 0.5) / count, np.full(count, 1.0 / count)


def rewards_of_run(folder: str) -> np.ndarray:
    """Rewards of a run's reference rollouts, shape (P, M)."""
    store = RolloutStore.read(Path(folder) / "rollouts" / "reference")
    (source,) = store.reward_sources
    ids = sorted(set(store.table(["prompt_id"])["prompt_id"].to_pylist()))
    return store.rewards_PK(source, ids, len(store) // len(ids))


# --- estimators that lost, kept here to be seen -----------------------------------------------------------------------


def location_scale(ref_PK: np.ndarray, truth_PM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantile among all prompts' residuals, each standardised without itself; for the truth and the references."""
    k = ref_PK.shape[1]
    mean, square = ref_PK.mean(1, keepdims=True), ref_PK.var(1, ddof=1, keepdims=True)
    left_mean = (k * mean - ref_PK) / (k - 1)
    left_square = ((k - 1) * square - (ref_PK - mean) ** 2 * k / (k - 1)) / (k - 2)
    residual_PK = (ref_PK - left_mean) / np.sqrt(np.maximum(left_square, 1e-9 * square))
    pool = np.sort(residual_PK.ravel())
    here = [np.searchsorted(pool, values) for values in ((truth_PM - mean) / np.sqrt(square), residual_PK)]
    return (here[0] + 0.5) / (pool.size + 1), (here[1] + 0.5) / (pool.size + 1)


def mixed(ref_PK: np.ndarray, truth_PM: np.ndarray, rank_PM: np.ndarray, worth: float = 8.0) -> np.ndarray:
    """Location-scale as a prior worth 8 references, made uniform again on the references."""
    k = ref_PK.shape[1]
    truth, own = location_scale(ref_PK, truth_PM)
    own = (worth * own + ref_PK.argsort(1).argsort(1)) / (worth + k - 1)
    pool = np.sort(own.ravel())
    return (np.searchsorted(pool, (worth * truth + rank_PM) / (worth + k)) + 0.5) / (pool.size + 1)


# --- what a policy reaches --------------------------------------------------------------------------------------------


def at_matched_kl(heights: Callable[[float], np.ndarray], kl: float, du_M: np.ndarray) -> tuple[float, np.ndarray]:
    """β, and the density over true quantiles of the policy exp(heights(β)), at this mean KL."""
    low, high = np.log(1e-3), np.log(50.0)
    for _ in range(28):
        beta = np.exp(0.5 * (low + high))
        log_density = heights(beta)
        log_density = log_density - special.logsumexp(log_density + np.log(du_M), axis=1, keepdims=True)
        reached = (np.exp(log_density) * log_density * du_M).sum(1).mean()
        low, high = (np.log(beta), high) if reached > kl else (low, np.log(beta))
    return beta, np.exp(log_density)


def win_rate(procedure: InferenceProcedure, density_PM: np.ndarray, u_M: np.ndarray, du_M: np.ndarray) -> float:
    """M8, averaged over prompts."""
    cdf_PM = np.cumsum(density_PM * du_M, axis=1) - 0.5 * density_PM * du_M
    return float((1 - (procedure.distortion(np.clip(cdf_PM, 0, 1)) * procedure.density(u_M) * du_M).sum(1)).mean())


def worth(
    rng: np.random.Generator, population: Population, procedure: InferenceProcedure, kl: float
) -> dict[str, float]:
    """Win rate at matched KL of every estimator."""
    truth_PM, all_refs_PK, u_M, du_M = population
    optimum = optimum_at_kl(procedure, kl)
    phi = optimum.transform
    num_prompts = len(truth_PM)
    found: dict[str, float] = {"ideal": optimum.win_rate}

    def add(name: str, quantile_PM: np.ndarray) -> None:
        _, density = at_matched_kl(lambda beta: phi(np.clip(quantile_PM, 0, 1)) / beta, kl, du_M)
        found[name] = win_rate(procedure, density, u_M, du_M)

    for k in (16, MOST_REFERENCES):
        ref_PK = all_refs_PK[:, :k]
        rank_PM = np.floor(RewardCalibrator().fit(ref_PK).ranks(truth_PM)).astype(int)
        add(f"plug-in, K={k}", rank_PM / k)
        beta, density_PM = at_matched_kl(lambda b, k=k, r=rank_PM: (rank_conditional_tilt(phi, b, k) / b)[r], kl, du_M)
        found[f"M6, K={k}"] = win_rate(procedure, density_PM, u_M, du_M)
        if k > 16:
            break
        add(f"loc-scale, K={k}", location_scale(ref_PK, truth_PM)[0])
        add(f"mixed, K={k}", mixed(ref_PK, truth_PM, rank_PM))
        # Draws of the policy that M6 leads to, with their exact log-ratios.
        tilt = rank_conditional_tilt(phi, beta, k) / beta
        log_z_P = special.logsumexp(tilt[rank_PM] + np.log(du_M), axis=1, keepdims=True)
        log_ratio_PK = tilt[ref_PK.argsort(1).argsort(1)] - log_z_P
        mass_PM = np.cumsum(density_PM * du_M, axis=1)
        cell = np.stack([np.searchsorted(mass_PM[p], rng.random(48) * mass_PM[p, -1]) for p in range(num_prompts)])
        cell = np.minimum(cell, u_M.size - 1)
        drawn_PS = np.take_along_axis(truth_PM, cell, axis=1)
        log_ratio_PS = np.log(np.take_along_axis(density_PM, cell, axis=1))
        for noise, name in ((0.0, "refined 48"), (1.0, "refined 48*")):
            # exp(η) with mean 1 under the reference; draws of the policy carry the tilted noise.
            wander_PK = rng.normal(-(noise**2) / 2, noise, log_ratio_PK.shape)
            wander_PS = rng.normal(noise**2 / 2, noise, log_ratio_PS.shape)
            refined = RefinedCalibrator(ref_PK, log_ratio_PK + wander_PK, drawn_PS, log_ratio_PS + wander_PS)
            add(f"{name}, K={k}", refined.calibrate(truth_PM))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rewards", help=".npy file of real rewards, shape (P, M), M well above 100")
    parser.add_argument("--run", help="run folder with well above 100 scored references per prompt")
    parser.add_argument("--prompts", type=int, default=150)
    parser.add_argument("--kl", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    figures: dict[str, dict[str, float]] = {"speed, seconds": speed()}
    populations: dict[str, Callable[[np.random.Generator], Population]] = {
        family: lambda rng, family=family: synthetic(rng, family, arguments.prompts)
        for family in ("Gaussian", "Student t3", "Gumbel", "two modes", "skewed")
    }
    if arguments.rewards or arguments.run:
        rewards_PM = np.load(arguments.rewards) if arguments.rewards else rewards_of_run(arguments.run)
        if rewards_PM.shape[1] <= MOST_REFERENCES:
            parser.error(f"{rewards_PM.shape[1]} rewards per prompt leave none for the truth; give well above 100")
        populations = {"reward model": lambda rng: real(rng, rewards_PM)}
    for family, make in populations.items():
        for procedure in (BestOfN(4), WorstOfN(4)):
            for kl in arguments.kl:
                runs = []
                for seed in range(arguments.repeats):
                    rng = np.random.default_rng(seed)
                    runs.append(worth(rng, make(rng), procedure, kl))
                name = f"{family}, {procedure.label}, KL {kl:g}"
                figures[name] = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
                spread = (
                    max(float(np.std([run[key] for run in runs], ddof=1)) for key in runs[0]) if len(runs) > 1 else 0.0
                )
                figures[name]["largest standard error"] = spread / len(runs) ** 0.5
    if arguments.json:
        print(json.dumps(figures))
        return
    for name, values in figures.items():
        print(name)
        for key, value in values.items():
            print(f"  {key:32s} {value:.4f}")


if __name__ == "__main__":
    main()
