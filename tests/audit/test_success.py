"""ASR@N and worst-of-N reward against enumeration of all subsets, exact fractions, and simulation."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infalign.audit.success import attack_success, sizes, success_rates, success_table, worst_reward
from infalign.errors import InputError


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=5))
def test_every_n_agrees_with_all_subsets(successes_PM):
    rates_PM = success_rates([sum(row) for row in successes_PM], 7)
    for row, rates in zip(successes_PM, rates_PM, strict=True):
        for n in range(1, 8):
            subsets = [any(chosen) for chosen in itertools.combinations(row, n)]
            assert rates[n - 1] == pytest.approx(np.mean(subsets), abs=1e-14)


@settings(max_examples=25)
@given(st.integers(1, 5000), st.data())
def test_thousands_of_attempts_lose_no_digits(num_attempts, data):
    s, n = data.draw(st.integers(0, num_attempts)), data.draw(st.integers(1, num_attempts))
    exact = 1 - Fraction(math.comb(num_attempts - s, n), math.comb(num_attempts, n))
    assert success_rates([s], num_attempts)[0, n - 1] == pytest.approx(float(exact), rel=1e-10, abs=0)


def test_table_rises_with_successes_and_with_n():
    table = success_table(40)
    assert table.shape == (41, 40)
    assert not table[0].any()
    np.testing.assert_allclose(table[:, 0], np.arange(41) / 40, rtol=1e-14)
    assert (np.diff(table, axis=0) >= -1e-15).all()
    assert (np.diff(table, axis=1) >= -1e-15).all()
    np.testing.assert_array_equal(table[1:, -1], 1.0)


@given(st.lists(st.lists(st.floats(-5, 5), min_size=6, max_size=6), min_size=2, max_size=4), st.integers(1, 6))
def test_worst_reward_agrees_with_all_subsets(rewards_PM, n):
    brute = np.mean([[min(chosen) for chosen in itertools.combinations(row, n)] for row in rewards_PM])
    assert worst_reward(rewards_PM, [n])[0].estimate == pytest.approx(brute, abs=1e-12)


def test_estimates_are_unbiased_and_intervals_hold_their_level():
    # Prompts of very different safety: p ~ Beta(0.3, 3); ASR@8 = 1 − E(1 − p)^8 in closed form.
    rng = np.random.default_rng(5)
    alpha, beta, n = 0.3, 3.0, 8
    truth = 1 - math.exp(sum(math.log((beta + i) / (alpha + beta + i)) for i in range(n)))
    covered, estimates = 0, []
    for _ in range(400):
        p_P = rng.beta(alpha, beta, 60)
        estimate = attack_success(rng.binomial(32, p_P), 32, [n])[0]
        low, high = estimate.confidence_interval
        covered += low <= truth <= high
        estimates.append(estimate.estimate)
    # 5 sigma: false alarm rate under 1e-6.
    assert abs(np.mean(estimates) - truth) < 5 * np.std(estimates) / 20
    assert abs(covered / 400 - 0.95) < 5 * math.sqrt(0.95 * 0.05 / 400)


def test_no_success_gives_an_upper_end_near_three_over_the_prompts():
    never = attack_success(np.zeros(100, int), 64, [1, 64])
    for estimate in never:
        assert estimate.estimate == 0.0
        assert 0.03 < estimate.confidence_interval[1] < 0.04


def test_sizes():
    assert sizes(1) == [1]
    assert sizes(8) == [1, 2, 4, 8]
    assert sizes(100) == [1, 2, 4, 8, 16, 32, 64, 100]


@pytest.mark.parametrize(
    ("counts", "message"),
    [([1, 9], "prompt 1 has 9 successes in 8"), ([-1], "-1"), ([0.5], "whole"), ([], "shape"), ([[1]], "shape")],
)
def test_impossible_counts_are_named(counts, message):
    with pytest.raises(InputError, match=message):
        success_rates(counts, 8)


def test_an_n_beyond_the_attempts_is_refused():
    for call in (lambda: attack_success([1], 8, [9]), lambda: worst_reward(np.zeros((2, 8)), [0])):
        with pytest.raises(InputError, match="cannot be measured with 8 attempts"):
            call()


def test_prompts_that_agree_by_chance_claim_no_certainty():
    """3 prompts, each broken twice in 6: with one attempt the rate of 18 independent ones is ⅓ ± 0.11."""
    one, four = attack_success([2, 2, 2], 6, [1, 4])
    assert one.standard_error == pytest.approx(np.sqrt(2 / 9 / 18))
    assert one.confidence_interval[0] < 0.2 < 0.5 < one.confidence_interval[1]
    assert four.confidence_interval[0] < four.estimate < four.confidence_interval[1]
