"""The limit for rewards with ties, against enumeration, direct optimisation and the continuous limit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import infalign as ia
from infalign.theory.levels import LevelOptima, level_masses
from infalign.theory.winrate import Objective

VALLEY = ia.FittedProcedure((0.75, 0, 0, 0, 0, 0, 0, 0.25), 1000)


def label(value):
    return value.label if isinstance(value, ia.InferenceProcedure) else None


def policy_measured(policy, masses, procedure, opponent=None):
    """KL and W of a policy over levels: the win of every pair of levels, each drawn through its procedure."""
    opponent = procedure if opponent is None else opponent
    ours = np.diff(procedure.distortion(np.clip(np.concatenate([[0], np.cumsum(policy)]), 0, 1)))
    theirs = np.diff(opponent.distortion(np.clip(np.concatenate([[0], np.cumsum(masses)]), 0, 1)))
    win = np.tril(np.ones((len(masses), len(masses))), -1) + 0.5 * np.eye(len(masses))
    safe = np.maximum(policy, 1e-300)
    return float((policy * np.log(safe / masses)).sum()), float(ours @ win @ theirs)


def test_four_equal_levels_and_best_of_16():
    """A quarter of the reference is at the top: its best of 16 nearly always is, and ties share the win."""
    four = np.full(4, 0.25)
    limits = ia.limit(ia.BestOfN(16), [0.0, 0.5, 2.0, 9.0], levels=four)
    most = 0.5 * (1 + 0.75**16)
    assert limits == pytest.approx([0.5, most, most, most], abs=1e-6)
    assert limits[1] == pytest.approx(0.50501, abs=1e-5)
    assert float(ia.limit(ia.BestOfN(16), 0.5)) > 0.97


def test_two_levels_by_hand():
    """One sample, half of the mass each: with q on the top level it wins 1/4 + q/2, at a KL of log 2 - entropy."""
    q = 0.8
    kl = np.log(2) + q * np.log(q) + (1 - q) * np.log(1 - q)
    assert float(ia.limit(ia.Standard(), kl, levels=[0.5, 0.5])) == pytest.approx(0.25 + q / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("procedure", "opponent"),
    [
        (ia.BestOfN(4), None),
        (ia.WorstOfN(4), None),
        (ia.OrderStatistic(k=2, n=3), None),
        (ia.WorstOfN(4), ia.BestOfN(4)),
        (VALLEY, None),
        (ia.Mixture([(0.5, ia.BestOfN(8)), (0.5, ia.WorstOfN(3))]), None),
    ],
    ids=label,
)
@pytest.mark.parametrize("masses", [(0.5, 0.5), (0.2, 0.5, 0.3), (0.1, 0.4, 0.3, 0.2)], ids=len)
def test_no_policy_on_a_lattice_is_better(procedure, opponent, masses):
    optima = LevelOptima(Objective.of(procedure, opponent), masses)
    steps = {2: 200, 3: 60, 4: 24}[len(masses)]
    lattice = [
        np.array(point) / steps
        for point in itertools.product(range(steps + 1), repeat=len(masses))
        if sum(point) == steps
    ]
    found = np.array([policy_measured(policy, np.array(masses), procedure, opponent) for policy in lattice])
    for beta in (0.5, 0.1, 0.02):
        best = optima.solve(beta)
        assert (found[:, 1] - beta * found[:, 0]).max() <= best.win_rate - beta * best.kl + 1e-9
    limits = ia.limit(procedure, found[::7, 0].clip(0), opponent, levels=masses)
    assert (found[::7, 1] <= limits + 2e-6).all()


def test_many_small_levels_are_the_continuous_limit():
    kls = [0.1, 0.5, 1.0]
    for procedure in (ia.BestOfN(4), ia.WorstOfN(4)):
        fine = ia.limit(procedure, kls, levels=np.full(400, 1 / 400))
        assert (fine <= ia.limit(procedure, kls) + 1e-6).all()
        assert fine == pytest.approx(ia.limit(procedure, kls), abs=5e-4)


def test_prompts_share_one_beta():
    """Two kinds of prompts: the mean of what each reaches at the same β, and a level of no mass is no level."""
    rows = [[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]
    both = LevelOptima(Objective.of(ia.BestOfN(4)), rows).solve(0.1)
    each = [LevelOptima(Objective.of(ia.BestOfN(4)), row).solve(0.1) for row in ([0.5, 0.5], [0.2, 0.3, 0.5])]
    assert both.win_rate == pytest.approx(np.mean([one.win_rate for one in each]), abs=1e-12)
    assert both.kl == pytest.approx(np.mean([one.kl for one in each]), abs=1e-12)
    assert float(ia.limit(ia.BestOfN(4), both.kl, levels=rows)) == pytest.approx(both.win_rate, abs=1e-6)


def test_levels_of_tied_rewards_are_their_shares():
    np.testing.assert_allclose(level_masses([[0, 1, 1, 2], [2, 2, 2, 0]]), [[0.25, 0.5, 0.25], [0.25, 0.75, 0]])


def test_levels_of_continuous_rewards_are_fine():
    rewards = np.random.default_rng(0).normal(size=(5, 16))
    masses = level_masses(rewards)
    assert masses.sum(axis=1) == pytest.approx(1)
    assert masses.max() <= 1 / 32
    assert ia.limit(ia.BestOfN(4), [0.5], levels=masses) == pytest.approx(ia.limit(ia.BestOfN(4), [0.5]), abs=2e-3)


@pytest.mark.parametrize("levels", [[0.5, 0.4], [1.5, -0.5], [np.nan, 1], [[[1.0]]], []])
def test_what_is_no_mass_is_refused(levels):
    with pytest.raises(ia.InputError, match="mass"):
        ia.limit(ia.BestOfN(4), 0.5, levels=levels)


@pytest.mark.parametrize("rewards", [[1.0, 2.0], [[np.nan, 1.0]], [[]]])
def test_rewards_that_are_no_table_are_refused(rewards):
    with pytest.raises(ia.InputError, match="finite rewards"):
        level_masses(rewards)


@pytest.mark.parametrize("procedure", [ia.BestOfN(4), ia.WorstOfN(4)], ids=label)
def test_a_prompt_with_one_level_has_nothing_to_win(procedure):
    assert ia.limit(procedure, [0.0, 0.5], levels=[1.0]) == pytest.approx([0.5, 0.5])
    one = ia.limit(procedure, [0.1, 0.2], levels=[0.5, 0.5])
    # With a second prompt that cannot be moved, half of the mean KL is spent for half of the mean gain.
    both = ia.limit(procedure, [0.05, 0.1], levels=[[0.5, 0.5], [1.0, 0.0]])
    assert both == pytest.approx(0.25 + one / 2, abs=2e-6)
    assert ia.limit(procedure, [0.1, 0.2], levels=[0.5, 0.0, 0.5]) == pytest.approx(one, abs=1e-9)


@pytest.mark.parametrize("short_of", [0.0, 1e-16, 4e-15, 1e-13])
def test_the_limit_at_the_largest_kl_is_that_of_the_best_level(short_of):
    """A KL that differs from log(1/p) by rounding: the policy gives the best level always."""
    limit = ia.limit(ia.WorstOfN(4), np.log(1 / 0.17) - short_of, levels=[0.83, 0.17])
    # v of the upper level is the mean of H(0.83) and 1, with H(q) = 1 - (1 - q)^4.
    assert float(limit) == pytest.approx(1.0 - 0.5 * 0.17**4, abs=1e-6)


def test_ragged_levels_are_refused():
    with pytest.raises(ia.InputError, match="equally many levels for every prompt"):
        ia.limit(ia.BestOfN(4), 0.5, levels=[[0.5, 0.5], [0.2, 0.3, 0.5]])
