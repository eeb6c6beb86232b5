"""The optimum and the limit where the objective is not concave (M18)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

import infalign as ia
from infalign.numerics.quadrature import mesh_with_knots
from infalign.theory.envelope import forget
from infalign.theory.frontier import frontier
from infalign.theory.plan import optimum_at_kl

VALLEY = ia.FittedProcedure((0.75, 0, 0, 0, 0, 0, 0, 0.25), 1000)
UNLIKE = [
    (VALLEY, None),
    (ia.WorstOfN(4), ia.BestOfN(4)),
    (ia.OrderStatistic(k=5, n=9), ia.BestOfN(16)),
    (ia.OrderStatistic(k=2, n=4), ia.BestOfN(4)),
]


def names(value):
    return "itself" if value is None else value.label if isinstance(value, ia.InferenceProcedure) else None


def measured(log_density, procedure, opponent, edges=()):
    """KL and W of a density on a mesh of its own, from the definitions M7 and M8."""
    mesh = mesh_with_knots(np.asarray(edges, dtype=float), spacing=0.25)
    logs = log_density(mesh.u)
    logs = logs - logs.max()
    logs = logs - np.log(mesh.integral(np.exp(logs)))
    cdf = np.clip(mesh.cumulative(np.exp(logs))[0], 0.0, 1.0)
    lost = sum(
        weight * mesh.integral(part.distortion(cdf) * (part if opponent is None else opponent).density(mesh.u))
        for weight, part in procedure.components
    )
    return mesh.integral(np.exp(logs) * logs), 1.0 - lost


def test_the_best_of_two_stationary_densities_is_found():
    best = ia.optimal_transform(VALLEY, beta=0.05)
    assert best.win_rate - 0.05 * best.kl == pytest.approx(0.7947482, abs=1e-6)
    assert not best.unique
    assert best.residual < 1e-8


@pytest.mark.parametrize(("procedure", "opponent"), UNLIKE, ids=names)
@pytest.mark.parametrize("beta", [1.0, 0.3, 0.1, 0.03, 0.01])
def test_no_power_or_step_has_a_higher_objective(procedure, opponent, beta):
    best = ia.optimal_transform(procedure, beta, opponent)
    value = best.win_rate - beta * best.kl
    assert best.residual < 1e-8
    for k in (1, 2, 5, 40):
        for c in (0.1, 1.0, 5.0, 50.0):
            for log_density in (lambda u, k=k, c=c: c * u**k, lambda u, k=k, c=c: -c * (1 - u) ** k):
                kl, win_rate = measured(log_density, procedure, opponent)
                assert win_rate - beta * kl <= value + 1e-9
    for edge in (0.1, 0.5, 0.9, 0.99):
        kl, win_rate = measured(lambda u, edge=edge: np.where(u < edge, -8.0, 0.0), procedure, opponent, [edge])
        assert win_rate - beta * kl <= value + 1e-9


@pytest.mark.parametrize(
    ("procedure", "opponent", "kls", "values"),
    [
        (VALLEY, None, [0.5, 1.0, 2.0, 3.0], [0.79477, 0.82539, 0.88640, 0.94465]),
        (ia.WorstOfN(4), ia.BestOfN(4), [0.5, 1.0, 2.0, 3.0], [0.18729, 0.35510, 0.67627, 0.86778]),
        (ia.OrderStatistic(k=5, n=9), ia.BestOfN(16), [0.1, 1.0, 3.0], [0.04453, 0.42026, 0.90934]),
        (ia.OrderStatistic(k=2, n=4), ia.BestOfN(4), [0.5], [0.40294]),
    ],
    ids=names,
)
def test_values_of_the_limit(procedure, opponent, kls, values):
    together = ia.limit(procedure, kls, opponent)
    assert together == pytest.approx(values, abs=1e-5)
    for kl, value in zip(kls, together, strict=True):
        assert float(ia.limit(procedure, kl, opponent)) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("procedure", [ia.BestOfN(4), ia.WorstOfN(8), VALLEY], ids=names)
def test_a_limit_at_one_kl_does_not_depend_on_what_else_is_asked(procedure):
    forget()
    alone = float(ia.limit(procedure, 0.3))
    forget()
    assert ia.limit(procedure, [1.4, 0.31, 0.3, 0.0])[2] == alone


@pytest.mark.parametrize(("procedure", "opponent"), UNLIKE, ids=names)
def test_the_limit_is_concave_and_supported_by_every_optimum(procedure, opponent):
    """min over β of J(β) + β KL: every optimum's tangent lies above it, and the optimum on it."""
    kls = np.linspace(0.0, 4.0, 41)
    curve = ia.limit(procedure, kls, opponent)
    assert (np.diff(curve, 2) < 1e-6).all()
    for beta in (0.7, 0.2, 0.06, 0.02):
        best = ia.optimal_transform(procedure, beta, opponent)
        assert (curve <= best.win_rate + beta * (kls - best.kl) + 1e-6).all()
        assert float(ia.limit(procedure, best.kl, opponent)) == pytest.approx(best.win_rate, abs=1e-6)


