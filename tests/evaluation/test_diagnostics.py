"""Length and variety, against hand-worked values."""

import numpy as np
import pytest

from infalign.errors import InputError
from infalign.estimators import win_rate
from infalign.evaluation.diagnostics import distinct_ngrams, length_matched_win_rate, self_similarity
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
