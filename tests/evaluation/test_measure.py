"""`measure` and `compare` on arrays whose truth is known in closed form."""

import dataclasses
import json

import numpy as np
import pytest

from infalign.errors import InputError, MismatchError
from infalign.evaluation.compare import compare, matched_difference
from infalign.evaluation.frontier import difference_at, frontier, win_rate_at
from infalign.evaluation.measure import measure
from infalign.evaluation.results import MethodResult
from infalign.procedures import BestOfN, Standard, WorstOfN

PROCEDURES = [Standard(), BestOfN(4), WorstOfN(4)]


def gaussian_method(label, shift, seed=0, *, num_prompts=200, num_samples=16, procedures=PROCEDURES, **options):
    """Reference rewards N(0,1), policy N(shift,1) and no other change: KL shift²/2, all of it useful."""
    rng = np.random.default_rng(seed)  # one seed for all methods: shared noise, as with shared prompts
    ref_rewards_PK = rng.normal(size=(num_prompts, num_samples))
    rewards_PG = shift + rng.normal(size=(num_prompts, num_samples))
    return measure(label, rewards_PG, ref_rewards_PK, shift * rewards_PG - shift**2 / 2, procedures, **options)


class TestMeasure:
    def test_gaussian_truth(self):
        # False alarm of each check at 4.5 standard errors: 7e-6.
        shift = 1.0
        result = gaussian_method("a", shift)
        assert abs(result.kl.estimate - shift**2 / 2) < 4.5 * result.kl.standard_error
        standard = result.of("Standard").win_rate
        assert abs(standard.estimate - 0.7602) < 4.5 * standard.standard_error  # Φ(1/√2)
        # Finite K, bins and pooling lose a little of it, so the efficiency of a pure shift is just under one.
        assert 0.85 < result.kl_efficiency < 1 + 4.5 * result.kl_efficiency_error
        assert result.tie_share == 0

    def test_limit_bounds_every_procedure_and_a_gaussian_shift_is_not_optimal(self):
        result = gaussian_method("a", 1.0)
        for entry in result.procedures:
            assert entry.win_rate.estimate < entry.limit
            assert 0.5 < entry.captured.estimate < 1
            assert entry.captured.low < entry.captured.estimate < entry.captured.high
            share = (entry.win_rate.estimate - 0.5) / (entry.limit - 0.5)
            assert entry.captured.estimate == pytest.approx(share)

    def test_error_of_the_captured_share_agrees_with_repetition(self):
        # The first-order error against the spread over 40 data sets, whose own standard error is 11 %: 4 of it (6e-5).
        shares, claimed = [], []
        for seed in range(40):
            result = gaussian_method("a", 1.0, seed, num_prompts=60, num_samples=8, procedures=[BestOfN(4)])
            captured = result.of("Best-of-4").captured
            shares.append(captured.estimate)
            claimed.append(captured.standard_error)
        assert np.mean(claimed) == pytest.approx(np.std(shares, ddof=1), rel=0.45)

    def test_a_model_against_itself(self):
        rng = np.random.default_rng(1)
        rewards_PG, ref_rewards_PK = rng.normal(size=(2, 150, 8))
        result = measure("same", rewards_PG, ref_rewards_PK, np.zeros_like(rewards_PG), PROCEDURES)
        assert result.kl.estimate == 0
        assert result.kl_efficiency is None
        for entry in result.procedures:
            assert entry.win_rate.low < 0.5 < entry.win_rate.high
            assert entry.limit is None
            assert entry.captured is None

    def test_lengths_truncation_and_ties_are_reported(self):
        rewards_PG = np.array([[1.0, 2.0], [2.0, 3.0]])
        ref_rewards_PK = np.array([[1.0, 1.0], [0.0, 3.0]])
        result = measure(
            "a",
            rewards_PG,
            ref_rewards_PK,
            np.ones((2, 2)),
            [Standard()],
            lengths_PG=[[2, 4], [6, 8]],
            ref_lengths_PK=[[1, 1], [2, 2]],
            finish_reasons_PG=[["length", "stop"], ["stop", "stop"]],
        )
        assert result.tie_share == pytest.approx(3 / 8)
        assert (result.mean_length, result.ref_mean_length) == (5, 1.5)
        assert result.truncated_share == 0.25
        assert result.ref_truncated_share is None

    def test_survives_json(self):
        result = gaussian_method("a", 0.5, prompt_ids=[f"p{i}" for i in range(200)])
        assert MethodResult.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False))) == result

    def test_further_rewards_judge_what_the_first_chose(self):
        rng = np.random.default_rng(3)
        gold, ref_gold = rng.normal(size=(2, 50, 8))
        noise = rng.normal(size=(50, 8))
        result = measure(
            "a", gold + 0.5 + noise, ref_gold, np.ones((50, 8)), PROCEDURES, judges={"gold": (gold, ref_gold)}
        )
        for entry in result.procedures:
            assert entry.judged["gold"].estimate != entry.win_rate.estimate
        # Responses are worth the same; only choosing by a noisier reward makes Best-of-4 lose to the reference's.
        assert result.of("Standard").judged["gold"].low < 0.5 < result.of("Standard").judged["gold"].high
        assert result.of("Best-of-4").judged["gold"].high < 0.5
        assert MethodResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result

    def test_curves_over_n_are_the_win_rates_of_every_n(self):
        rng = np.random.default_rng(3)
        ours, theirs, gold, ref_gold = rng.normal(size=(4, 20, 6))
        result = measure("a", ours, theirs, np.ones((20, 6)), PROCEDURES, judges={"gold": (gold, ref_gold)})
        for family, make in (("best-of-n", BestOfN), ("worst-of-n", WorstOfN)):
            curve = result.over_n[family]
            assert curve.n == [1, 2, 3, 4, 5, 6]
            assert curve.win_rate.estimate[3] == result.of(make(4).label).win_rate.estimate
            assert curve.win_rate.low[3] == result.of(make(4).label).win_rate.low
            assert curve.judged["gold"].estimate[3] == result.of(make(4).label).judged["gold"].estimate
            assert curve.win_rate.estimate[0] == pytest.approx(result.of("Standard").win_rate.estimate)

    def test_swapping_the_models_mirrors_every_win_rate(self):
        rng = np.random.default_rng(5)
        a, b = rng.integers(0, 6, size=(2, 40, 8)).astype(float)
        there = measure("a", a, b, np.ones((40, 8)), PROCEDURES)
        back = measure("b", b, a, np.ones((40, 8)), PROCEDURES)
        for ours, theirs in zip(there.procedures, back.procedures, strict=True):
            assert ours.win_rate.estimate == pytest.approx(1 - theirs.win_rate.estimate, abs=1e-12)
            assert ours.win_rate.low == pytest.approx(1 - theirs.win_rate.high, abs=1e-12)

    def test_a_missing_judge_score_is_refused(self):
        scores = np.zeros((3, 4))
        broken = scores.copy()
        broken[1, 2] = np.nan
        with pytest.raises(InputError, match=r"a: gold: 1 of 12 values are NaN \(first: prompt 1, sample 2"):
            measure("a", scores, scores, scores, [Standard()], judges={"gold": (broken, scores)})

    def test_one_prompt_is_stored_without_claims(self):
        result = gaussian_method("a", 0.5, num_prompts=1)
        assert result.kl.standard_error is None
        assert json.dumps(result.to_dict(), allow_nan=False)

    def test_foreign_json_is_refused(self):
        with pytest.raises(InputError, match="not stored by this version of infalign"):
            MethodResult.from_dict({"label": "a"})

    @pytest.mark.parametrize(
        "name",
        ["lengths_PG", "finish_reasons_PG", "ref_lengths_PK", "ref_finish_reasons_PK", "texts_PG", "ref_texts_PK"],
    )
    def test_wrong_shape_is_named(self, name):
        with pytest.raises(InputError, match=f"a: {name}"):
            measure("a", np.zeros((3, 4)), np.zeros((3, 4)), np.zeros((3, 4)), [Standard()], **{name: np.zeros((3, 2))})

    def test_log_ratios_must_fit_and_be_finite(self):
        with pytest.raises(InputError, match="log_ratios_PG"):
            measure("a", np.zeros((3, 4)), np.zeros((3, 4)), np.zeros((3, 2)), [Standard()])
        with pytest.raises(InputError, match="log_ratios_PG"):
            measure("a", np.zeros((3, 4)), np.zeros((3, 4)), np.full((3, 4), np.nan), [Standard()])


