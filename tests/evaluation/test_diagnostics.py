"""Length and variety, against hand-worked values."""

import numpy as np
import pytest

from infalign.errors import InputError
from infalign.estimators import win_rate
from infalign.evaluation.diagnostics import (
    diagnose,
    distinct_ngrams,
    length_matched_win_rate,
    self_similarity,
    win_rate_by_length,
    worse_prompts,
)
from infalign.procedures import Standard


class TestLengthMatched:
    def test_hand_worked(self):
        # Pairs within 10 %: (10, 10) wins, (20, 21) ties, (10, 21) and (20, 10) do not match: (1 + ½) / 2.
        got = length_matched_win_rate([[3.0, 1.0]], [[2.0, 1.0]], [[10, 20]], [[10, 21]])
        assert got.estimate == pytest.approx(0.75)

    def test_a_reward_that_is_length_leaves_nothing(self):
        # Reward = length + noise, and the policy writes twice as much. False alarm at 4.5 standard errors: 7e-6.
        rng = np.random.default_rng(0)
        lengths, ref_lengths = rng.integers(10, 60, size=(300, 16)), rng.integers(5, 30, size=(300, 16))
        rewards, ref_rewards = (
            10 * np.log(lengths) + rng.normal(size=(300, 16)),
            10 * np.log(ref_lengths) + rng.normal(size=(300, 16)),
        )
        assert win_rate(rewards, ref_rewards, Standard()).estimate > 0.75
        matched = length_matched_win_rate(rewards, ref_rewards, lengths, ref_lengths, tolerance=0.001)
        assert abs(matched.estimate - 0.5) < 4.5 * matched.standard_error

    def test_error_agrees_with_repetition(self):
        # 200 repetitions know the spread to 5 %; bounds at four of them.
        rng, estimates, claimed = np.random.default_rng(1), [], []
        for _ in range(200):
            shift = rng.normal(size=(40, 1))
            lengths, ref_lengths = rng.integers(5, 15, size=(2, 40, 6))
            got = length_matched_win_rate(
                shift + rng.normal(size=(40, 6)), rng.normal(size=(40, 6)), lengths, ref_lengths, tolerance=0.2
            )
            estimates.append(got.estimate)
            claimed.append(got.standard_error)
        assert np.mean(claimed) == pytest.approx(np.std(estimates, ddof=1), rel=0.2)

    def test_refusals(self):
        with pytest.raises(InputError, match="no two responses match"):
            length_matched_win_rate([[1.0]], [[1.0]], [[10]], [[20]])
        with pytest.raises(InputError, match="positive"):
            length_matched_win_rate([[1.0]], [[1.0]], [[0]], [[20]])
        with pytest.raises(InputError, match="shape"):
            length_matched_win_rate([[1.0]], [[1.0]], [[1, 2]], [[20]])
        with pytest.raises(InputError, match="NaN"):
            length_matched_win_rate([[np.nan]], [[1.0]], [[1]], [[1]])


class TestVariety:
    def test_hand_worked(self):
        texts_PG = [["a b c", "A b d"], ["x y", "x y"]]
        # Bigrams: ab bc ab bd → 3 of 4; xy xy → 1 of 2. Overlaps: {ab} of {ab, bc, bd} → 1/3; 1.
        assert distinct_ngrams(texts_PG).estimate == pytest.approx((3 / 4 + 1 / 2) / 2)
        assert self_similarity(texts_PG).estimate == pytest.approx((1 / 3 + 1) / 2)

    def test_short_responses(self):
        assert self_similarity([["a", "a"], ["a", "b"]]).estimate == pytest.approx(0.5)
        with pytest.raises(InputError, match="no response has 2 words"):
            distinct_ngrams([["a", ""]])
        with pytest.raises(InputError, match="fewer than two"):
            self_similarity([["a b"]])