@pytest.mark.parametrize(
    ("procedure", "opponent", "kl"),
    [
        (ia.OrderStatistic(k=5, n=9), ia.BestOfN(16), 1.0),
        (VALLEY, None, 1.0),
        (VALLEY, None, 3.0),
        (ia.WorstOfN(4), ia.BestOfN(4), 0.5),
        (ia.WorstOfN(4), ia.BestOfN(4), 2.0),
    ],
    ids=names,
)
def test_a_plan_inside_a_jump_spends_its_budget_and_says_where_the_limit_is(procedure, opponent, kl):
    made = ia.plan(procedure, kl_budget=kl, opponent=opponent)
    assert made.best.kl == pytest.approx(kl, rel=1e-6)
    tabulated = ia.TiltedPolicy(made.best.transform, made.best.beta)
    assert tabulated.kl == pytest.approx(kl, rel=1e-5)
    assert tabulated.win_rate(procedure, opponent) == pytest.approx(made.best.win_rate, abs=1e-6)
    assert made.limit == pytest.approx(float(ia.limit(procedure, kl, opponent)), abs=1e-6)
    assert made.limit >= made.best.win_rate
    assert ("limit is" in made.best.note) == (made.limit > made.best.win_rate + 2e-6)
    for option in made.alternatives:
        assert option.win_rate <= made.best.win_rate + 1e-9
    assert made.to_dict(with_transforms=False)["limit"] == made.limit


def test_the_best_policy_inside_a_jump_is_stationary_among_policies_of_its_kl():
    best = optimum_at_kl(ia.OrderStatistic(k=5, n=9), 1.0, ia.BestOfN(16))
    assert best.residual < 1e-8
    assert best.win_rate < float(ia.limit(ia.OrderStatistic(k=5, n=9), 1.0, ia.BestOfN(16))) - 1e-3


@pytest.mark.parametrize(("procedure", "opponent"), UNLIKE, ids=names)
def test_the_frontier_takes_in_both_ends_of_a_jump(procedure, opponent):
    curve = frontier(procedure, 3.0, 60, opponent)
    assert curve.kl[0] == 0
    assert curve.kl[-1] == pytest.approx(3.0, rel=1e-9)
    assert (np.diff(curve.kl) > 0).all()
    assert (np.diff(curve.beta) < 1e-3).all()
    kls = np.linspace(0.0, 3.0, 23)
    assert curve.at(kls) == pytest.approx(ia.limit(procedure, kls, opponent), abs=2e-5)


def test_any_kl_of_an_unlike_pair_is_met():
    for kl in (0.01, 0.1, 0.6, 1.5, 2.5, 4.0):
        assert optimum_at_kl(ia.OrderStatistic(k=5, n=9), kl, ia.BestOfN(16)).kl == pytest.approx(kl, rel=1e-6)


SIDES = st.one_of(
    st.integers(1, 24).map(ia.BestOfN),
    st.integers(1, 24).map(ia.WorstOfN),
    st.integers(2, 24).flatmap(lambda n: st.integers(1, n).map(lambda k: ia.OrderStatistic(k=k, n=n))),
    st.lists(st.sampled_from([0.0, 0.0, 0.2, 1.0, 5.0]), min_size=2, max_size=12)
    .filter(any)
    .map(lambda w: ia.FittedProcedure(tuple(np.array(w) / sum(w)), 1000)),
)
MIXTURES = st.tuples(st.floats(0.1, 0.9), SIDES, SIDES).map(lambda m: ia.Mixture([(m[0], m[1]), (1 - m[0], m[2])]))
SHAPES = st.one_of(
    st.tuples(st.just("step"), st.floats(0.001, 0.9999), st.floats(0.0, 12.0)),
    st.tuples(st.just("power"), st.floats(0.1, 60.0), st.floats(0.0, 60.0)),
    st.tuples(st.just("mirror"), st.floats(0.1, 60.0), st.floats(0.0, 60.0)),
    st.tuples(st.just("log"), st.just(0.0), st.floats(0.0, 40.0)),
    st.tuples(st.just("exponential"), st.floats(-30.0, 30.0), st.floats(0.0, 60.0)),
)


def log_density_of(shape):
    """A policy that can be written down, as its log density and the places where it is not smooth."""
    kind, a, c = shape
    if kind == "step":
        return (lambda u: np.where(u < a, -c, 0.0)), [a]
    if kind == "power":
        return (lambda u: c * u**a), []
    if kind == "mirror":
        return (lambda u: -c * (1 - u) ** a), []
    if kind == "log":
        return (lambda u: c * np.log(np.maximum(u, 1e-300))), []
    return (lambda u: c * ia.Exponential(a)(u)), []


@seed(18)
@given(
    procedure=st.one_of(SIDES, MIXTURES),
    opponent=st.one_of(st.none(), SIDES),
    shapes=st.lists(SHAPES, min_size=3, max_size=6),
)
@settings(max_examples=12, deadline=None)
def test_no_policy_that_can_be_written_down_lies_above_the_limit(procedure, opponent, shapes):
    policies = [measured(log_density, procedure, opponent, edges) for log_density, edges in map(log_density_of, shapes)]
    limits = ia.limit(procedure, [max(kl, 0.0) for kl, _ in policies], opponent)
    for (kl, win_rate), most in zip(policies, limits, strict=True):
        assert win_rate <= most + 2e-6, (kl, win_rate, most)


def test_a_curve_that_ends_early_is_no_limit():
    """h of early stopping jumps. Beyond the last optimum that was found the limit must not be called flat."""
    procedure, opponent = ia.EarlyStopping(7, 0.5264604411551874), ia.BestOfN(64)
    with pytest.raises(ia.InputError, match="where the limit still rises"):
        ia.limit(procedure, 2.0, opponent)
