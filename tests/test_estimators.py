"""Estimators against hand-worked values, exact enumeration of subsets, closed forms and simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from infalign.errors import InputError
from infalign.estimators import (
    Estimate,
    difference_estimate,
    efficiency_of,
    expected_reward,
    holm,
    kl_efficiency,
    mean_estimate,
    paired_difference,
    sequence_kl,
    share_estimate,
    useful_kl,
    win_rate,
    win_rates,
)
from infalign.procedures import BestOfN, InferenceProcedure, Mixture, OrderStatistic, Standard, WorstOfN

BY_RANK = {  # procedure -> which of its n sorted responses it returns
    Standard(): 0,
    BestOfN(2): 1,
    BestOfN(3): 2,
    WorstOfN(2): 0,
    WorstOfN(3): 0,
    OrderStatistic(k=2, n=3): 1,
}


def enumerated_win_rate(ours, theirs, procedure, opponent=None):
    """M10 from its definition: every n-subset of one side against every n-subset of the other."""
    opponent = procedure if opponent is None else opponent
    outs = [sorted(subset)[BY_RANK[procedure]] for subset in itertools.combinations(ours, procedure.n)]
    rivals = [sorted(subset)[BY_RANK[opponent]] for subset in itertools.combinations(theirs, opponent.n)]
    return np.mean([(a > b) + 0.5 * (a == b) for a in outs for b in rivals])


tied_scores = st.lists(st.integers(0, 4), min_size=3, max_size=6)


class TestWinRate:
    def test_hand_worked_values(self):
        # Pairs (1,2) lose, (3,2) win: ½. Best of both: 3 against 2 wins. Worst of both: 1 against 2 loses.
        rewards_PG, ref_rewards_PK = [[3.0, 1.0]], [[2.0, 2.0]]
        assert win_rate(rewards_PG, ref_rewards_PK, Standard()).estimate == pytest.approx(0.5)
        assert win_rate(rewards_PG, ref_rewards_PK, BestOfN(2)).estimate == pytest.approx(1.0)
        assert win_rate(rewards_PG, ref_rewards_PK, WorstOfN(2)).estimate == pytest.approx(0.0)

    def test_ties_share_a_half(self):
        assert win_rate([[1.0, 1.0, 1.0]], [[1.0, 1.0, 1.0, 1.0]], BestOfN(3)).estimate == pytest.approx(0.5)
        # Best of (1, 2) is 2; best of 2 out of (1, 2, 2) is always 2.
        assert win_rate([[1.0, 2.0]], [[1.0, 2.0, 2.0]], BestOfN(2)).estimate == pytest.approx(0.5)

    @settings(max_examples=60, deadline=None)
    @given(ours=tied_scores, theirs=tied_scores)
    def test_equals_enumeration_of_all_subsets(self, ours, theirs):
        for procedure in BY_RANK:
            got = win_rate([ours], [theirs], procedure).estimate
            assert got == pytest.approx(enumerated_win_rate(ours, theirs, procedure), abs=1e-12)

    @settings(max_examples=30, deadline=None)
    @given(ours=tied_scores, theirs=tied_scores)
    def test_opponent_and_mixture_equal_enumeration(self, ours, theirs):
        got = win_rate([ours], [theirs], BestOfN(3), opponent=Standard()).estimate
        assert got == pytest.approx(enumerated_win_rate(ours, theirs, BestOfN(3), Standard()), abs=1e-12)
        mixture = Mixture([(0.3, Standard()), (0.7, WorstOfN(2))])
        expected = 0.3 * enumerated_win_rate(ours, theirs, Standard()) + 0.7 * enumerated_win_rate(
            ours, theirs, WorstOfN(2)
        )
        assert win_rate([ours], [theirs], mixture).estimate == pytest.approx(expected, abs=1e-12)

    @settings(max_examples=40, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1), ties=st.booleans())
    def test_self_is_half_swap_is_complement_and_only_order_matters(self, seed, ties):
        rng = np.random.default_rng(seed)
        rewards_PG, ref_rewards_PK = rng.normal(size=(7, 5)), rng.normal(size=(7, 6))
        if ties:
            rewards_PG, ref_rewards_PK = rewards_PG.round(), ref_rewards_PK.round()
        for procedure in BY_RANK:
            forward = win_rate(rewards_PG, ref_rewards_PK, procedure)
            backward = win_rate(ref_rewards_PK, rewards_PG, procedure)
            np.testing.assert_allclose(forward.per_prompt + backward.per_prompt, 1, atol=1e-12)
            np.testing.assert_allclose(
                forward.confidence_interval, 1 - np.array(backward.confidence_interval)[::-1], atol=1e-9
            )
            np.testing.assert_allclose(win_rate(rewards_PG, rewards_PG, procedure).per_prompt, 0.5, atol=1e-12)
            warped = win_rate(np.exp(rewards_PG), np.exp(rng.permuted(ref_rewards_PK, axis=1)), procedure)
            np.testing.assert_allclose(forward.per_prompt, warped.per_prompt, atol=1e-12)

    @pytest.mark.parametrize("num_samples", [8, 128])
    def test_unbiased_against_closed_form(self, num_samples):
        # Reference uniform, policy CDF u^a: Best-of-n wins with 1 − n ∫ u^(an+n−1) du = a / (a+1) for any n.
        # Worst-of-n: n ∫ (1−u^a)^n (1−u)^(n−1) du by quadrature. False alarm at 4.5 standard errors: 7e-6 a check.
        shape, num_prompts = 1.7, 160_000 // num_samples
        rng = np.random.default_rng(num_samples)
        rewards_PG = rng.uniform(size=(num_prompts, num_samples)) ** (1 / shape)
        ref_rewards_PK = rng.uniform(size=(num_prompts, num_samples))
        u = (np.arange(100_000) + 0.5) / 100_000
        for n in (1, 4, 8):
            best = win_rate(rewards_PG, ref_rewards_PK, BestOfN(n))
            assert abs(best.estimate - shape / (shape + 1)) < 4.5 * best.standard_error
            worst = win_rate(rewards_PG, ref_rewards_PK, WorstOfN(n))
            truth = n * np.mean((1 - u**shape) ** n * (1 - u) ** (n - 1))
            assert abs(worst.estimate - truth) < 4.5 * worst.standard_error
            assert worst.standard_error < 0.01

    @pytest.mark.parametrize("ties", [False, True], ids=["continuous", "heavy-ties"])
    @pytest.mark.parametrize("num_prompts", [10, 60])
    def test_interval_holds_its_level(self, num_prompts, ties):
        # 1,500 data sets of prompts that differ: simulation error 0.6 points. Bounds 92.5-97.5 are over four of them
        # from 95 (false alarm about 1e-5 at the nominal level). benchmarks/estimators.py has the full table.
        rng, trials = np.random.default_rng(num_prompts + ties), 1500
        shift = 0.4 + 0.5 * rng.normal(size=(trials * num_prompts, 1))
        rewards, ref_rewards = shift + rng.normal(size=(len(shift), 12)), rng.normal(size=(len(shift), 12))
        if ties:
            rewards, ref_rewards = rewards.round(), ref_rewards.round()
        for procedure in (BestOfN(4), WorstOfN(4)):
            per_prompt = win_rate(rewards, ref_rewards, procedure).per_prompt
            truth = per_prompt.mean()  # over all data sets: its own error is far below an interval's width
            covered = 0
            for trial in range(trials):
                rows = slice(trial * num_prompts, (trial + 1) * num_prompts)
                low, high = win_rate(rewards[rows], ref_rewards[rows], procedure).confidence_interval
                covered += low <= truth <= high
            assert 0.925 < covered / trials < 0.975

    def test_prompts_are_the_independent_unit(self):
        # Repeating every sample of a prompt adds no information: the clustered error must not shrink.
        rng = np.random.default_rng(0)
        rewards_PG, ref_rewards_PK = rng.normal(size=(30, 4)) + rng.normal(size=(30, 1)), rng.normal(size=(30, 4))
        once = win_rate(rewards_PG, ref_rewards_PK, Standard())
        tenfold = win_rate(np.tile(rewards_PG, 10), np.tile(ref_rewards_PK, 10), Standard())
        assert tenfold.standard_error == pytest.approx(once.standard_error)

    def test_interval_at_the_boundary_is_wilsons_and_stays_inside(self):
        won = win_rate(np.ones((20, 4)), np.zeros((20, 4)), BestOfN(4))
        assert won.estimate == 1
        t_squared = 2.093024**2  # Student's t, 19 degrees of freedom
        assert won.confidence_interval == pytest.approx((20 / (20 + t_squared), 1.0), abs=1e-5)

    def test_one_prompt_claims_nothing(self):
        single = win_rate([[1.0, 2.0]], [[0.0, 3.0]], BestOfN(2))
        assert single.estimate == 0
        assert math.isnan(single.standard_error)
        assert single.confidence_interval == (0, 1)

    def test_several_procedures_in_one_pass_agree_with_one_at_a_time(self):
        rng = np.random.default_rng(1)
        rewards_PG, ref_rewards_PK = rng.normal(size=(9, 8)), rng.normal(size=(9, 6))
        procedures: list[InferenceProcedure] = list(BY_RANK)
        for procedure, got in zip(procedures, win_rates(rewards_PG, ref_rewards_PK, procedures), strict=True):
            assert got.procedure == procedure.label
            np.testing.assert_array_equal(got.per_prompt, win_rate(rewards_PG, ref_rewards_PK, procedure).per_prompt)

    def test_infinite_rewards_are_ordered(self):
        assert win_rate([[-np.inf, 0.0]], [[-np.inf, -1.0]], Standard()).estimate == pytest.approx((0.5 + 1 + 1) / 4)


class TestJudgedByAnotherReward:
    """Procedures choose by one reward, and what they return is compared by another."""

    @staticmethod
    def enumerated(rewards, scores, procedure):
        """Every judged score that the procedure returns, with its chance; equal rewards are equally likely."""
        outs = []
        for subset in itertools.combinations(range(len(rewards)), procedure.n):
            value = sorted(rewards[i] for i in subset)[BY_RANK[procedure]]
            tied = [i for i in subset if rewards[i] == value]
            outs += [(scores[i], 1 / len(tied)) for i in tied]
        total = sum(chance for _, chance in outs)
        return [(score, chance / total) for score, chance in outs]

    @settings(max_examples=60, deadline=None)
    @given(pairs=st.lists(st.tuples(*[st.integers(0, 2)] * 4), min_size=3, max_size=5))
    def test_equals_enumeration(self, pairs):
        ours, ours_judged, theirs, theirs_judged = (list(column) for column in zip(*pairs, strict=True))
        for procedure in BY_RANK:
            expected = sum(
                p * q * ((a > b) + 0.5 * (a == b))
                for a, p in self.enumerated(ours, ours_judged, procedure)
                for b, q in self.enumerated(theirs, theirs_judged, procedure)
            )
            (got,) = win_rates([ours], [theirs], [procedure], judged_by=([ours_judged], [theirs_judged]))
            assert got.estimate == pytest.approx(expected, abs=1e-12)

    def test_the_same_reward_as_judge_changes_nothing(self):
        rng = np.random.default_rng(0)
        a, b = rng.normal(size=(20, 6)).round(), rng.normal(size=(20, 7)).round()
        (plain,), (judged,) = win_rates(a, b, [BestOfN(3)]), win_rates(a, b, [BestOfN(3)], judged_by=(a, b))
        np.testing.assert_allclose(plain.per_prompt, judged.per_prompt, atol=1e-12)

    def test_an_exploited_reward_wins_by_itself_and_loses_by_the_judge(self):
        # Policy that trades truth for a trick: proxy = truth + 2 tricks. More candidates, more tricks chosen.
        rng = np.random.default_rng(1)
        truth, trick = rng.normal(size=(300, 16)) - 0.5, rng.normal(size=(300, 16)) + 1
        ref_truth, ref_trick = rng.normal(size=(2, 300, 16))
        proxy, ref_proxy = truth + 2 * trick, ref_truth + 2 * ref_trick
        (by_proxy,) = win_rates(proxy, ref_proxy, [BestOfN(4)])
        (by_truth,) = win_rates(proxy, ref_proxy, [BestOfN(4)], judged_by=(truth, ref_truth))
        assert by_proxy.confidence_interval[0] > 0.5 > by_truth.confidence_interval[1]

    def test_scores_must_cover_every_response(self):
        with pytest.raises(InputError, match="Score every response with both"):
            win_rates(np.zeros((2, 3)), np.zeros((2, 3)), [Standard()], judged_by=(np.zeros((2, 2)), np.zeros((2, 3))))
        with pytest.raises(InputError, match="NaN"):
            win_rates([[1.0]], [[1.0]], [Standard()], judged_by=([[np.nan]], [[1.0]]))


class TestBadInput:
    def test_nan_is_counted_and_placed(self):
        rewards_PG = np.zeros((3, 4))
        rewards_PG[1, 2] = rewards_PG[2, 0] = np.nan
        with pytest.raises(
            InputError, match=r"2 of 12 values are NaN \(first: prompt 1, sample 2; 2 prompts affected\)"
        ):
            win_rate(rewards_PG, np.zeros((3, 4)), Standard())

    @pytest.mark.parametrize(
        ("rewards", "ref_rewards", "match"),
        [
            (np.zeros((3, 4)), np.zeros((2, 4)), "3 prompts and reference rewards 2"),
            (np.zeros(4), np.zeros((2, 4)), "shape"),
            (np.zeros((2, 0)), np.zeros((2, 4)), "none of them zero"),
            ([[1.0], [1.0, 2.0]], np.zeros((2, 4)), "same count"),
            ([["a", "b"]], np.zeros((1, 4)), "numbers"),
        ],
    )
    def test_wrong_shapes_are_refused(self, rewards, ref_rewards, match):
        with pytest.raises(InputError, match=match):
            win_rate(rewards, ref_rewards, Standard())

    def test_too_few_samples_for_n(self):
        with pytest.raises(InputError):
            win_rate(np.zeros((2, 3)), np.zeros((2, 8)), BestOfN(4))
        with pytest.raises(InputError):
            win_rate(np.zeros((2, 8)), np.zeros((2, 3)), BestOfN(4))

    def test_level_outside_zero_and_one(self):
        with pytest.raises(InputError, match="confidence"):
            win_rate(np.zeros((2, 3)), np.zeros((2, 3)), Standard(), confidence=95)

    def test_infinite_values_have_no_mean(self):
        with pytest.raises(InputError, match="not finite"):
            expected_reward([[np.inf, 0.0]], Standard())
        with pytest.raises(InputError, match="not finite"):
            sequence_kl([[np.inf, 0.0]])


class TestDifferences:
    def test_pairing_removes_what_prompts_share(self):
        # Per-prompt values 0.2 apart on prompts that differ widely: unpaired errors would hide it.
        base = np.linspace(0, 0.8, 30)
        wobble = 0.01 * np.resize([1.0, -1.0], 30)
        a, b = mean_estimate(base + 0.2 + wobble), mean_estimate(base)
        difference = paired_difference(a, b)
        assert difference.estimate == pytest.approx(0.2)
        assert difference.standard_error == pytest.approx(wobble.std(ddof=1) / np.sqrt(30))
        assert difference.resolved
        assert difference.p_value < 1e-10

    def test_a_model_against_itself_is_not_resolved(self):
        rng = np.random.default_rng(2)
        rewards_PG, ref_rewards_PK = rng.normal(size=(20, 8)), rng.normal(size=(20, 8))
        a = win_rate(rewards_PG, ref_rewards_PK, BestOfN(4))
        b = win_rate(rewards_PG[:, ::-1], ref_rewards_PK[:, ::-1], BestOfN(4))
        difference = paired_difference(a, b)
        assert difference.estimate == 0
        assert not difference.resolved
        assert difference.p_value == 1

    def test_t_test_holds_its_level(self):
        # Under no difference p-values are uniform: 4,000 tests at 5 % give 200 ± 14; bounds over 4.3 of them (2e-5).
        draws = np.random.default_rng(3).normal(size=(4000, 8))
        rejected = sum(difference_estimate(row).p_value < 0.05 for row in draws)
        assert 140 < rejected < 260

    def test_different_prompts_are_refused(self):
        with pytest.raises(InputError, match="3 and the other 4"):
            paired_difference(mean_estimate(np.zeros(3)), mean_estimate(np.zeros(4)))

    def test_holm_hand_worked(self):
        # Sorted 0.01·3, 0.02·2, 0.9·1, then running maximum.
        assert holm([0.02, 0.9, 0.01]) == pytest.approx([0.04, 0.9, 0.03])
        assert holm([0.5, 0.4]) == pytest.approx([0.8, 0.8])
        assert holm([]) == []


class TestExpectedReward:
    @settings(max_examples=40, deadline=None)
    @given(scores=tied_scores)
    def test_equals_enumeration(self, scores):
        for procedure, rank in BY_RANK.items():
            expected = np.mean([sorted(subset)[rank] for subset in itertools.combinations(scores, procedure.n)])
            assert expected_reward([scores], procedure).estimate == pytest.approx(expected)


class TestSequenceKL:
    def test_error_is_clustered_by_prompt(self):
        kl = sequence_kl([[0.0, 2.0], [2.0, 4.0]])
        assert kl.estimate == 2
        assert kl.standard_error == pytest.approx(1.0)
        assert kl.confidence_interval == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-3)  # t, 1 degree of freedom

    def test_gaussian_closed_form(self):
        # KL(N(δ,1) ‖ N(0,1)) = δ²/2; log ratio δy − δ²/2. False alarm 7e-6.
        shift = 0.9
        y = shift + np.random.default_rng(4).normal(size=(400, 50))
        kl = sequence_kl(shift * y - shift**2 / 2)
        assert abs(kl.estimate - shift**2 / 2) < 4.5 * kl.standard_error


class TestUsefulKL:
    @staticmethod
    def tilted(rng, size, sharpness):
        """Draws of density ∝ exp(sharpness · u) on [0, 1], and its KL to uniform in closed form."""
        s = sharpness
        draws = np.log1p(rng.uniform(size=size) * np.expm1(s)) / s
        mean = 1 / -np.expm1(-s) - 1 / s
        return draws, s * mean - math.log(np.expm1(s) / s)

    @pytest.mark.parametrize("sharpness", [1.5, 6.0])
    def test_recovers_the_closed_form(self, sharpness):
        # Binning loses at most about f'²/(24 B² f) (a few 1e-3 here); sampling adds 4.5 standard errors (7e-6).
        draws_PG, truth = self.tilted(np.random.default_rng(5), (400, 20), sharpness)
        got = kl_efficiency(draws_PG, 2 * truth)
        assert abs(got.useful_kl.estimate - truth) < 4.5 * got.useful_kl.standard_error + 0.005
        assert got.efficiency == pytest.approx(got.useful_kl.estimate / (2 * truth))

    def test_finite_references_and_scores_agree_with_the_calibrated_form(self):
        rng = np.random.default_rng(6)
        draws_PG, truth = self.tilted(rng, (600, 16), 3.0)
        ref_PK = rng.uniform(size=(600, 63))
        got = useful_kl(draws_PG, ref_PK)
        assert abs(got.estimate - truth) < 4.5 * got.standard_error + 0.01
        calibrated_PG = (ref_PK[:, None, :] < draws_PG[:, :, None]).mean(axis=2)
        assert kl_efficiency(calibrated_PG, 1.0, num_ref=63).useful_kl.estimate == pytest.approx(got.estimate, abs=1e-6)

    @pytest.mark.parametrize("levels", [1, 2, 5, None], ids=lambda levels: f"{levels}-levels")
    def test_the_reference_itself_has_none_however_many_ties(self, levels):
        # Bias under 1e-3 and within 4.5 standard errors of zero (7e-6), with prompts that differ in reward scale.
        rng = np.random.default_rng(7)
        rewards = rng.normal(size=(500, 40)) * rng.uniform(0.1, 10, size=(500, 1))
        if levels is not None:
            rewards = np.floor(levels * rng.uniform(size=(500, 40)))
        got = useful_kl(rewards[:, :8], rewards[:, 8:])
        assert abs(got.estimate) < 1e-3 + 4.5 * got.standard_error
        assert abs(got.estimate) < 0.01

    def test_bias_correction_counts_clusters(self):
        # Responses of a prompt are copies, so 8 of them carry no more than one: the plain (bins − 1)/2n would leave
        # most of the bias of about 32/(2·200) = 0.08 in place.
        rng = np.random.default_rng(8)
        estimates = [
            kl_efficiency(np.repeat(rng.uniform(size=(200, 1)), 8, axis=1), 1.0).useful_kl.estimate for _ in range(60)
        ]
        assert abs(np.mean(estimates)) < 0.02

    def test_joint_error_of_the_ratio(self):
        # Useful KL proportional to KL prompt by prompt: the ratio is exact although both are noisy.
        kl_P = np.random.default_rng(9).uniform(0.5, 1.5, size=50)
        got = efficiency_of(mean_estimate(0.4 * kl_P), mean_estimate(kl_P))
        assert got.efficiency == pytest.approx(0.4)
        assert got.standard_error < 1e-12

    def test_needs_a_positive_kl_and_calibrated_rewards(self):
        with pytest.raises(InputError, match="positive KL"):
            kl_efficiency([[0.5, 0.6]], 0.0)
        with pytest.raises(InputError, match=r"\[0, 1\]"):
            kl_efficiency([[0.5, 1.6]], 1.0)


def test_estimates_read_well():
    text = repr(Estimate(0.5, 0.01, (0.48, 0.52), np.zeros(10), 0.95))
    assert text == "Estimate(0.5000 ± 0.0100, 95% interval 0.4800 to 0.5200, 10 prompts)"


def score_interval(share, effective, t):
    """Wilson's ends as the roots of (share − W)² = t² W (1 − W) / n."""
    return sorted(np.roots([1 + t**2 / effective, -(2 * share + t**2 / effective), share**2]))


def test_a_share_has_the_score_interval_of_its_prompts():
    # Textbook value (Wilson, z = t with 9 degrees of freedom): 5 of 10 prompts, each all or nothing.
    t = stats.t.ppf(0.975, 9)
    share = share_estimate([1.0] * 5 + [0.0] * 5)
    np.testing.assert_allclose(share.confidence_interval, score_interval(0.5, 9.0, t), rtol=1e-12)  # n = W(1 − W) / SE²
    # Where the values are clearly skewed, the end on the side of their tail is Hall's.
    low, high = share_estimate([1.0] * 2 + [0.0] * 28).confidence_interval
    score = score_interval(2 / 30, 29.0, stats.t.ppf(0.975, 29))
    assert low == pytest.approx(score[0])
    assert high > score[1]
    assert share_estimate([0.0] * 30).confidence_interval[0] == 0.0
    assert 0.1 < share_estimate([0.0] * 30).confidence_interval[1] < 0.15
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        share_estimate([0.5, 1.2])