class TestWorsePrompts:
    def test_hand_worked(self):
        # Win rates 1, ¼ and ½ (all ties): a loss and a half of three.
        rewards_PG, ref_rewards_PK = [[3.0, 4.0], [1.0, 3.0], [5.0, 5.0]], [[1.0, 2.0], [2.0, 4.0], [5.0, 5.0]]
        got = worse_prompts(rewards_PG, ref_rewards_PK)
        assert got.share.per_prompt == [0.0, 1.0, 0.5]
        assert got.share.estimate == pytest.approx(0.5)
        assert got.clearly.estimate == 0

    @pytest.mark.parametrize("levels", [None, 4], ids=["continuous", "tied"])
    def test_a_policy_that_is_the_reference_shows_what_is_promised(self, levels):
        # 4,000 prompts: standard error of the share 0.8 %, of the clear ones 0.25 %; bounds at 4.5 of them (7e-6).
        rng = np.random.default_rng(0)
        rewards = rng.normal(size=(2, 4000, 16)) if levels is None else rng.integers(0, levels, size=(2, 4000, 16))
        got = worse_prompts(*rewards)
        assert abs(got.share.estimate - got.by_chance_unchanged) < 4.5 * got.share.standard_error
        assert got.clearly.estimate < got.clearly_by_chance + 4.5 * np.sqrt(0.025 * 0.975 / 4000)
        assert got.by_chance_alike == pytest.approx(0.5, abs=0.02)

    def test_prompts_alike_look_worse_as_often_as_said(self):
        # The normal approximation with 16 samples is good to a point and a half; the simulation to 0.5 points.
        rng = np.random.default_rng(1)
        got = worse_prompts(0.3 + rng.normal(size=(4000, 16)), rng.normal(size=(4000, 16)))
        assert got.share.estimate == pytest.approx(got.by_chance_alike, abs=0.02)

    def test_prompts_that_really_got_worse_stand_out(self):
        rng = np.random.default_rng(2)
        shift = np.where(np.arange(400) < 100, -1.5, 1.0)[:, None]
        got = worse_prompts(shift + rng.normal(size=(400, 16)), rng.normal(size=(400, 16)))
        assert got.share.low > got.by_chance_alike
        assert 0.2 < got.clearly.estimate < 0.26

    def test_all_prompts_won_without_any_spread(self):
        got = worse_prompts([[2.0, 2.0]] * 3, [[1.0, 1.0]] * 3)
        assert (got.share.estimate, got.by_chance_alike, got.clearly.estimate) == (0, 0, 0)


class TestByLength:
    def test_hand_worked(self):
        # Lengths 1, 1 against 9, 9: the short lose to 1 and 2 of the references, the long win and tie.
        buckets = win_rate_by_length([[0.0, 3.0], [1.0, 2.0]], [[1.0, 2.0], [1.0, 2.0]], [[1, 9], [1, 9]], buckets=2)
        assert [(b.shortest, b.longest, b.share) for b in buckets] == [(1, 1, 0.5), (9, 9, 0.5)]
        assert [b.win_rate.estimate for b in buckets] == [pytest.approx(1 / 8), pytest.approx(7 / 8)]

    def test_buckets_add_up_to_the_standard_win_rate(self):
        rng = np.random.default_rng(0)
        rewards, ref_rewards = rng.normal(size=(2, 30, 8))
        buckets = win_rate_by_length(rewards, ref_rewards, rng.integers(1, 50, size=(30, 8)))
        assert len(buckets) == 4
        total = sum(b.share * b.win_rate.estimate for b in buckets)
        assert total == pytest.approx(win_rate(rewards, ref_rewards, Standard()).estimate)

    def test_one_length_is_one_bucket(self):
        (bucket,) = win_rate_by_length([[1.0, 2.0]], [[1.0, 2.0]], [[5, 5]])
        assert (bucket.share, bucket.win_rate.estimate) == (1, 0.5)


def test_what_cannot_be_known_is_none():
    rewards = np.zeros((2, 2))
    got = diagnose(
        rewards, rewards, lengths_PG=[[1, 1], [1, 1]], ref_lengths_PK=[[9, 9], [9, 9]], texts_PG=[["a", "b"]] * 2
    )
    assert got.length_matched is None, "no two responses are of a length"
    assert got.distinct is None, "no response has two words"
    assert got.ref_self_similarity is None
    assert got.self_similarity.estimate == 0
    assert got.finish_reasons == {}
    reasons = diagnose(rewards, rewards, finish_reasons_PG=[["stop", "length"], ["stop", "stop"]]).finish_reasons
    assert reasons == {"stop": 0.75, "length": 0.25}
