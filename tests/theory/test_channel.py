"""The predictability-limited optimum (M14, M15) against M9, direct optimisation and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize, stats

import infalign as ia
from infalign.errors import InputError
from infalign.theory.channel import channel_optimum, channel_tilt
from infalign.theory.channel_path import channel_limit, channel_optimum_at_kl
from infalign.theory.predictability import channel_tilt_at_kl, gains_by_n, raw_tilt_at_kl, with_num_ref
from infalign.theory.winrate import Objective

# METHOD.md 9.1: the optimum and identity at 0.5 nats.
M15 = {
    0.5: [(0.702, 0.690), (0.788, 0.737), (0.902, 0.774), (0.708, 0.700), (0.782, 0.755)],
    0.7: [(0.777, 0.749), (0.889, 0.792), (0.979, 0.822), (0.797, 0.777), (0.898, 0.843)],
    0.9: [(0.843, 0.789), (0.953, 0.813), (0.997, 0.825), (0.894, 0.852), (0.986, 0.907)],
    1.0: [(0.873, 0.800), (0.972, 0.805), (0.999, 0.807), (0.948, 0.886), (0.9999, 0.924)],
}
# The same for a linear tilt of s: Best-of-N and Worst-of-N are mirror images.
RAW = {
    0.5: {4: 0.695, 16: 0.747, 64: 0.791},
    0.7: {4: 0.762, 16: 0.824, 64: 0.870},
    0.9: {4: 0.820, 16: 0.883, 64: 0.923},
}
PROCEDURES = [ia.BestOfN(4), ia.BestOfN(16), ia.BestOfN(64), ia.WorstOfN(4), ia.WorstOfN(16)]


def directly(procedure, beta, rho, opponent=None):
    """J by L-BFGS on the log tilt, on Gauss-Legendre panels: another grid, another method."""
    x, w = np.polynomial.legendre.leggauss(8)

    def panels(low, high, size):
        edges = np.linspace(low, high, round((high - low) / size) + 1)
        half = 0.5 * np.diff(edges)[:, None]
        return (0.5 * (edges[1:] + edges[:-1])[:, None] + half * x).ravel(), (half * w).ravel()

    width = np.sqrt(1 - rho**2)
    s, ds = panels(-8.5, 12.0, min(0.9, 3 * width))
    z, dz = panels(-8.5, 8.5, min(0.9, 3 * width))
    base = stats.norm.pdf(s) * ds
    du = stats.norm.pdf(z) * dz
    u = stats.norm.cdf(z)
    kernel = stats.norm.cdf((z[:, None] - rho * s) / width)
    opponent = opponent or procedure

    def loss(scaled):
        logs = scaled / scale
        masses = base * np.exp(logs - logs.max())
        total = masses.sum()
        masses = masses / total
        logs = logs - logs.max() - np.log(total)
        cdf = np.clip(kernel @ masses, 0, 1)
        win = 1 - du @ (procedure.distortion(cdf) * opponent.density(u))
        reward = -(du * procedure.density(cdf) * opponent.density(u)) @ kernel
        gap = reward - beta * logs
        return -(win - beta * (masses @ logs)), -(masses * (gap - masses @ gap)) / scale

    # What a policy keeps of each s differs by many orders: the variables are scaled anew where the last search ended.
    logs, best = np.zeros_like(s), -np.inf
    for _ in range(40):
        masses = base * np.exp(logs - logs.max())
        scale = np.sqrt(masses / masses.sum() + 1e-12)
        found = optimize.minimize(
            loss, logs * scale, jac=True, method="L-BFGS-B",
            options={"maxiter": 400, "ftol": 1e-16, "gtol": 1e-12, "maxcor": 40},
        )  # fmt: skip
        logs = found.x / scale
        if -found.fun < best + 1e-9:
            break
        best = -found.fun
    return best


@pytest.mark.parametrize("rho", M15)
def test_the_tables_of_the_method(rho):
    for procedure, (best, identity) in zip(PROCEDURES, M15[rho], strict=True):
        optimum = channel_optimum_at_kl(procedure, 0.5, rho)
        assert optimum.kl == pytest.approx(0.5, rel=1e-8)
        assert optimum.win_rate == pytest.approx(best, abs=6e-4)
        assert channel_tilt_at_kl(ia.Identity(), 0.5, rho).win_rate(procedure) == pytest.approx(identity, abs=6e-4)
        if rho < 1:
            assert raw_tilt_at_kl(0.5, rho).win_rate(procedure) == pytest.approx(RAW[rho][procedure.n], abs=6e-4)


@pytest.mark.parametrize(
    ("procedure", "beta", "rho"),
    [
        (ia.BestOfN(4), 0.2, 0.7),
        (ia.BestOfN(16), 0.05, 0.5),
        (ia.BestOfN(64), 0.1, 0.9),
        (ia.WorstOfN(4), 0.1, 0.7),
        (ia.WorstOfN(16), 0.2, 0.4),
    ],
)
def test_direct_optimisation_finds_nothing_better_and_the_same(procedure, beta, rho):
    optimum = channel_optimum(procedure, beta, rho)
    assert optimum.win_rate - beta * optimum.kl == pytest.approx(directly(procedure, beta, rho), abs=1e-6)


@pytest.mark.parametrize("procedure", [ia.BestOfN(4), ia.BestOfN(64), ia.WorstOfN(8)])
def test_full_predictability_is_the_idealised_theory(procedure):
    ideal = ia.optimal_transform(procedure, 0.1)
    optimum = channel_optimum(procedure, 0.1, 1.0)
    assert (optimum.kl, optimum.win_rate) == (ideal.kl, ideal.win_rate)
    assert optimum.transform == ideal.transform
    u = np.linspace(0, 1, 11)
    np.testing.assert_allclose(optimum.policy.cdf(u), ideal.tilt.cdf(u), atol=1e-9)
    # The channel's own solver goes there too: J is smooth in 1 - ρ².
    j = [(o := channel_optimum(procedure, 0.1, rho)).win_rate - 0.1 * o.kl for rho in (0.998, 0.999)]
    toward = j[1] + (j[1] - j[0]) * (1 - 0.999**2) / (0.999**2 - 0.998**2)
    assert toward == pytest.approx(ideal.win_rate - 0.1 * ideal.kl, abs=2e-5)


@pytest.mark.parametrize(
    ("procedure", "kl", "rho"),
    [
        (ia.BestOfN(256), 0.5, 0.1),
        (ia.BestOfN(256), 1.0, 0.6),
        (ia.BestOfN(256), 0.3, 0.999),
        (ia.WorstOfN(64), 0.5, 0.1),
        (ia.WorstOfN(64), 1.0, 0.6),
        (ia.WorstOfN(64), 0.15, 0.999),
        (ia.BestOfN(1), 0.5, 0.8),
    ],
)
def test_it_goes_from_little_to_nearly_all(procedure, kl, rho):
    optimum = channel_optimum_at_kl(procedure, kl, rho)
    assert optimum.kl == pytest.approx(kl, rel=1e-8)
    limit = float(ia.limit(procedure, kl))
    assert 0.5 < optimum.win_rate <= limit + 1e-9
    # What the transform leads to is the same policy.
    again = channel_tilt(optimum.transform, optimum.beta, rho)
    assert again.kl == pytest.approx(kl, rel=2e-5)
    assert again.win_rate(procedure) == pytest.approx(optimum.win_rate, abs=2e-6)


def test_simulated_responses_win_as_often():
    rho, n, size = 0.7, 4, 200_000
    optimum = channel_optimum_at_kl(ia.BestOfN(n), 0.5, rho)
    rng = np.random.default_rng(5)
    grid = np.linspace(-8, 9, 20001)
    log_tilt = optimum.policy.log_tilt(grid)
    masses = np.exp(log_tilt) * stats.norm.pdf(grid) * (grid[1] - grid[0])
    assert masses.sum() == pytest.approx(1.0, abs=1e-8)
    assert masses @ log_tilt == pytest.approx(0.5, abs=1e-6)
    s = np.interp(rng.random((size, n)), np.cumsum(masses), grid)
    z = rho * s + np.sqrt(1 - rho**2) * rng.standard_normal((size, n))
    wins = z.max(axis=1) > rng.standard_normal((size, n)).max(axis=1)
    # False alarms: 1 in 15,000 (four standard errors); seeded.
    assert wins.mean() == pytest.approx(optimum.win_rate, abs=4 * 0.5 / np.sqrt(size))
    u = np.linspace(0.05, 0.95, 7)
    np.testing.assert_allclose(
        optimum.policy.cdf(u), [(z < stats.norm.ppf(v)).mean() for v in u], atol=4 * 0.5 / np.sqrt(size * n)
    )


def test_a_shift_of_a_gaussian_score_has_a_closed_form():
    rho, shift = 0.6, 0.8
    policy = channel_tilt(ia.Identity(), 1.0, rho)
    # E[U | s] = P(Z' < Z | s): another standard normal below.
    s = np.array([-1.0, 0.0, 2.0])
    slope = np.diff(policy.log_tilt(s))
    expected = np.diff(stats.norm.cdf(rho * s / np.sqrt(2 - rho**2)))
    np.testing.assert_allclose(slope, expected, rtol=1e-10)
    # A sharp transform's expectation, by Monte Carlo-free quadrature of SciPy.
    exponential = channel_tilt(ia.Exponential(10.0), 0.3, rho)
    width = np.sqrt(1 - rho**2)
    means = [
        stats.norm(rho * v, width).expect(lambda z: float(ia.Exponential(10.0)(stats.norm.cdf(z))))
        for v in (0.0, shift)
    ]
    got = np.diff(exponential.log_tilt([0.0, shift]))[0]
    assert got == pytest.approx((means[1] - means[0]) / 0.3, rel=1e-6)


@pytest.mark.parametrize("procedure", PROCEDURES)
def test_the_useful_kl_of_a_small_shift_is_rho_squared(procedure):
    optimum = channel_optimum_at_kl(procedure, 1e-4, 0.6)
    z = np.linspace(-6, 6, 4001)
    density = np.diff(optimum.policy.cdf(stats.norm.cdf(z))) / np.diff(stats.norm.cdf(z))
    useful = np.sum(np.diff(stats.norm.cdf(z)) * (density * np.log(density) - density + 1))
    assert useful / optimum.kl <= 0.6**2 + 1e-6


def test_an_objective_with_several_optima_keeps_the_best():
    fitted = ia.FittedProcedure((0.75, 0, 0, 0, 0, 0, 0, 0.25), 1000)
    for rho, beta in ((0.97, 0.05), (0.9, 0.1)):
        optimum = channel_optimum(fitted, beta, rho)
        assert not optimum.unique
        assert optimum.win_rate - beta * optimum.kl >= directly(fitted, beta, rho) - 1e-6
    against = channel_optimum(ia.OrderStatistic(k=5, n=9), 0.3, 0.97, ia.BestOfN(16))
    assert against.win_rate - 0.3 * against.kl > 0.1


def test_the_limit_is_concave_and_above_every_named_transform():
    kls = np.array([0.05, 0.2, 0.5, 1.0, 2.0])
    for procedure, opponent in (
        (ia.BestOfN(8), None),
        (ia.WorstOfN(4), ia.BestOfN(4)),
        (ia.OrderStatistic(k=5, n=9), ia.BestOfN(16)),
    ):
        limits = channel_limit(procedure, kls, 0.8, opponent)
        slopes = np.diff(limits) / np.diff(kls)
        assert (np.diff(slopes) < 1e-7).all()
        # One KL alone has the same limit.
        assert float(channel_limit(procedure, 0.5, 0.8, opponent)) == pytest.approx(limits[2], abs=1e-7)
        named = [
            channel_tilt(transform, beta, 0.8)
            for transform in (ia.Identity(), ia.Exponential(10.0), ia.Exponential(-10.0), ia.Log())
            for beta in (0.05, 0.2, 1.0)
        ]
        best = channel_limit(procedure, [policy.kl for policy in named], 0.8, opponent)
        for policy, bound in zip(named, best, strict=True):
            assert policy.win_rate(procedure, opponent) <= bound + 1e-7


def test_more_predictable_is_better():
    limits = [float(channel_limit(ia.BestOfN(16), 0.5, rho)) for rho in (0.1, 0.3, 0.6, 0.9, 0.99, 0.999, 1.0)]
    assert (np.diff(limits) > 0).all()


def test_what_is_out_of_reach_is_refused_with_the_range():
    with pytest.raises(InputError, match=r"out of reach.*The reachable KL is at most") as error:
        channel_optimum_at_kl(ia.WorstOfN(64), 5.0, 0.99)
    reach = float(str(error.value).split("at most ")[1].split()[0])
    assert 0.2 < reach < 1.0
    # The limit itself goes on: hardly anything is left to win there.
    assert float(channel_limit(ia.WorstOfN(64), 5.0, 0.99)) > 0.9999
    with pytest.raises(InputError, match="out of range"):
        channel_optimum(ia.BestOfN(4), 0.1, 1.2)
    with pytest.raises(InputError, match=r"Use 0\.999 or 1"):
        channel_optimum(ia.BestOfN(4), 0.1, 0.99999)
    with pytest.raises(InputError, match="too small"):
        channel_optimum(ia.BestOfN(4), 1e-8, 0.5)


def test_every_part_of_a_mixture_counts():
    mixture = ia.Mixture([(0.7, ia.Standard()), (0.3, ia.BestOfN(8))])
    optimum = channel_optimum(mixture, 0.1, 0.7)
    parts = 0.7 * optimum.policy.win_rate(ia.Standard()) + 0.3 * optimum.policy.win_rate(ia.BestOfN(8))
    assert optimum.win_rate == pytest.approx(parts, abs=1e-10)
    assert len(Objective.of(mixture).terms) == 2


def test_a_plan_and_the_limit_take_a_predictability():
    plan = ia.plan(ia.BestOfN(16), kl_budget=0.5, predictability=0.7, num_ref=64, others=ia.Standard())
    optimum = channel_optimum_at_kl(ia.BestOfN(16), 0.5, 0.7)
    assert (plan.predictability, plan.best.beta) == (0.7, pytest.approx(optimum.beta, rel=1e-7))
    assert plan.idealised.win_rate == pytest.approx(ia.plan(ia.BestOfN(16), kl_budget=0.5).best.win_rate, abs=1e-9)
    assert plan.best.win_rate == pytest.approx(float(ia.limit(ia.BestOfN(16), 0.5, predictability=0.7)), abs=1e-7)
    for option in plan.alternatives:
        assert option.kl == pytest.approx(0.5, rel=1e-6)
        assert option.win_rate <= plan.best.win_rate + 1e-7
        assert option.other_win_rates == {"Standard": option.standard_win_rate}
    # The curve to interpolate agrees with single points.
    kls = [0.03, 0.3, 0.9]
    np.testing.assert_allclose(plan.frontier.at(kls), ia.limit(ia.BestOfN(16), kls, predictability=0.7), atol=1e-6)


def test_few_references_cost_what_simulation_says():
    """K = 8 references per prompt, the posterior mean as reward, by simulation at two scores."""
    rho, num_ref = 0.7, 8
    optimum = channel_optimum_at_kl(ia.BestOfN(16), 0.5, rho)
    coarse = with_num_ref(optimum.transform, num_ref)
    rng = np.random.default_rng(3)
    b = np.arange(num_ref + 1)
    by_rank = [
        stats.beta(k + 1, num_ref - k + 1).expect(lambda u: float(optimum.transform(min(max(u, 0.0), 1.0)))) for k in b
    ]
    for s in (0.0, 2.0):
        u = stats.norm.cdf(rho * s + np.sqrt(1 - rho**2) * rng.standard_normal(200_000))
        seen = np.array(by_rank)[rng.binomial(num_ref, u)]
        # Four standard errors; seeded.
        assert coarse(u).mean() == pytest.approx(seen.mean(), abs=4 * (seen - coarse(u)).std() / np.sqrt(u.size))
    policy = channel_tilt_at_kl(coarse, 0.5, rho)
    assert policy.win_rate(ia.BestOfN(16)) < optimum.win_rate - 0.02


def test_the_table_of_n_names_the_k_that_is_enough():
    four, sixteen = gains_by_n(ia.BestOfN, 0.5, 0.7, sizes=(4, 16))
    assert (four.num_ref, sixteen.num_ref) == (16, 128)
    assert sixteen.gain == pytest.approx(0.097, abs=1e-3)
    assert sixteen.ideal_limit == pytest.approx(0.972, abs=1e-3)
    # Worst-of-64 cannot spend half a nat where it tilts the rank itself.
    (worst,) = gains_by_n(ia.WorstOfN, 0.5, 0.6, sizes=(64,))
    assert worst.ideal_limit is None
    assert worst.limit == pytest.approx(0.910, abs=1e-3)


def test_tiny_kls_are_on_the_root_that_the_curve_starts_with():
    """W - 1/2 = c sqrt(KL) near 0: never below what a little policy reaches."""
    limit = ia.limit(ia.BestOfN(16), [0.0, 1e-12, 4e-10, 1e-8], predictability=0.5)
    assert limit[1:] - 0.5 == pytest.approx((limit[3] - 0.5) * np.sqrt([1e-4, 0.04, 1.0]), rel=1e-3)
    assert limit[0] == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("predictability", [0.5, 1.0])
def test_a_policy_that_does_not_move_is_no_plan(predictability):
    with pytest.raises(ia.InputError, match="leaves the policy at the reference"):
        ia.plan(ia.BestOfN(4), beta=1e10, predictability=predictability)
    with pytest.raises(ia.InputError, match="lost in rounding"):
        ia.plan(ia.BestOfN(4), kl_budget=5e-12, predictability=predictability)


def test_where_nothing_can_be_solved_that_is_said():
    """h of early stopping jumps."""
    with pytest.raises(ia.InputError, match="too sharp to be resolved"):
        ia.limit(ia.EarlyStopping(12, 0.8), 0.5, predictability=0.7)
