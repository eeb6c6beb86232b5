"""How fast the theory is: python benchmarks/theory.py. Ratios are measured side by side in one run.

The yardstick is the plain way to solve M9: a damped fixed-point iteration on a uniform grid of 20,001 points, stopped
when its residual is below 1e-9, with the damping factor that suits it best. Its win rate then carries the trapezoidal
rule's error, which is printed; this library's error is measured against the exact identities of docs/theory.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

import infalign as ia
from infalign.procedures import InferenceProcedure
from infalign.theory.envelope import forget
from infalign.theory.levels import level_masses
from infalign.theory.plan import frontier, optimum_at_kl


def fastest_ms(call: Callable[[], object], repeats: int) -> float:
    """Fastest wall time of a call in milliseconds, after one call to warm up: what the work takes on an idle core."""
    call()
    times: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def limit(
    procedure: InferenceProcedure, kls: object, opponent: InferenceProcedure | None = None, levels: object = None
) -> object:
    """The limit from scratch: what was computed before is forgotten."""
    forget()
    return ia.limit(procedure, kls, opponent, levels=levels)  # pyright: ignore[reportArgumentType]


def fixed_point(procedure: InferenceProcedure, beta: float, damping: float, most: int = 2000) -> tuple[float, float]:
    """W and the residual on the uniform grid; gives up after `most` iterations, or when 100 bring no progress."""
    u = np.linspace(0.0, 1.0, 20_001)
    step = u[1]
    h0 = procedure.density(u)

    def cumulative(values: np.ndarray) -> np.ndarray:
        return np.concatenate([[0.0], np.cumsum(0.5 * step * (values[1:] + values[:-1]))])

    reward, residuals = np.zeros_like(u), [np.inf]
    while True:
        density = np.exp((reward - reward.max()) / beta)
        cdf = cumulative(density)
        cdf = np.minimum(cdf / cdf[-1], 1.0)
        following = cumulative(procedure.density(cdf) * h0)
        residuals.append(float(np.abs(following - reward).max()))
        stuck = len(residuals) > 100 and residuals[-1] > 0.9 * residuals[-100]
        if residuals[-1] < 1e-9 or stuck or len(residuals) > most:
            break
        reward = reward + damping * (following - reward)
    return 1.0 - float(cumulative(procedure.distortion(cdf) * h0)[-1]), residuals[-1]


def best_damping(procedure: InferenceProcedure, beta: float) -> float | None:
    """The damping factor of a short list with which the iteration is fastest: the yardstick at its best."""
    times: dict[float, float] = {}
    for damping in (1.0, 0.5, 0.25, 0.1, 0.03):
        start = time.perf_counter()
        if fixed_point(procedure, beta, damping)[1] < 1e-9:
            times[damping] = time.perf_counter() - start
    return min(times, key=lambda damping: times[damping]) if times else None


def exact_gap(procedure: InferenceProcedure, beta: float) -> float:
    """|W - its exact identity|, a measure of this library's error that needs no reference solution."""
    best = ia.optimal_transform(procedure, beta)
    if isinstance(procedure, ia.WorstOfN):
        return abs(best.win_rate - (1 - beta / procedure.n * (1 - np.exp(-best.log_partition))))
    at_one = np.exp(float(best.transform(1.0)) / beta - best.log_partition)
    return abs(best.win_rate - beta / procedure.n * (at_one - 1))


def main() -> None:
    """Print the figures."""
    print("one optimum, against the damped fixed point on 20,001 points")
    titles = ("beta", "ms", "fixed ms", "ratio", "its W error", "our W error")
    print(f"{'procedure':14s}" + "".join(f"{title:>13s}" for title in titles))
    for procedure in (ia.BestOfN(4), ia.WorstOfN(4), ia.BestOfN(64), ia.WorstOfN(64)):
        for beta in (0.3, 0.1, 0.02):
            ours = fastest_ms(lambda p=procedure, b=beta: ia.optimal_transform(p, b), 15)
            own_error = exact_gap(procedure, beta)
            damping = best_damping(procedure, beta)
            if damping is None:
                print(f"{procedure.label:14s}{beta:13.2f}{ours:13.1f}{'no solution':>26s}{'':13s}{own_error:13.1e}")
                continue
            theirs = fastest_ms(lambda p=procedure, b=beta, d=damping: fixed_point(p, b, d), 5)
            error = abs(fixed_point(procedure, beta, damping)[0] - ia.optimal_transform(procedure, beta).win_rate)
            print(
                f"{procedure.label:14s}{beta:13.2f}{ours:13.1f}{theirs:13.0f}{theirs / ours:13.1f}"
                f"{error:13.1e}{own_error:13.1e}"
            )
    print("\nother calls, ms")
    curve = np.linspace(0.0, 2.0, 40)
    valley = ia.FittedProcedure((0.75, 0, 0, 0, 0, 0, 0, 0.25), 1000)
    levels = level_masses(np.random.default_rng(0).integers(0, 6, size=(200, 16)))
    calls: list[tuple[str, Callable[[], object]]] = [
        ("frontier, 50 points, Best-of-4", lambda: frontier(ia.BestOfN(4), 2.0, 50)),
        ("frontier, 50 points, Worst-of-4", lambda: frontier(ia.WorstOfN(4), 2.0, 50)),
        ("limit at one KL, Best-of-4", lambda: limit(ia.BestOfN(4), 0.5)),
        ("limit at 40 KLs, Best-of-4", lambda: limit(ia.BestOfN(4), curve)),
        ("limit at 40 KLs, Worst-of-4", lambda: limit(ia.WorstOfN(4), curve)),
        ("not concave: 3/4 worst, 1/4 best of 8", lambda: limit(valley, curve)),
        ("not concave: Worst-of-4 v Best-of-4", lambda: limit(ia.WorstOfN(4), curve, ia.BestOfN(4))),
        ("not concave: 5th of 9 v Best-of-16", lambda: limit(ia.OrderStatistic(k=5, n=9), curve, ia.BestOfN(16))),
        ("with ties, 200 prompts, 6 levels", lambda: limit(ia.BestOfN(16), curve, levels=levels)),
        ("plan at KL 1 inside a jump", lambda: ia.plan(valley, kl_budget=1.0)),
        ("optimum at KL 0.5, Best-of-4", lambda: optimum_at_kl(ia.BestOfN(4), 0.5)),
        ("plan at KL 0.5, Best-of-4", lambda: ia.plan(ia.BestOfN(4), kl_budget=0.5)),
        ("optimum, Best-of-10000, beta 0.1", lambda: ia.optimal_transform(ia.BestOfN(10_000), 0.1)),
        ("optimum, Worst-of-10000, beta 0.001", lambda: ia.optimal_transform(ia.WorstOfN(10_000), 1e-3)),
        ("optimum, Worst-of-64 against one sample", lambda: ia.optimal_transform(ia.WorstOfN(64), 0.1, ia.Standard())),
        ("its table, Best-of-4, beta 0.1", lambda: ia.optimal_transform(ia.BestOfN(4), 0.1).transform),
    ]
    for name, call in calls:
        print(f"{name:38s} {fastest_ms(call, 5):8.1f}")


if __name__ == "__main__":
    main()
