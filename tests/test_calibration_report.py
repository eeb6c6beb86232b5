"""The report must keep its false alarms, and see what it is there to see."""

from __future__ import annotations

import numpy as np
import pytest

from infalign.calibration_report import calibration_report
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
