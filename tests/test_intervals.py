"""Intervals where few or unusual prompts make it hard: hand-worked ends, agreement with the tests, and coverage."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from infalign.estimators import (
    difference_estimate,
    efficiency_of,
    mean_estimate,
    moved,
    paired_difference,
    sequence_kl,
    share_estimate,
    useful_kl,
)
from infalign.estimators.intervals import bent, skewness, straightened, unseen_ends
from infalign.evaluation.compare import matched_difference

values = st.lists(st.sampled_from([-1.0, -0.5, -0.1, 0.0, 0.0, 0.2, 0.5, 1.0]), min_size=2, max_size=30)


def simulation():
    """The benchmark, whose quick rows are tested here."""
    path = Path(__file__).parents[1] / "benchmarks" / "intervals.py"
    spec = importlib.util.spec_from_file_location("benchmarks_intervals", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@given(st.floats(-8, 8), st.floats(-6, 6), st.integers(3, 400))
def test_halls_transformation_is_increasing_and_inverted(t, skew, num_prompts):
    level = straightened(t, skew, num_prompts)
    # At −1/b the transformation is flat to second order, so only what it maps to is told apart there.
    assert straightened(bent(level, skew, num_prompts), skew, num_prompts) == pytest.approx(level, abs=1e-6)
    assert straightened(t + 0.1, skew, num_prompts) >= level


def test_skewness_is_scipys():
    x = np.random.default_rng(0).gamma(1.0, size=17)
    assert skewness(x) == pytest.approx(stats.skew(x, bias=False))


@settings(max_examples=200, deadline=None)
@given(values, st.sampled_from([0.8, 0.95]))
def test_the_test_of_a_difference_agrees_with_its_interval(differences, confidence):
    got = difference_estimate(differences, confidence=confidence, bounds=(-1.0, 1.0))
    assert got.resolved == (got.p_value < 1 - confidence)
    low, high = got.confidence_interval
    assert -1 <= low <= got.estimate <= high <= 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]), min_size=1, max_size=30))
def test_shares_mirror_and_stay_in_range(shares):
    low, high = share_estimate(shares).confidence_interval
    assert 0 <= low <= np.mean(shares) + 1e-12
    assert np.mean(shares) - 1e-12 <= high <= 1
    mirrored = share_estimate(1 - np.array(shares)).confidence_interval
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)


class TestEqualValues:
    UNSEEN = 1 - 0.025 ** (1 / 20)  # 16.8 %: what 20 prompts can all miss with a chance of 2.5 %

    def test_ties_everywhere_leave_room_for_other_prompts(self):
        tied = share_estimate(np.full(20, 0.5))
        assert tied.confidence_interval == pytest.approx((0.5 - self.UNSEEN / 2, 0.5 + self.UNSEEN / 2))

    def test_so_does_a_difference_of_zero(self):
        a, b = share_estimate(np.linspace(0, 1, 20)), share_estimate(np.linspace(0, 1, 20))
        same = paired_difference(a, b)
        assert same.estimate == 0
        assert same.confidence_interval == pytest.approx((-self.UNSEEN, self.UNSEEN))
        assert same.p_value == 1

    def test_a_difference_on_every_prompt_is_tested_against_the_worst_that_is_unseen(self):
        # All 20 ahead by 0.5: mean zero needs a third of the prompts at −1, all of them missed: 2 (2/3)^20.
        got = difference_estimate(np.full(20, 0.5), bounds=(-1.0, 1.0))
        assert got.p_value == pytest.approx(2 * (2 / 3) ** 20)
        assert got.resolved
        assert not difference_estimate(np.full(20, 0.1), bounds=(-1.0, 1.0)).resolved

    def test_without_bounds_nothing_is_claimed(self):
        assert mean_estimate([2.0, 2.0, 2.0]).confidence_interval == (-math.inf, math.inf)
        assert difference_estimate([2.0, 2.0, 2.0]).p_value == 1

    def test_a_kl_of_exactly_zero_is_identity(self):
        assert sequence_kl(np.zeros((8, 4))).confidence_interval == (0, 0)
        assert sequence_kl(np.full((8, 4), 0.3)).confidence_interval == (-math.inf, math.inf)

    def test_coverage_of_rare_prompts_is_at_least_nominal(self):
        # One prompt in q is won and all others are tied: exact coverage of "none seen" with the share just missed.
        low, high = unseen_ends(0.5, (0.0, 1.0), 20, 0.95)
        share = 2 * (high - 0.5)
        assert (1 - share) ** 20 == pytest.approx(0.025)
        assert low == pytest.approx(1 - high)


class TestMoved:
    def test_the_rule(self):
        assert moved(0.3, 0.1)
        assert not moved(0.3, -0.01), "the interval includes 0"
        assert not moved(0.3, None)
        assert not moved(0.004, 0.003), "too small to gain anything by"


class TestMatched:
    wins, base_wins = np.linspace(0.7, 0.9, 20), np.linspace(0.4, 0.7, 20)
    noise = np.resize([0.02, -0.02], 20)

    @pytest.mark.parametrize("base_kl", [0.0, -0.01])
    def test_a_baseline_without_kl_brings_the_other_back_to_one_half(self, base_kl):
        got = matched_difference(self.wins, self.base_wins, 0.5 + self.noise, base_kl + self.noise)
        assert got.estimate == pytest.approx(0.5 - 0.55)
        mirrored = matched_difference(self.base_wins, self.wins, base_kl + self.noise, 0.5 + self.noise)
        assert mirrored.estimate == pytest.approx(0.55 - 0.5)

    def test_it_is_continuous_at_zero(self):
        near = matched_difference(self.wins, self.base_wins, 0.5 + self.noise, 1e-6 + self.noise)
        at = matched_difference(self.wins, self.base_wins, 0.5 + self.noise, self.noise)
        assert near.estimate == pytest.approx(at.estimate, abs=1e-5)
        assert near.standard_error == pytest.approx(at.standard_error, rel=1e-4)

    def test_a_side_ahead_without_kl_of_its_own_counts_one_half(self):
        # The sign is then not that of the measured difference, so `compare` claims nothing.
        got = matched_difference(self.wins, self.base_wins, -0.01 + self.noise, -0.02 + self.noise)
        assert got.estimate == pytest.approx(0.5 - 0.55)


def test_the_efficiency_is_a_lower_bound():
    # Rewards follow the shifted score with correlation 0.7, so the truth is 0.49. Pooling, bins and 32 references bring
    # the estimate 5 of its own errors below it at 200 prompts; the bound claims less.
    rng = np.random.default_rng(0)
    shift = 1.0 + 0.4 * rng.standard_normal((200, 1))
    score = shift + rng.standard_normal((200, 16))
    reward = 0.7 * score + math.sqrt(0.51) * rng.standard_normal((200, 16))
    useful = useful_kl(reward, rng.standard_normal((200, 32)))
    got = efficiency_of(useful, sequence_kl(shift * score - shift**2 / 2))
    assert got.at_least < got.efficiency < 0.49
    assert got.at_least == pytest.approx(got.efficiency - stats.t.ppf(0.95, 199) * got.standard_error)
    assert useful.confidence_interval[1] == math.inf


@pytest.mark.parametrize(("what", "least"), [("kls", 92.5), ("shares", 92.0), ("differences", 92.5), ("matched", 92.5)])
def test_intervals_hold_at_twenty_prompts(what, least):
    """A quick part of the benchmark: 800 data sets of 20 prompts for each population.

    Their simulation error is 0.8 points, so a row that holds at 95 % falls below 92.5 with a chance of 2e-3 (seeded).
    Rows that docs/evaluation.md states not to hold are left out.
    """
    known = {"one prompt in ten at 10 times the others", "lognormal 1.2, sampled", "Best-of-4, shift 3 ± 1",
             "Beta(1.9, 0.1)", "Beta(4.9, 0.1)", "Beta(0.98, 0.02)"}  # fmt: skip
    rows = getattr(simulation(), what)(np.random.default_rng(5), 800, (20,))
    missed = {row["values"]: row["coverage"] for row in rows if row["coverage"] < least and row["values"] not in known}
    assert not missed