class TestCompare:
    def test_a_clear_difference_is_resolved_and_said(self):
        # More shift costs more KL; a much larger win rate survives the correction to the smaller KL? It must not:
        # both lie on one frontier through the origin, so at matched KL the chord puts the stronger one below.
        weak, strong = gaussian_method("weak", 0.3), gaussian_method("strong", 0.9)
        (comparison,) = [c for c in compare([weak, strong], baseline="weak") if c.procedure == "Standard"]
        assert comparison.difference.low > 0
        assert comparison.matched.estimate < 0
        assert not comparison.resolved
        assert "not resolved" in comparison.sentence
        assert "matched KL" in comparison.sentence

    def test_same_kl_better_shape(self):
        # Two policies with one KL; the second has 0.3 of a standard deviation more reward for it.
        good, poor = gaussian_method("good", 0.9), gaussian_method("poor", 0.6)
        poor = dataclasses.replace(poor, kl=good.kl)
        comparisons = compare([good, poor], baseline="poor")
        assert [c.procedure for c in comparisons] == ["Standard", "Best-of-4", "Worst-of-4"]
        for c in comparisons:
            assert c.resolved
            assert c.difference.estimate == pytest.approx(
                good.of(c.procedure).win_rate.estimate - poor.of(c.procedure).win_rate.estimate
            )
            assert c.matched.estimate == pytest.approx(c.difference.estimate)
            assert f"{c.procedure}: good is ahead of poor" in c.sentence
            json.dumps(c.to_dict(), allow_nan=False)
        assert "poor is behind good" in compare([good, poor], baseline="good")[0].sentence

    def test_no_difference_is_not_resolved(self):
        a, b = gaussian_method("a", 0.5, 1), gaussian_method("b", 0.5, 2)
        for comparison in compare([a, b], baseline="a"):
            assert not comparison.resolved
            assert "the interval includes zero" in comparison.sentence

    def test_false_claims_are_held_for_the_whole_family(self):
        # No method differs; 4 methods x 3 procedures. At 5 % for the family, 150 families give 7.5 ± 2.7 with a
        # false claim at most: over 20 has probability under 1e-4. Without the adjustment there would be about 60.
        rng, false_claims = np.random.default_rng(0), 0
        template = gaussian_method("0", 0.5, num_prompts=20, num_samples=4)
        for _ in range(150):
            results = []
            for k in range(5):
                entries = [
                    dataclasses.replace(
                        entry, win_rate=dataclasses.replace(entry.win_rate, per_prompt=rng.uniform(size=20).tolist())
                    )
                    for entry in template.procedures
                ]
                results.append(dataclasses.replace(template, label=str(k), procedures=entries))
            false_claims += any(c.resolved for c in compare(results, baseline="0"))
        assert false_claims <= 20

    def test_refuses_what_cannot_be_paired(self):
        a, b = gaussian_method("a", 0.5), gaussian_method("b", 0.5)
        with pytest.raises(InputError, match="no result is named 'c'"):
            compare([a, b], baseline="c")
        with pytest.raises(InputError, match="share a name"):
            compare([a, a], baseline="a")
        with pytest.raises(MismatchError, match="different prompts"):
            compare([a, gaussian_method("b", 0.5, num_prompts=100)], baseline="a")
        with pytest.raises(MismatchError, match="different prompts"):
            compare(
                [dataclasses.replace(a, prompt_ids=["x"] * 200), dataclasses.replace(b, prompt_ids=["y"] * 200)],
                baseline="a",
            )
        with pytest.raises(MismatchError, match="judged by"):
            compare([a, dataclasses.replace(b, reward="gold")], baseline="a")
        with pytest.raises(InputError, match="not measured under"):
            compare([a, dataclasses.replace(b, procedures=b.procedures[:1])], baseline="a")


