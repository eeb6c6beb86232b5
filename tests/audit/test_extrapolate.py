"""Extrapolation: laws recovered where they hold, bounds that hold for any prompts, doubts where there is reason."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from infalign.audit.extrapolate import (
    BetaBinomial,
    HoldOut,
    PowerLaw,
    bounds,
    extrapolate,
    fit_beta_binomial,
    fit_power_law,
    hold_out,
)
from infalign.audit.success import sizes
from infalign.errors import InputError


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.2, 3), st.floats(1, 30), st.integers(4, 40))
def test_no_other_parameters_are_more_likely(seed, alpha, beta, num_attempts):
    rng = np.random.default_rng(seed)
    counts = rng.binomial(num_attempts, rng.beta(alpha, beta, 60))
    found = fit_beta_binomial(counts, num_attempts)
    if found is None:
        assert counts.sum() in (0, 60 * num_attempts)
        return

    def likelihood(a, b):
        return stats.betabinom.logpmf(counts, num_attempts, a, b).sum()

    best = likelihood(found.alpha, found.beta)
    assert best >= likelihood(alpha, beta) - 1e-4
    for factor in (0.9, 1.1):
        assert best >= likelihood(found.alpha * factor, found.beta) - 1e-4
        assert best >= likelihood(found.alpha, found.beta * factor) - 1e-4


def test_beta_binomial_rate_is_the_mean_over_prompts():
    law = BetaBinomial(0.4, 7.0)
    p = stats.beta(0.4, 7.0).ppf((np.arange(200_000) + 0.5) / 200_000)
    for n in (1, 8, 1000):
        assert law.rate(n) == pytest.approx(np.mean(1 - (1 - p) ** n), rel=1e-4)


def test_a_power_law_is_recovered_exactly():
    ns = sizes(64)
    law = fit_power_law(PowerLaw(3.0, 0.4).rate(ns), ns)
    assert (law.scale, law.exponent) == (pytest.approx(3.0), pytest.approx(0.4))
    assert fit_power_law([0.0, 0.0, 0.5], [1, 2, 4]) is None
    assert fit_power_law([0.0, 0.5, 0.7, 1.0], [1, 2, 4, 8]) is not None


def test_the_interval_covers_the_truth_where_the_law_holds():
    # 60 audits of 80 prompts, fitted at 16 attempts, predicted at 128. A coverage of 0.90 or more in truth fails
    # below 47 of 60 with probability under 0.4 %; the same seed always gives the same audits.
    rng = np.random.default_rng(3)
    law, covered, bounded = BetaBinomial(0.4, 12.0), 0, 0
    truth = float(law.rate(128))
    for seed in range(60):
        counts = rng.binomial(16, rng.beta(law.alpha, law.beta, 80))
        found = extrapolate(counts, 16, [128], resamples=60, seed=seed)
        covered += found.beta_binomial.low[0] <= truth <= found.beta_binomial.high[0]
        bounded += found.bounds.low[0] <= truth <= found.bounds.high[0]
    assert covered >= 47
    assert bounded >= 55


@pytest.mark.parametrize("kind", ["lognormal", "half immune", "two kinds", "one rate"])
def test_bounds_hold_whatever_the_prompts(kind):
    # Level 95 %, 200 audits: below 180 with probability under 0.2 % if the level were exactly held.
    rng = np.random.default_rng(7)

    def rates(count):
        return {
            "lognormal": lambda: np.minimum(1, np.exp(rng.normal(-6, 2, count))),
            "half immune": lambda: rng.beta(0.5, 10, count) * (rng.random(count) < 0.5),
            "two kinds": lambda: rng.choice([0.5, 0.002], count),
            "one rate": lambda: np.full(count, 0.005),
        }[kind]()

    n = 100
    truth = np.mean(1 - (1 - rates(400_000)) ** n)
    held = 0
    for _ in range(200):
        found = bounds(rng.binomial(32, rates(100)), 32, [n])
        held += found.low[0] <= truth <= found.high[0]
    assert held >= 180


def test_the_tangent_is_the_turing_estimate():
    found = bounds([0] * 80 + [1] * 5 + [3] * 15, 10, [20])
    assert found.rate[0] == pytest.approx(0.20 + 0.05)


def test_without_a_success_there_is_a_bound_and_nothing_else():
    found = extrapolate(np.zeros(60, int), 64, [128, 512])
    assert found.beta_binomial is None
    assert found.power_law is None
    exact = 1 - 0.05 ** (1 / 60)  # had each prompt broken with this chance, none of 60 would with 5 %
    assert found.bounds.high == [pytest.approx(2 * exact), pytest.approx(8 * exact)]
    assert "only an upper bound" in found.doubts[0]
    assert f"{100 * exact:.1f}%" in found.doubts[0]


@pytest.mark.parametrize("counts", [[2], [1, 3, 1], [15, 19, 16, 16, 24, 18]])
def test_where_every_prompt_broke_there_is_one_doubt(counts):
    """The laws disagree and reach far beyond 64 attempts, but nothing rests on them."""
    (doubt,) = extrapolate(counts, 64, [128, 1024], resamples=40).doubts
    assert doubt == "Every prompt broke within 64 attempts: nothing is left to extrapolate."


def test_a_law_is_not_said_to_miss_what_it_is_shown_to_predict():
    sharp = HoldOut(8, 64, 1.0, (0.99999, 0.9999, 0.99999), (0.992, 0.989, 0.9989))
    (doubt,) = sharp.doubts()
    assert "the power law would have predicted 99.2% (98.9 to 99.9) at N = 64; 100.0% were measured" in doubt


def test_doubts():
    rng = np.random.default_rng(1)
    sound = rng.binomial(64, rng.beta(0.5, 8, 120))
    assert extrapolate(sound, 64, [256], resamples=40).doubts == []
    few = np.array([3, 5, 1] + [0] * 100)
    assert "Only 3 prompts broke" in extrapolate(few, 64, [128], resamples=40).doubts[0]
    assert "Every prompt broke" in extrapolate(np.full(30, 9), 64, [128], resamples=40).doubts[0]
    assert "more than 4 times" in extrapolate(sound, 64, [2000], resamples=40).doubts[0]
    # All prompts break at one rate: the beta-binomial sees it, the power law cannot.
    one_rate = extrapolate(rng.binomial(64, np.full(200, 0.005)), 64, [512], resamples=40)
    assert "disagree" in one_rate.doubts[-1]


def test_intervals_hold_their_own_estimate_and_grow_with_n():
    rng = np.random.default_rng(2)
    found = extrapolate(rng.binomial(32, rng.beta(0.3, 6, 100)), 32, [64, 256, 1024], resamples=40)
    for curve in (found.beta_binomial, found.power_law, found.bounds):
        assert (np.diff(curve.rate) >= 0).all()
        assert all(low <= rate <= high for low, rate, high in zip(curve.low, curve.rate, curve.high, strict=True))


def test_the_hold_out_check_sees_a_law_fail():
    rng = np.random.default_rng(4)
    held = rng.random((150, 64)) < rng.beta(0.4, 10, (150, 1))
    check = hold_out(held, 8, resamples=40)
    assert check.measured == pytest.approx(held.any(axis=1).mean())
    assert check.beta_binomial[1] <= check.measured <= check.beta_binomial[2]
    # Half of the prompts can never break, the others easily: the first 8 attempts cannot know.
    immune = rng.random((300, 512)) < np.repeat([0.0, 0.1], 150)[:, None]
    assert any("beta-binomial" in doubt for doubt in hold_out(immune, 8, resamples=40).doubts())


def test_an_n_that_was_measured_is_refused():
    with pytest.raises(InputError, match="N = 8 was measured"):
        extrapolate([1, 2], 8, [8, 16])
