"""ρ from a finished policy, against simulation of the channel."""

from __future__ import annotations

import numpy as np
import pytest

import infalign as ia
from infalign.errors import InputError
from infalign.evaluation.predictability import implied_predictability
from infalign.theory.predictability import channel_tilt_at_kl


def simulated(rho, kl, transform, prompts, samples, rng):
    """Per-prompt KL and standard win rate of a policy of the channel, as they would be measured."""
    policy = channel_tilt_at_kl(transform, kl, rho)
    grid = np.linspace(-8, 9, 4001)
    log_tilt = policy.log_tilt(grid)
    masses = np.exp(log_tilt - 0.5 * grid**2)
    s = np.interp(rng.random((prompts, samples)), np.cumsum(masses) / masses.sum(), grid)
    z = rho * s + np.sqrt(1 - rho**2) * rng.standard_normal(s.shape)
    reference = np.sort(rng.standard_normal(s.shape), axis=1)
    wins = np.mean([np.searchsorted(row, ours) / samples for row, ours in zip(reference, z, strict=True)], axis=1)
    return np.interp(s, grid, log_tilt).mean(axis=1), wins


@pytest.mark.parametrize("rho", [0.3, 0.6, 0.85])
@pytest.mark.parametrize("transform", [ia.Identity(), ia.Exponential(10.0)])
def test_exact_values_give_it_back(rho, transform):
    policy = channel_tilt_at_kl(transform, 0.5, rho)
    found = implied_predictability([policy.kl], [policy.win_rate(ia.Standard())], transform)
    assert found.estimate == pytest.approx(rho, abs=1e-3)
    assert found.standard_error is None


def test_full_predictability_is_one_and_more_is_cut_there():
    tilt = ia.TiltedPolicy(ia.Identity(), 0.2)
    found = implied_predictability([tilt.kl], [tilt.win_rate(ia.Standard())])
    assert found.estimate == pytest.approx(1.0, abs=2e-3)
    assert implied_predictability([0.1], [0.9]).estimate == 1.0


@pytest.mark.parametrize("rho", [0.5, 0.7])
def test_bias_and_jackknife_error_in_simulation(rho):
    rng = np.random.default_rng(11)
    found = [
        implied_predictability(*simulated(rho, 0.5, ia.Identity(), prompts=60, samples=16, rng=rng)) for _ in range(200)
    ]
    estimates = np.array([one.estimate for one in found])
    errors = np.array([one.standard_error for one in found])
    assert abs(estimates.mean() - rho) < 0.015
    # The spread over 200 runs is itself known to 5 %: false alarms at 20 % are 1 in 15,000. Seeded.
    assert errors.mean() == pytest.approx(estimates.std(ddof=1), rel=0.2)
    covered = np.mean([one.low <= rho <= one.high for one in found])
    assert 0.88 <= covered <= 0.99  # 95 %, give or take four standard errors


def test_where_it_cannot_be_told_it_is_said():
    for kls, wins in (([0.5, 0.4], [0.5, 0.49]), ([-0.01, 0.005], [0.6, 0.6])):
        found = implied_predictability(kls, wins, label="mine")
        assert found.estimate is None
        assert "mine does not show it" in found.reason
    # With an estimate but without an error: one prompt carries it all.
    found = implied_predictability([0.5, 0.5], [0.7, 0.45])
    assert found.estimate is not None
    assert found.standard_error is None
    assert "without one of the prompts" in found.reason
    with pytest.raises(InputError, match="one KL and one win rate"):
        implied_predictability([0.5], [0.6, 0.7])
