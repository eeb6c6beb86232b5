"""The rank-conditional tilt and the price of finitely many reference rollouts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from scipy.special import logsumexp

import infalign as ia
from infalign.theory.finite_k import finite_k_prediction, tilt_at_ranks
from infalign.theory.plan import optimum_at_kl

TRANSFORMS = [
    ia.Identity(),
    ia.Log(),
    ia.Exponential(10.0),
    ia.Exponential(-10.0),
    ia.optimal_transform(ia.BestOfN(4), 0.1).transform,
]


@pytest.mark.parametrize("num_ref", [1, 2, 16, 257, 1000])
@pytest.mark.parametrize("beta", [2.0, 0.1, 0.01])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.label)
def test_the_normaliser_stays_exact(transform, beta, num_ref):
    tilt = ia.rank_conditional_tilt(transform, beta, num_ref)
    assert tilt.shape == (num_ref + 1,)
    assert np.isfinite(tilt).all()
    assert (np.diff(tilt) >= 0).all()
    mean = logsumexp(tilt / beta) - np.log(num_ref + 1)
    assert mean == pytest.approx(transform.log_partition(beta), abs=1e-9)


def test_hand_worked_values():
    # K = 1, Φ = log, β = 1: U | b=0 has mean 1/3, U | b=1 has mean 2/3.
    np.testing.assert_allclose(ia.rank_conditional_tilt(ia.Log(), 1.0, 1), np.log([1 / 3, 2 / 3]), atol=1e-14)
    # K = 1, Φ = u, β = 1: densities 2(1-u) and 2u, so 2(e-2) and 2.
    np.testing.assert_allclose(ia.rank_conditional_tilt(ia.Identity(), 1.0, 1), np.log([2 * (np.e - 2), 2]), atol=1e-12)


@given(num_ref=st.integers(1, 40), beta=st.floats(0.05, 5), t=st.floats(-20, 20))
@settings(max_examples=20, deadline=None)
def test_agrees_with_the_posterior_expectation(num_ref, beta, t):
    transform = ia.Exponential(t)
    b = num_ref // 2
    top = 1.0 / beta
    posterior = stats.beta(b + 1, num_ref - b + 1)
    mean, _ = integrate.quad(
        lambda u: posterior.pdf(u) * np.exp(transform(u) / beta - top), 0, 1, points=[0.9, 0.99], limit=500
    )
    expected = beta * (np.log(mean) + top)
    assert ia.rank_conditional_tilt(transform, beta, num_ref)[b] == pytest.approx(expected, abs=1e-7)


def test_tends_to_the_transform_for_many_references():
    transform, num_ref = ia.Exponential(5.0), 4000
    inner = np.arange(400, 3601)
    tilt = ia.rank_conditional_tilt(transform, 0.5, num_ref)[inner]
    assert np.abs(tilt - transform((inner + 1) / (num_ref + 2))).max() < 2e-3


@pytest.mark.parametrize("transform", [ia.Identity(), TRANSFORMS[-1]], ids=lambda transform: transform.label)
def test_many_references_are_no_trouble(transform):
    tilt, beta, num_ref = ia.rank_conditional_tilt(transform, 0.1, 20_000), 0.1, 20_000
    assert logsumexp(tilt / beta) - np.log(num_ref + 1) == pytest.approx(transform.log_partition(beta), abs=1e-9)
    b = 12_345  # the posterior by Gauss-Hermite in its normal approximation's width
    mean, _ = integrate.quad(
        lambda u: stats.beta.pdf(u, b + 1, num_ref - b + 1) * np.exp(transform(u) / beta),
        0.58,
        0.66,
        epsabs=0,
        limit=200,
    )
    assert tilt[b] == pytest.approx(beta * np.log(mean), abs=1e-9)


@pytest.mark.parametrize("num_ref", [0, -3, 2.5, True, "8", None, np.nan])
def test_refuses_what_is_no_number_of_references(num_ref):
    with pytest.raises(ia.InputError, match="num_ref"):
        ia.rank_conditional_tilt(ia.Identity(), 0.1, num_ref)


def test_ties_take_the_mean_over_the_ranks_they_could_have():
    beta, table = 0.5, np.log([1.0, 2.0, 4.0, 9.0]) * 0.5  # exp(table / beta) = 1, 2, 4, 9
    np.testing.assert_allclose(np.exp(tilt_at_ranks(table, beta, [0.0, 1.0, 3.0]) / beta), [1, 2, 9])
    np.testing.assert_allclose(np.exp(tilt_at_ranks(table, beta, [0.5, 2.5]) / beta), [1.5, 6.5])
    np.testing.assert_allclose(np.exp(tilt_at_ranks(table, beta, [1.0, 1.5], ties=[2, 3]) / beta), [7 / 3, 4.0])


@pytest.mark.parametrize(("ranks", "ties"), [([0.25], None), ([3.5], None), ([-1.0], None), ([1.0], [1]), ([0.5], [3])])
def test_ties_that_do_not_fit_are_refused(ranks, ties):
    with pytest.raises(ia.InputError, match="midrank"):
        tilt_at_ranks(np.zeros(4), 1.0, ranks, ties)


def test_ties_keep_the_normaliser_exact_when_broken_at_random():
    """Rewards rounded to few values: the mean of exp(Φ_K/β) over responses is still ∫ exp(Φ/β)."""
    rng, num_ref, prompts, beta, transform = np.random.default_rng(7), 12, 60_000, 0.5, ia.Exponential(4.0)
    table = ia.rank_conditional_tilt(transform, beta, num_ref)
    ref, response = np.floor(4 * rng.random((prompts, num_ref))), np.floor(4 * rng.random((prompts, 1)))
    below, ties = (ref < response).sum(axis=1), (ref == response).sum(axis=1)
    weights = np.exp(tilt_at_ranks(table, beta, below + ties / 2, ties) / beta)
    expected = np.exp(transform.log_partition(beta))
    assert abs(weights.mean() - expected) < 5 * weights.std() / np.sqrt(prompts)  # false alarm rate 6e-7


@pytest.mark.parametrize("procedure", [ia.BestOfN(4), ia.WorstOfN(4)], ids=lambda p: p.label)
def test_more_references_lose_less_and_the_kl_is_matched(procedure):
    best = optimum_at_kl(procedure, 0.5)
    lost = []
    for num_ref in (8, 32, 128):
        prediction = finite_k_prediction(best, num_ref, num_prompts=800)
        assert prediction.kl == pytest.approx(0.5, abs=1e-4)
        lost.append(prediction.win_rate_lost)
        assert prediction.win_rate_standard_error < 0.003
    assert lost[0] > lost[1] > lost[2] > 0


def test_best_of_4_costs_what_simulation_found_before():
    best = optimum_at_kl(ia.BestOfN(4), 0.5)
    assert finite_k_prediction(best, 100).win_rate_lost == pytest.approx(0.012, abs=0.004)
    assert finite_k_prediction(best, 16).win_rate_lost == pytest.approx(0.05, abs=0.015)


def test_the_prediction_agrees_with_playing_it_out():
    rng, num_ref, prompts = np.random.default_rng(11), 6, 40_000
    best = ia.optimal_transform(ia.BestOfN(2), 0.3)
    predicted = finite_k_prediction(best, num_ref, match_kl=False, num_prompts=20_000, seed=1)
    weights = np.exp(ia.rank_conditional_tilt(best.transform, 0.3, num_ref) / 0.3)
    ref = np.sort(rng.random((prompts, num_ref)), axis=1)
    edges = np.concatenate([np.zeros((prompts, 1)), ref, np.ones((prompts, 1))], axis=1)
    mass = np.diff(edges, axis=1) * weights
    cumulative = np.cumsum(mass, axis=1) / mass.sum(axis=1, keepdims=True)
    draws = []
    for _ in range(2):
        piece = (rng.random((prompts, 1)) > cumulative).sum(axis=1)
        low, high = (np.take_along_axis(edges, piece[:, None] + shift, axis=1)[:, 0] for shift in (0, 1))
        draws.append(low + (high - low) * rng.random(prompts))
    won = (np.maximum(*draws) > rng.random((prompts, 2)).max(axis=1)).mean()
    error = np.hypot(0.5 / np.sqrt(prompts), predicted.win_rate_standard_error)
    assert abs(won - predicted.win_rate) < 5 * error  # false alarm rate 6e-7


def test_too_few_references_for_the_budget_are_refused():
    for kl, num_ref in ((4.0, 3), (8.0, 32)):
        with pytest.raises(ia.InputError, match="cannot spend"):
            finite_k_prediction(optimum_at_kl(ia.BestOfN(4), kl), num_ref)


def test_a_simulation_needs_prompts_and_something_to_see():
    best = ia.optimal_transform(ia.BestOfN(4), 0.3)
    for prompts in (0, 1, -1, 2.5):
        with pytest.raises(ia.InputError, match="num_prompts"):
            finite_k_prediction(best, 8, num_prompts=prompts)
    with pytest.raises(ia.InputError, match="too little to be simulated"):
        finite_k_prediction(best, 1_000_000)
