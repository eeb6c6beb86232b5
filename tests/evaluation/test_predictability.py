"""ρ from a finished policy, against simulation of the channel."""

from __future__ import annotations

import numpy as np
import pytest

import infalign as ia
from infalign.errors import InputError
from infalign.evaluation.frontier import frontier
from infalign.evaluation.measure import measure
from infalign.evaluation.predictability import implied_predictability, with_predictability
from infalign.report.figures import frontier_figure, save_frontier_png, styles
from infalign.report.table import text_table
from infalign.report.words import markdown_table, predictability_lines
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


PROCEDURES = [ia.BestOfN(4), ia.Standard()]


def shifted(label, shift, rho, seed):
    """A policy that shifts a score by which it knows the reward with correlation ρ; 60 prompts of 16 responses."""
    rng = np.random.default_rng(seed)
    s, e, reference = rng.standard_normal((3, 60, 16))
    s = s + shift
    return measure(
        label, rho * s + np.sqrt(1 - rho**2) * e, reference, shift * s - shift**2 / 2, PROCEDURES, reward="mine"
    )


def test_identity_gives_the_second_limit_of_all():
    results = [shifted("best", 0.9, 0.65, 1), shifted("identity", 1.0, 0.65, 2), shifted("raw", 1.1, 0.65, 3)]
    limited, found = with_predictability(results, PROCEDURES, {"best": ia.Exponential(10.0), "identity": ia.Identity()})
    assert found.policy == "identity"
    assert found.identity
    assert found.estimate == pytest.approx(0.65, abs=4 * found.standard_error)
    for result in limited:
        entry = result.of("Best-of-4")
        assert entry.predictable_limit == pytest.approx(
            float(ia.limit(ia.BestOfN(4), result.kl.estimate, predictability=found.estimate)), abs=1e-8
        )
        assert entry.predictable_limit < entry.limit
    # Without identity the first calibrated policy is taken, with its own transform; and that is said.
    _, other = with_predictability(results[::2], PROCEDURES, {"best": ia.Exponential(10.0)})
    assert (other.policy, other.identity) == ("best", False)
    assert "too low" in " ".join(predictability_lines(other))
    # Where nothing is known of how models were aligned, that is said as well.
    assert with_predictability([results[2]], PROCEDURES)[1].identity is False
    # No single samples, no estimate.
    bare = measure("a", *np.random.default_rng(0).standard_normal((2, 5, 4)), np.full((5, 4), 0.1), [ia.BestOfN(4)])
    assert with_predictability([bare], [ia.BestOfN(4)]) == ([bare], None)


def test_it_is_in_the_table_the_figure_and_the_words(tmp_path):
    limited, found = with_predictability([shifted("identity", 1.0, 0.65, 2)], PROCEDURES)
    table = text_table(limited, [], 4, None, predictability=found)
    entry = limited[0].of("Best-of-4")
    assert f"({100 * entry.limit:.1f}, {100 * entry.predictable_limit:.1f})" in table
    named = f"as well as identity does (ρ = {found.estimate:.2f} ± {found.standard_error:.2f}; Gaussian model)"
    for text in (table, " ".join(predictability_lines(found))):
        assert f"limit for a policy that predicts this reward {named}" in text
        assert "heavy-tailed" in text
    assert f"| *at its predictability* | {limited[0].kl.estimate:.3f} | " in markdown_table(limited)
    data = frontier(limited, "Best-of-4", predictability=found)
    traces = frontier_figure(data, styles(["identity"]))["data"]
    second = next(trace for trace in traces if trace["name"].endswith(named))
    assert second["line"]["dash"] == "dash"
    np.testing.assert_allclose(
        second["y"][::13], ia.limit(ia.BestOfN(4), second["x"][::13], predictability=found.estimate), atol=2e-5
    )
    assert all(low <= high + 1e-9 for low, high in zip(second["y"], data.limit_win_rates, strict=True))
    assert save_frontier_png(tmp_path / "frontier.png", [data]).stat().st_size > 10_000


def test_a_policy_that_does_not_win_says_so():
    limited, found = with_predictability([shifted("identity", -0.3, 0.6, 4)], PROCEDURES)
    assert found.estimate is None
    assert "No limit for a policy of limited predictability" in text_table(limited, [], 4, None, predictability=found)
