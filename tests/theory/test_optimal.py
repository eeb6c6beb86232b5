"""The optimal transform against its check values, exact identities, other optimisers and its own optimality."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize

import infalign as ia
from infalign.theory.solver import solve
from infalign.theory.winrate import Objective
from infalign.transforms import RewardTransform

MIXTURE = ia.Mixture([(0.7, ia.Standard()), (0.3, ia.BestOfN(8))])
FITTED = ia.FittedProcedure((0.05, 0.05, 0.1, 0.2, 0.6), 1000)
PROCEDURES = [
    ia.Standard(),
    ia.BestOfN(2),
    ia.BestOfN(64),
    ia.BestOfN(10_000),
    ia.WorstOfN(4),
    ia.WorstOfN(64),
    ia.WorstOfN(10_000),
    ia.OrderStatistic(k=3, n=5),
    ia.OrderStatistic(k=5000, n=10_000),
    ia.OrderStatistic(k=2, n=10_000),
    MIXTURE,
    ia.Mixture([(0.5, ia.BestOfN(16)), (0.5, ia.WorstOfN(16))]),
    FITTED,
]


@pytest.mark.parametrize(
    ("procedure", "beta", "kl", "win_rate", "standard"),
    [
        (ia.BestOfN(2), 0.1, 1.0970, 0.90725, 0.8467),
        (ia.BestOfN(4), 0.3, 0.3701, 0.84014, 0.6764),
        (ia.BestOfN(4), 0.05, 1.3234, 0.96209, 0.8062),
        (ia.BestOfN(8), 0.1, 0.6856, 0.95422, 0.6782),
        (ia.WorstOfN(4), 0.3, 0.4089, 0.92500, 0.7091),
        (ia.WorstOfN(4), 0.1, 0.6836, 0.97500, 0.7789),
    ],
)
def test_check_values(procedure, beta, kl, win_rate, standard):
    best = ia.optimal_transform(procedure, beta=beta)
    assert best.kl == pytest.approx(kl, abs=1e-4)
    assert best.win_rate == pytest.approx(win_rate, abs=1e-4)
    assert best.standard_win_rate == pytest.approx(standard, abs=1e-4)


@pytest.mark.parametrize("beta", [10.0, 0.1, 1e-3])
@pytest.mark.parametrize("procedure", PROCEDURES, ids=lambda procedure: procedure.label)
def test_solves_m9_from_end_to_end(procedure, beta):
    best = ia.optimal_transform(procedure, beta)
    assert best.residual < 1e-8
    # The tilt of the table, which knows nothing of the solver, has the same KL and win rate.
    again = ia.TiltedPolicy(best.transform, beta)
    assert again.kl == pytest.approx(best.kl, rel=1e-7, abs=1e-7)
    assert again.win_rate(procedure) == pytest.approx(best.win_rate, abs=1e-8)
    assert best.tilt.kl == pytest.approx(best.kl, rel=1e-8, abs=1e-8)
    assert best.tilt.win_rate(procedure) == pytest.approx(best.win_rate, abs=1e-9)


@pytest.mark.parametrize("procedure", [ia.BestOfN(4), ia.WorstOfN(8), MIXTURE, FITTED], ids=lambda p: p.label)
def test_the_public_table_and_cdf_satisfy_m9(procedure):
    """The residual recomputed through the public face alone: Φ(u) against the integral of h(F) h0."""
    best = ia.optimal_transform(procedure, 0.07)
    x, w = np.polynomial.legendre.leggauss(8)
    edges = np.linspace(0, 1, 2001)
    u = edges[:-1, None] + np.diff(edges)[:, None] * (x + 1) / 2
    slope = sum(weight * part.density(best.tilt.cdf(u)) * part.density(u) for weight, part in procedure.components)
    integral = np.concatenate([[0.0], np.cumsum((slope * w).sum(axis=1) * np.diff(edges) / 2)])
    assert np.abs(best.transform(edges) - integral).max() < 1e-8


@pytest.mark.parametrize("n", [1, 2, 4, 64, 10_000])
@pytest.mark.parametrize("beta", [10.0, 1.0, 0.1, 1e-3])
def test_worst_of_n_wins_one_minus_beta_over_n_but_for_the_density_at_zero(n, beta):
    """docs/theory.md: W = 1 - (β/N) (1 - f(0)) exactly, and f(0) = 1/Z."""
    best = ia.optimal_transform(ia.WorstOfN(n), beta)
    assert best.win_rate == pytest.approx(1 - beta / n * (1 - np.exp(-best.log_partition)), abs=1e-10)


@pytest.mark.parametrize("n", [1, 2, 4, 64])
@pytest.mark.parametrize("beta", [10.0, 1.0, 0.1, 1e-3])
def test_best_of_n_wins_beta_over_n_times_the_density_at_one_less_one(n, beta):
    """docs/theory.md: W = (β/N) (f(1) - 1) exactly."""
    best = ia.optimal_transform(ia.BestOfN(n), beta)
    assert best.win_rate == pytest.approx(beta / n * (float(best.tilt.density(1.0)) - 1), rel=1e-5)


@pytest.mark.parametrize("beta", [5.0, 0.3, 0.01])
@pytest.mark.parametrize("procedure", [ia.BestOfN(1), ia.WorstOfN(1), ia.OrderStatistic(k=1, n=1)])
def test_one_response_is_standard_sampling(procedure, beta):
    best, mean = ia.optimal_transform(procedure, beta), -1.0 / np.expm1(-1.0 / beta) - beta
    assert best.win_rate == pytest.approx(mean, abs=1e-9)
    u = np.linspace(0, 1, 11)
    np.testing.assert_allclose(best.transform(u), u, atol=1e-9)
    assert ia.optimal_transform(ia.Standard(), beta).transform == ia.Identity()


def test_mirrored_order_statistics_do_not_mirror_their_optima():
    """Under u → 1-u Best turns into Worst but W into 1 - W: the symmetric partner of an optimum is a worst policy."""
    best, worst = ia.optimal_transform(ia.BestOfN(4), 0.3), ia.optimal_transform(ia.WorstOfN(4), 0.3)
    assert worst.win_rate - best.win_rate > 0.05


def test_order_statistics_at_the_ends_are_best_and_worst():
    for one, other in [(ia.OrderStatistic(k=4, n=4), ia.BestOfN(4)), (ia.OrderStatistic(k=1, n=4), ia.WorstOfN(4))]:
        assert ia.optimal_transform(one, 0.1).win_rate == pytest.approx(
            ia.optimal_transform(other, 0.1).win_rate, abs=1e-11
        )


def discretised_optimum(procedure, beta, cells):
    """Maximise W - β KL over densities that are constant on equal cells, by L-BFGS on their logarithms."""
    x, w = np.polynomial.legendre.leggauss(12)
    x, w = (x + 1) / 2, w / 2
    u = (np.arange(cells)[:, None] + x) / cells

    def loss(theta):
        p = np.exp(theta - theta.max())
        p /= p.sum()
        left = np.cumsum(p) - p
        cdf = np.clip(left[:, None] + p[:, None] * x, 0, 1)
        weighted = w * procedure.density(u) / cells
        value = (procedure.distortion(cdf) * weighted).sum()
        kl = (p * np.log(np.maximum(p * cells, 1e-300))).sum()
        pull = procedure.density(cdf) * weighted
        after = pull.sum() - np.cumsum(pull.sum(axis=1))
        gradient = (pull * x).sum(axis=1) + after + beta * np.log(np.maximum(p * cells, 1e-300))
        return value + beta * kl, p * (gradient - p @ gradient)

    found = optimize.minimize(
        loss,
        np.zeros(cells),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 5000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-10},
    )
    return 1 - found.fun


@pytest.mark.parametrize("beta", [0.5, 0.1])
@pytest.mark.parametrize(
    "procedure", [ia.BestOfN(4), ia.WorstOfN(4), ia.OrderStatistic(k=2, n=3)], ids=lambda p: p.label
)
def test_a_direct_optimiser_on_the_discretised_problem_comes_up_to_it_from_below(procedure, beta):
    best = ia.optimal_transform(procedure, beta)
    value = best.win_rate - beta * best.kl
    coarse, fine = (discretised_optimum(procedure, beta, cells) for cells in (60, 120))
    assert coarse < fine < value + 1e-9
    # The error of piecewise constant densities is of second order: a quarter at twice the cells.
    assert value - fine < 0.3 * (value - coarse)
    assert (4 * fine - coarse) / 3 == pytest.approx(value, abs=0.4 * (value - fine))


class Perturbed(RewardTransform):
    """An optimal transform plus a smooth bump."""

    label = "perturbed"

    def __init__(self, base, amplitudes):
        self.base, self.amplitudes = base, amplitudes

    @property
    def knots(self):
        return self.base.knots

    def _value(self, u):
        waves = np.arange(1, self.amplitudes.size + 1)
        return self.base(u) + np.cos(np.pi * waves * np.asarray(u)[..., None]) @ self.amplitudes

    def to_dict(self):
        raise NotImplementedError


@pytest.mark.parametrize(
    "procedure", [ia.BestOfN(4), ia.WorstOfN(4), ia.BestOfN(32), MIXTURE, FITTED], ids=lambda p: p.label
)
def test_no_perturbation_improves_the_objective(procedure):
    rng, beta = np.random.default_rng(3), 0.15
    best = ia.optimal_transform(procedure, beta)
    value = best.win_rate - beta * best.kl
    for size in (1e-4, 1e-2, 0.3):
        for _ in range(6):
            tilt = ia.TiltedPolicy(Perturbed(best.transform, size * rng.normal(size=6)), beta)
            assert tilt.win_rate(procedure) - beta * tilt.kl <= value + 1e-9


@pytest.mark.parametrize("beta", [1.0, 0.1, 0.01])
@pytest.mark.parametrize(
    "procedure",
    [
        ia.WorstOfN(4),
        ia.WorstOfN(16),
        ia.OrderStatistic(k=3, n=5),
        ia.Mixture([(0.5, ia.BestOfN(16)), (0.5, ia.WorstOfN(16))]),
    ],
    ids=lambda p: p.label,
)
def test_five_starts_agree_where_uniqueness_is_not_proved(procedure, beta):
    best = ia.optimal_transform(procedure, beta)
    starts = [
        (ia.BestOfN(8), 0.03),
        (ia.WorstOfN(8), 0.03),
        (ia.Standard(), 0.02),
        (ia.BestOfN(2), 5.0),
        (ia.OrderStatistic(k=5, n=9), 0.1),
    ]
    for other, other_beta in starts:
        again = solve(Objective.of(procedure), beta, solve(Objective.of(other), other_beta))
        assert again.kl == pytest.approx(best.kl, abs=1e-9)
        assert again.win_rate == pytest.approx(best.win_rate, abs=1e-10)


def test_says_where_uniqueness_is_proved():
    proved = [ia.BestOfN(4), ia.Standard(), MIXTURE, ia.WorstOfN(4)]
    assert all(ia.optimal_transform(procedure, 0.3).unique for procedure in proved)
    assert not ia.optimal_transform(ia.OrderStatistic(k=2, n=3), 0.3).unique
    assert not ia.optimal_transform(ia.WorstOfN(4), 0.3, opponent=ia.BestOfN(4)).unique


@pytest.mark.parametrize(("n", "m"), [(4, 2), (3, 5), (4, 1)])
def test_only_the_opponents_number_enters_the_identities(n, m):
    worst = ia.optimal_transform(ia.WorstOfN(n), 0.3, opponent=ia.WorstOfN(m))
    assert worst.win_rate == pytest.approx(1 - 0.3 / m * (1 - np.exp(-worst.log_partition)), abs=1e-11)
    best = ia.optimal_transform(ia.BestOfN(n), 0.3, opponent=ia.BestOfN(m))
    at_one = np.exp(float(best.transform(1.0)) / 0.3 - best.log_partition)
    assert best.win_rate == pytest.approx(0.3 / m * (at_one - 1), abs=1e-11)


def test_the_kl_of_worst_of_n_grows_by_log_beta_over_n():
    for n in (2, 4, 16):
        gap = ia.optimal_transform(ia.WorstOfN(n), 1e-4).kl - ia.optimal_transform(ia.WorstOfN(n), 1e-2).kl
        assert gap == pytest.approx(np.log(100) / n, abs=1e-8)


@pytest.mark.parametrize("beta", [10.0, 0.3, 1e-3])
@pytest.mark.parametrize(
    "procedure",
    [ia.BestOfN(4), ia.WorstOfN(64), ia.WorstOfN(1000), ia.OrderStatistic(k=5, n=9), PROCEDURES[-2], FITTED],
    ids=lambda p: p.label,
)
def test_against_one_sample_the_density_is_affine_in_the_distortion(procedure, beta):
    """docs/theory.md: f = f(0) + H(F)/β exactly, whatever the procedure."""
    best = ia.optimal_transform(procedure, beta, opponent=ia.Standard())
    assert best.unique
    assert best.residual < 1e-8
    solution = best.solution
    closed = (
        np.exp(-best.log_partition)
        + sum(weight * part.distortion(solution.cdf) for weight, part in procedure.components) / beta
    )
    np.testing.assert_allclose(solution.density, closed, rtol=1e-6, atol=1e-6 * closed.max())


def test_worst_of_10000_against_one_sample_is_solved_too():
    best = ia.optimal_transform(ia.WorstOfN(10_000), 1e-3, opponent=ia.Standard())
    assert best.win_rate == pytest.approx(1 - 1e-3, abs=1e-10)  # f(0) is exp(-1e7)
    assert best.residual < 1e-8


def test_an_opponent_changes_the_game():
    best = ia.optimal_transform(ia.BestOfN(4), 0.1, opponent=ia.Standard())
    assert best.win_rate == pytest.approx(best.tilt.win_rate(ia.BestOfN(4), ia.Standard()), abs=1e-11)
    other = ia.optimal_transform(ia.BestOfN(4), 0.1)
    own = best.win_rate - 0.1 * best.kl
    borrowed = other.tilt.win_rate(ia.BestOfN(4), ia.Standard()) - 0.1 * other.kl
    assert own > borrowed + 1e-4


def test_a_mixture_maximises_the_sum_of_its_parts():
    best = ia.optimal_transform(MIXTURE, 0.2)
    parts = 0.7 * best.tilt.win_rate(ia.Standard()) + 0.3 * best.tilt.win_rate(ia.BestOfN(8))
    assert best.win_rate == pytest.approx(parts, abs=1e-11)
    for procedure in (ia.Standard(), ia.BestOfN(8)):
        single = ia.optimal_transform(procedure, 0.2)
        assert single.tilt.win_rate(MIXTURE) - 0.2 * single.kl < best.win_rate - 0.2 * best.kl


@pytest.mark.parametrize("beta", [0.0, -0.1, np.nan, np.inf])
def test_refuses_a_beta_that_is_not_positive(beta):
    with pytest.raises(ia.InputError, match="beta"):
        ia.optimal_transform(ia.BestOfN(4), beta)
