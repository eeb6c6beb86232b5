"""The report must keep its false alarms, and see what it is there to see."""

from __future__ import annotations

import numpy as np
import pytest

from infalign.calibration.report import calibration_report
from infalign.errors import InputError
from infalign.procedures import BestOfN
from infalign.theory.optimal import optimal_transform


def test_false_alarms_are_as_rare_as_stated():
    rng = np.random.default_rng(0)
    reports = [calibration_report(rng.standard_exponential((30, 17)) * rng.uniform(1, 9, (30, 1))) for _ in range(600)]
    p_values = np.array([report.held_out_p_value for report in reports])
    # 5 % of 600 is 30, standard deviation 5.3; five of them are allowed. Seeded.
    assert 4 <= (p_values < 0.05).sum() <= 57
    assert np.mean([report.worst_prompt_p_value < 0.05 for report in reports]) < 0.1
    scores = np.array([(report.held_out_mean - 0.5) / report.held_out_standard_error for report in reports])
    assert scores.std() == pytest.approx(1.0, abs=0.12)


def test_shares_and_prompt_scores_have_the_errors_they_state():
    rng = np.random.default_rng(7)
    for num_ref in (9, 64):  # 5 gaps in 5 parts; 33 gaps in ten parts of 3 or 4
        reports = [calibration_report(rng.normal(size=(20, num_ref))) for _ in range(400)]
        expected, errors = np.array(reports[0].expected_shares), np.array(reports[0].share_standard_errors)
        assert expected.sum() == pytest.approx(1.0)
        z = (np.array([report.rank_shares for report in reports]) - expected) / errors
        # Means and variances over 400 reports have standard errors 0.05 and 0.07; five of them. Seeded.
        np.testing.assert_allclose(z.mean(axis=0), 0.0, atol=0.25)
        np.testing.assert_allclose(z.var(axis=0), 1.0, atol=0.36)
    many = calibration_report(rng.normal(size=(4000, 64)))
    # Quantiles at 5 %, 50 % and 95 % of 4000 normal numbers have standard errors 0.033, 0.020 and 0.033; five of them.
    np.testing.assert_allclose(np.array(many.prompt_scores)[[0, 9, 18]], [-1.645, 0.0, 1.645], atol=0.17)


def test_half_of_a_tie_counts_on_either_side():
    # Fitted 0, 1; held out 1 (a tie: rank 1½) and 2 (rank 2). Three gaps, three parts.
    report = calibration_report([[0.0, 1.0, 1.0, 2.0]])
    assert report.rank_shares == (0.0, 0.25, 0.75)
    assert report.expected_shares == pytest.approx((1 / 3,) * 3)


def test_a_change_between_the_halves_is_seen_and_named():
    rng = np.random.default_rng(1)
    rewards_PK = rng.normal(size=(200, 32))
    rewards_PK[:, 16:] += 0.3
    assert calibration_report(rewards_PK).held_out_p_value < 1e-6
    one = rng.normal(size=(200, 32))
    one[77, 16:] += 5.0
    report = calibration_report(one)
    assert report.worst_prompt == 77
    assert report.worst_prompt_p_value < 1e-3


def test_ties_levels_and_drift():
    report = calibration_report([[0.0, 0.0, 1.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    assert report.tie_mass == pytest.approx((2 / 6 + 1) / 2)
    assert report.effective_num_ref == 1.5
    assert report.constant_prompts == 1
    assert report.to_dict()["num_ref"] == 4
    rng = np.random.default_rng(2)
    shifted = rng.normal(size=(2000, 8)) + 2.0 * rng.normal(size=(2000, 1))
    # Truth 4 / (4 + 1); the estimate scatters by about 0.006.
    assert calibration_report(shifted).drift == pytest.approx(0.8, abs=0.03)
    assert calibration_report(rng.normal(size=(2000, 8))).drift < 0.02


def test_the_cost_of_k_is_the_theory_s():
    optimum = optimal_transform(BestOfN(4), beta=0.15)
    rng = np.random.default_rng(3)
    few, many = (calibration_report(rng.normal(size=(20, k)), optimum=optimum).win_rate_lost for k in (16, 100))
    assert 0.0 < many < few < 0.1


def test_too_few_references_are_refused():
    with pytest.raises(InputError, match="at least 4"):
        calibration_report(np.zeros((5, 3)))
    with pytest.raises(InputError, match="NaN"):
        calibration_report([[1.0, 2.0, 3.0, np.nan]])