class TestMatchedKL:
    def test_hand_worked(self):
        # Ahead with twice the KL: the chord from (0, ½) puts 0.8 at 0.65; the baseline stays at 0.6.
        wins, base, kl, base_kl = [0.7, 0.9], [0.5, 0.7], [0.9, 1.1], [0.4, 0.6]
        assert matched_difference(wins, base, kl, base_kl).estimate == pytest.approx(0.05)
        # Ahead with less KL: what was measured is already the least favourable.
        assert matched_difference(wins, base, base_kl, kl).estimate == pytest.approx(0.2)
        # Behind with less KL, mirrored.
        assert matched_difference(base, wins, base_kl, kl).estimate == pytest.approx(-0.05)

    def test_bounds_the_truth_on_a_concave_frontier(self):
        # Frontier ½ + c √KL of two methods, any pair of KLs: the matched value never overstates the lead of the better.
        rng = np.random.default_rng(0)
        for _ in range(200):
            c, d = rng.uniform(0.05, 0.3, size=2)
            kl, base_kl = rng.uniform(0.1, 1.5, size=2)
            win, base_win = 0.5 + c * np.sqrt(kl), 0.5 + d * np.sqrt(base_kl)
            matched = matched_difference([win] * 2, [base_win] * 2, [kl] * 2, [base_kl] * 2).estimate
            truth = (c - d) * np.sqrt(min(kl, base_kl))
            if win >= base_win:
                assert matched <= truth + 1e-12
            else:
                assert matched >= truth - 1e-12

    def test_first_order_error_agrees_with_repetition(self):
        # 400 repetitions: the spread is known to 3.5 %; bounds at four of them.
        rng = np.random.default_rng(1)
        estimates, claimed = [], []
        for _ in range(400):
            skill, kl = rng.normal(0.8, 0.1, size=40), rng.normal(1.0, 0.3, size=40)
            got = matched_difference(skill, rng.normal(0.6, 0.1, size=40), kl, rng.normal(0.7, 0.2, size=40))
            estimates.append(got.estimate)
            claimed.append(got.standard_error)
        assert np.mean(claimed) == pytest.approx(np.std(estimates, ddof=1), rel=0.15)


