"""What a rank is worth: exact at the reference, equal to brute force where rewards tie, right for few references."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import betainc, betaln

from infalign.procedures import BestOfN, InferenceProcedure, Mixture, OrderStatistic, Standard, WorstOfN
from infalign.theory.winrate import Objective
from infalign.training.rank_value import RankScale, RankTable

EDGES = np.linspace(0.0, 1.0, 1025)


@pytest.mark.parametrize("num_ref", [1, 5, 40])
def test_at_the_reference_it_is_the_mean_of_what_the_rank_leaves_open(num_ref):
    """Best-of-4 at the reference: R(u) = 16 u^7 / 7, so R(b) is a moment of Beta(b + 1, K − b + 1)."""
    rank = np.arange(num_ref + 1)
    moment = np.exp(betaln(rank + 8.0, num_ref - rank + 1.0) - betaln(rank + 1.0, num_ref - rank + 1.0))
    found = RankScale.of(Objective.of(BestOfN(4)), num_ref, EDGES).reward(EDGES)
    assert found.by_rank == pytest.approx(16 / 7 * moment, abs=1e-4)
    standard = RankScale.of(Objective.of(Standard()), num_ref, EDGES).reward(EDGES)
    assert standard.by_rank == pytest.approx((rank + 1) / (num_ref + 2), abs=1e-5)


def chances(procedure: InferenceProcedure, share_L: np.ndarray) -> np.ndarray:
    """How likely each level is what the procedure returns: all outcomes of its n draws, one by one."""
    out_L = np.zeros(len(share_L))
    for weight, part in procedure.components:
        kth = part.k if isinstance(part, OrderStatistic) else {BestOfN: part.n, WorstOfN: 1}.get(type(part), 1)
        for drawn in product(range(len(share_L)), repeat=part.n or 1):
            out_L[sorted(drawn)[kth - 1]] += weight * np.prod(share_L[list(drawn)])
    return out_L


def brute_force(procedure: InferenceProcedure, policy_L: np.ndarray, reference_L: np.ndarray) -> float:
    """W with ties counted one half; a mixture meets itself part by part."""
    total = 0.0
    for weight, part in procedure.components:
        mine, theirs = chances(part, policy_L), chances(part, reference_L)
        total += weight * float(mine @ (np.cumsum(theirs) - theirs / 2))
    return total


@pytest.mark.parametrize("num_levels", [2, 3, 4, 5, 6])
@pytest.mark.parametrize(
    "procedure",
    [BestOfN(4), WorstOfN(4), OrderStatistic(k=2, n=3), Mixture([(0.3, Standard()), (0.7, BestOfN(3))])],
    ids=lambda p: p.label,
)
def test_with_ties_it_equals_brute_force(procedure, num_levels):
    """The derivative of W by finite differences of full enumeration; 2,000 references, so that levels are known."""
    rng = np.random.default_rng([num_levels, len(procedure.label)])
    num_ref = 2000
    counts = np.maximum(np.rint(rng.dirichlet(np.full(num_levels, 3.0)) * num_ref).astype(int), 60)
    counts[-1] += num_ref - counts.sum()
    policy = rng.dirichlet(np.full(num_levels, 3.0))
    above = np.cumsum(counts)
    places = (np.concatenate([[0], above[:-1], [num_ref]]) + 0.5) / (num_ref + 1)
    places[[0, -1]] = 0.0, 1.0
    edges = np.union1d(np.linspace(0, 1, 401), places)
    cdf = np.interp(edges, places, np.concatenate([[0.0], np.cumsum(policy)]))
    table = RankScale.of(Objective.of(procedure), num_ref, edges).reward(cdf, counts)
    found = table.at(above - counts, counts)
    truth = np.empty(num_levels)
    for level in range(num_levels):
        step = 1e-5 * (np.arange(num_levels) == level)
        up, down = (brute_force(procedure, (policy + sign * step), counts / num_ref) for sign in (1, -1))
        truth[level] = (up - down) / 2e-5
    # Without the constraint Σ q = 1 the derivative is R plus a constant.
    assert found - found[0] == pytest.approx(truth - truth[0], abs=5e-3)


def test_two_levels_by_hand():
    """Best-of-2 at the reference, half and half: R rises by h(½) (v(2) − v(1)) = 1 · (0.625 − 0.125)."""
    num_ref = 2000
    counts = np.array([1000, 1000])
    table = RankScale.of(Objective.of(BestOfN(2)), num_ref, EDGES).reward(EDGES, counts)
    low, high = table.at(np.array([0, 1000]), counts)
    assert high - low == pytest.approx(0.5, abs=2e-3)
    assert np.unique(table.half_cells).size == 2


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=8),
    st.sampled_from([BestOfN(4), WorstOfN(4), BestOfN(16), Standard()]),
    st.floats(0.3, 3.0),
)
def test_more_is_never_worth_less(counts, procedure, power):
    """However references tie: R rises with the rank and from level to level, and a tie lies between its neighbours."""
    level_counts = np.array(counts)
    num_ref = int(level_counts.sum())
    table = RankScale.of(Objective.of(procedure), num_ref, EDGES).reward(EDGES**power, level_counts)
    above = np.cumsum(level_counts)
    levels = table.at(above - level_counts, level_counts)
    assert (np.diff(levels) >= -1e-9).all()
    assert (np.diff(table.by_rank) >= -1e-9).all()
    assert np.isfinite(table.half_cells).all()
    assert (np.diff(table.half_cells[level_mask(level_counts)]) >= -1e-9).all()


def level_mask(level_counts: np.ndarray) -> np.ndarray:
    """The half-cells that belong to levels of several references."""
    num_ref, mask = int(level_counts.sum()), np.zeros(2 * int(level_counts.sum()) + 2, dtype=bool)
    above = np.cumsum(level_counts)
    for high, count in zip(above, level_counts, strict=True):
        if count > 1:
            low = high - count
            mask[(0 if low == 0 else 2 * low + 1) : (2 * num_ref + 2 if high == num_ref else 2 * high + 1)] = True
    return mask


def test_levels_of_one_reference_are_a_continuous_distribution():
    scale = RankScale.of(Objective.of(BestOfN(4)), 12, EDGES)
    plain, single = scale.reward(EDGES**2), scale.reward(EDGES**2, np.ones(12, dtype=int))
    assert single.by_rank.tolist() == plain.by_rank.tolist()
    # Equal to one reference: half of the cell on either side of it.
    assert plain.at(np.array([4]), np.array([1])) == pytest.approx(plain.by_rank[4:6].mean())


def test_the_normaliser_is_that_of_draws_of_the_reference():
    table = RankTable(np.array([0.0, 1.0]), np.array([0.0, 0.0, 1.0, 2.0]))
    assert table.log_partition == pytest.approx(np.log((1 + 1 + np.e + np.e**2) / 4))
    assert table.times(0.5).log_partition == pytest.approx(np.log(np.mean(np.exp([0, 0, 0.5, 1.0]))))
    assert table.at_least(0.5).by_rank.tolist() == [0.5, 1.0]
    assert table.at_most(0.5).half_cells.tolist() == [0.0, 0.0, 0.5, 0.5]


def test_a_policy_that_sees_ranks_is_spread_by_their_posterior():
    """Two references, all mass on the highest rank: F(u) = I_u(3, 1) = u³, so R' = 2 u³ · 2u for Best-of-2."""
    top = np.clip(3 * EDGES - 2, 0, 1)
    table = RankScale.of(Objective.of(BestOfN(2)), 2, EDGES).reward(top)
    posterior = np.diff(betainc([[1.0], [2.0], [3.0]], [[3.0], [2.0], [1.0]], EDGES[None, :]), axis=1)
    value = 4 * EDGES**5 / 5
    # The grid has no edge at 2/3, where F bends: a share of at most 1/1024 is a little off.
    assert table.by_rank == pytest.approx(posterior @ ((value[1:] + value[:-1]) / 2), abs=2e-3)
