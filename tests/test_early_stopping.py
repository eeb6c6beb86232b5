"""Early stopping in closed form, against simulation, quadrature and its own limits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

import infalign as ia

FALSE_ALARM = 1e-4

PROCEDURES = [
    ia.EarlyStopping(8, 0.9),
    ia.EarlyStopping(7, 0.6, block=3),
    ia.EarlyStopping(16, 0.95, block=4, num_ref=30),
    ia.EarlyStopping(7, 0.6, block=3, num_ref=20),
    ia.EarlyStopping(5, 1.0, num_ref=4),
]
every = pytest.mark.parametrize("procedure", PROCEDURES, ids=lambda procedure: procedure.label)


def simulate(procedure, count, rng):
    """What comes out, as quantiles, and what it cost, by doing it; K references are drawn where there are any."""
    draws = rng.random((count, procedure.n))
    threshold = np.full(count, procedure.stop_at)
    if procedure.num_ref is not None:
        references = np.sort(rng.random((count, procedure.num_ref)), axis=1)
        threshold = references[:, math.ceil(procedure.stop_at * procedure.num_ref) - 1]
    best, cost, at = np.zeros(count), np.zeros(count), 0
    going = np.ones(count, dtype=bool)
    for size in procedure.block_sizes:
        best[going] = np.maximum(best[going], draws[going, at : at + size].max(axis=1))
        cost[going] += size
        going &= best < threshold
        at += size
    return best, cost


@every
def test_agrees_with_a_simulation(procedure):
    """Four tests each; a false alarm once in 2,500 seeds for each procedure."""
    rng = np.random.default_rng(1)
    best, cost = simulate(procedure, 20_000, rng)
    assert stats.kstest(procedure.distortion(best), "uniform").pvalue > FALSE_ALARM
    assert stats.ttest_1samp(cost, procedure.expected_draws).pvalue > FALSE_ALARM
    assert stats.ttest_1samp(best, procedure.win_rate()).pvalue > FALSE_ALARM
    other = rng.random((20_000, 4)).max(axis=1)
    assert stats.binomtest(int((best > other).sum()), 20_000, procedure.win_rate(4)).pvalue > FALSE_ALARM


@every
def test_the_theory_engine_gives_the_same_win_rate(procedure):
    nearly_the_reference = ia.TiltedPolicy(ia.Identity(), beta=1e9)
    for m in (1, 3):
        assert nearly_the_reference.win_rate(procedure, ia.BestOfN(m)) == pytest.approx(procedure.win_rate(m), abs=1e-7)
    assert procedure.loss() == pytest.approx(procedure.n / (procedure.n + 1) - procedure.win_rate(), abs=1e-12)


def test_hand_worked_values():
    half = ia.EarlyStopping(2, 0.5)
    assert half.expected_draws == pytest.approx(1.5)
    assert half.distortion([0.4, 0.5, 0.75]) == pytest.approx([0.16, 0.25, 0.25 + 1.5 * 0.25])
    # ∫ H = ∫_0^½ u² + ∫_½^1 (¼ + 1.5 (u - ½)) = 1/24 + 1/8 + 3/16
    assert half.win_rate() == pytest.approx(1 - (1 / 24 + 1 / 8 + 3 / 16))
    assert half.loss() == pytest.approx(2 / 3 - half.win_rate())
    assert ia.EarlyStopping(8, 0.9).expected_draws == pytest.approx((1 - 0.9**8) / 0.1)
    assert ia.EarlyStopping(8, 0.9, block=4).expected_draws == pytest.approx(4 + 4 * 0.9**4)
    assert ia.EarlyStopping(7, 0.9, block=4).block_sizes == (4, 3)
    # One reference, stop at 1: the first draw beats it half of the time, the first two do not with chance 1/3.
    assert ia.EarlyStopping(3, 1.0, num_ref=1).expected_draws == pytest.approx(1 + 1 / 2 + 1 / 3)


@given(n=st.integers(1, 12), block=st.integers(1, 12), q=st.floats(0, 1), p=st.floats(0, 1))
def test_lies_between_one_block_and_all_of_them(n, block, q, p):
    block = min(n, block)
    procedure = ia.EarlyStopping(n, p, block)
    level = float(procedure.distortion(q))
    assert q**n - 1e-12 <= level <= q**block + 1e-12
    assert block - 1e-9 <= procedure.expected_draws <= n + 1e-9
    assert n / (n + 1) + 1e-12 >= procedure.win_rate() >= block / (block + 1) - 1e-12
    ends = ia.EarlyStopping(n, 0.0, block), ia.EarlyStopping(n, 1.0, block)
    assert ends[0].distortion(q) == pytest.approx(q**block, abs=1e-12)
    assert ends[1].distortion(q) == pytest.approx(q**n, abs=1e-12)


def test_many_references_find_the_exact_quantile():
    exact, many = ia.EarlyStopping(8, 0.9, 2), ia.EarlyStopping(8, 0.9, 2, num_ref=10**7)
    q = np.array([0.2, 0.8, 0.95, 0.99])
    assert many.distortion(q) == pytest.approx(exact.distortion(q), abs=1e-3)
    assert many.expected_draws == pytest.approx(exact.expected_draws, abs=1e-3)
    assert many.win_rate(8) == pytest.approx(exact.win_rate(8), abs=1e-4)


def test_the_mean_over_the_threshold_is_the_distortion_with_references():
    procedure = ia.EarlyStopping(6, 0.7, 2, num_ref=12)
    law = stats.beta(9, 4)  # ⌈0.7 · 12⌉ = 9
    for q in (0.3, 0.7, 0.9):

        def at(p, q=q):
            return law.pdf(p) * float(ia.EarlyStopping(6, p, 2).distortion(q))

        mean = integrate.quad(at, 0, q)[0] + integrate.quad(at, q, 1)[0]
        assert procedure.distortion(q) == pytest.approx(mean, abs=1e-9)


def test_there_is_an_optimal_transform_for_it():
    """With references h is smooth, so M9 has a solution, better for it than the one for Best-of-8 at the same KL."""
    procedure = ia.EarlyStopping(8, 0.9, num_ref=64)
    own = ia.optimal_transform(procedure, beta=0.1)
    assert own.residual < 1e-9
    at_its_kl = ia.plan(ia.BestOfN(8), kl_budget=own.kl).best
    assert own.win_rate > ia.TiltedPolicy(at_its_kl.transform, at_its_kl.beta).win_rate(procedure)
    with pytest.raises(ia.InputError, match="jumps"):
        ia.optimal_transform(ia.EarlyStopping(8, 0.9), beta=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0, "stop_at": 0.9}, "whole number"),
        ({"n": 4, "stop_at": 1.1}, "stop_at"),
        ({"n": 4, "stop_at": float("nan")}, "stop_at"),
        ({"n": 4, "stop_at": "0.9"}, "stop_at"),
        ({"n": 4, "stop_at": True}, "stop_at"),
        ({"n": 4, "stop_at": 0.9, "block": 5}, "block of 5"),
        ({"n": 4, "stop_at": 0.9, "block": 0}, "whole number"),
        ({"n": 4, "stop_at": 0.9, "num_ref": 0}, "whole number"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ia.InputError, match=message):
        ia.EarlyStopping(**arguments)