class TestFrontier:
    def test_points_and_limit(self):
        results = [gaussian_method("a", 0.5), gaussian_method("b", 1.0)]
        got = frontier(results, "Best-of-4")
        assert [point.label for point in got.points] == ["a", "b"]
        assert got.limit_kls[0] == 0
        assert got.limit_win_rates[0] == 0.5
        assert got.limit_kls[-1] > max(point.kl_high for point in got.points)
        assert np.all(np.diff(got.limit_win_rates) > 0)
        for point in got.points:
            assert point.kl_low < point.kl < point.kl_high
            assert point.low < point.win_rate < point.high
            assert point.win_rate < np.interp(point.kl, got.limit_kls, got.limit_win_rates)
        json.dumps(got.to_dict(), allow_nan=False)

    def test_a_procedure_that_cannot_be_stored_has_no_limit_curve(self):
        result = gaussian_method("a", 0.5)
        bare = dataclasses.replace(
            result, procedures=[dataclasses.replace(entry, spec=None) for entry in result.procedures]
        )
        assert frontier([bare], "Best-of-4").limit_kls == []

    def test_nothing_to_draw(self):
        with pytest.raises(InputError, match="nothing to draw"):
            frontier([], "Best-of-4")

    def test_interpolation_is_exact_at_the_runs_and_linear_between(self):
        runs = [gaussian_method("a", 1.0), gaussian_method("b", 0.5)]
        for run in runs:
            exact = win_rate_at(runs, "Best-of-4", run.kl.estimate)
            assert exact.estimate == pytest.approx(run.of("Best-of-4").win_rate.estimate)
        halfway = (runs[0].kl.estimate + runs[1].kl.estimate) / 2
        mean = np.mean([run.of("Best-of-4").win_rate.estimate for run in runs])
        assert win_rate_at(runs, "Best-of-4", halfway).estimate == pytest.approx(mean)
        low = runs[1].kl.estimate
        chord = 0.5 + (runs[1].of("Best-of-4").win_rate.estimate - 0.5) / 2
        assert win_rate_at(runs, "Best-of-4", low / 2).estimate == pytest.approx(chord)

    def test_difference_at_matched_kl_of_one_frontier_is_not_resolved(self):
        ours = [gaussian_method("a", 0.5, 1), gaussian_method("b", 1.0, 1)]
        theirs = [gaussian_method("c", 0.5, 2), gaussian_method("d", 1.0, 2)]
        assert abs(difference_at(ours, theirs, "Best-of-4", 0.3).estimate) < 0.05
        better = [dataclasses.replace(run, kl=theirs[0].kl) for run in ours[1:]]
        assert difference_at(better, theirs, "Best-of-4", 0.1).resolved

    def test_outside_the_measured_range(self):
        with pytest.raises(InputError, match="outside the measured range"):
            win_rate_at([gaussian_method("a", 0.5)], "Best-of-4", 3.0)
