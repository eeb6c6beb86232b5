"""Exact counts against enumeration, Monte Carlo and the procedures that they contain."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest

from infalign.errors import InputError
from infalign.estimators import win_rate
from infalign.procedures import BestOfN, InferenceProcedure, Mixture, OrderStatistic, Standard, WorstOfN
from infalign.reshape import Reshaping, ReshapingData, predict_reshaping
from infalign.reshape.stratified import ExactCounts, best_split, stratified_win_rate
from tests.reshape.channel import Channel


def test_distortion_of_the_best_is_the_product() -> None:
    f, g = np.linspace(0, 1, 11), np.linspace(0, 1, 11) ** 2
    np.testing.assert_allclose(ExactCounts((3, 2)).distortion([f, g]), f**3 * g**2, atol=1e-14)
    np.testing.assert_allclose(ExactCounts((3, 2), 1).distortion([f, g]), 1 - (1 - f) ** 3 * (1 - g) ** 2, atol=1e-14)
    # The second of two candidates, one of each, by hand: F G; the first: F + G − F G.
    np.testing.assert_allclose(ExactCounts((1, 1), 1).distortion([f, g]), f + g - f * g, atol=1e-14)


@pytest.mark.parametrize("procedure", [Standard(), BestOfN(5), WorstOfN(4), OrderStatistic(2, 5)])
def test_equal_models_give_the_plain_procedure(procedure: InferenceProcedure) -> None:
    n = procedure.n
    assert n is not None
    u = np.linspace(0, 1, 41)
    for first in range(n + 1):
        exact = ExactCounts.of(procedure, (first, n - first))
        np.testing.assert_allclose(exact.distortion([u, u]), procedure.distortion(u), atol=1e-12)
        assert exact.win_rate([u, u], u) == pytest.approx(0.5)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_estimate_is_the_mean_over_all_subsets(k: int) -> None:
    rng = np.random.default_rng(k)
    a, b, ref = (rng.integers(0, 6, (1, size)).astype(float) for size in (4, 3, 5))
    exact = ExactCounts((2, 1), k)
    won = []
    for ours, other, rivals in product(combinations(a[0], 2), combinations(b[0], 1), combinations(ref[0], 3)):
        mine, theirs = sorted([*ours, *other])[k - 1], sorted(rivals)[k - 1]
        won.append(1.0 if mine > theirs else 0.5 if mine == theirs else 0.0)
    assert stratified_win_rate([a, b], ref, exact).estimate == pytest.approx(np.mean(won), abs=1e-12)


def test_one_model_is_m10() -> None:
    rng = np.random.default_rng(0)
    rewards, ref = rng.normal(0.5, 1, (7, 20)), rng.normal(size=(7, 24))
    for procedure in (BestOfN(8), WorstOfN(5), OrderStatistic(3, 6)):
        assert procedure.n is not None
        ours = stratified_win_rate([rewards], ref, ExactCounts.of(procedure, [procedure.n]))
        np.testing.assert_allclose(ours.per_prompt, win_rate(rewards, ref, procedure).per_prompt, atol=1e-12)


def test_estimate_agrees_with_the_distortion_and_a_simulation() -> None:
    # The aligned model has CDF u^3: its rewards are cube roots of uniforms.
    rng = np.random.default_rng(1)
    exact = ExactCounts((12, 4))
    u = np.linspace(0, 1, 20_001)
    truth = exact.win_rate([u, u**3], u)
    draws = 200_000
    best = np.maximum(rng.random(draws) ** (1 / 12), rng.random(draws) ** (1 / 12))  # 12 of 3·4 + 12 uniforms, twice
    assert np.mean(best > rng.random(draws) ** (1 / 16)) == pytest.approx(truth, abs=0.005)  # 4.5 standard errors
    estimate = stratified_win_rate(
        [rng.random((400, 24)), rng.random((400, 8)) ** (1 / 3)], rng.random((400, 32)), exact
    )
    assert abs(estimate.estimate - truth) < 4 * estimate.standard_error  # 6e-5 by chance


def test_best_split_lists_every_split_within_the_budget() -> None:
    rng = np.random.default_rng(2)
    data = Channel.random(rng, 60, 2.0).draw(rng, 32, 16)
    splits = best_split(data, BestOfN(4))
    assert {split.procedure.counts for split in splits} == {(4, 0), (3, 1), (2, 2), (1, 3), (0, 4)}
    assert splits[0].procedure.counts == (0, 4)
    by_counts = {split.procedure.counts: split for split in splits}
    assert by_counts[4, 0].kl.estimate == pytest.approx(0.0, abs=1e-12)
    assert abs(by_counts[4, 0].win_rate.estimate - 0.5) < 0.02  # its own rollouts, in halves: nearly exact
    limited = best_split(data, BestOfN(4), kl_budget=0.5)
    assert {split.procedure.counts for split in limited} == {c for c, s in by_counts.items() if s.kl.estimate <= 0.5}
    assert limited[0].procedure.counts == (3, 1)
    assert limited[0].procedure.label == "best of 3 + 1"
    # Fixed counts beat the mixture of the same weights: its number of bold candidates varies, and W is concave in it.
    mixed = predict_reshaping(data, Reshaping.mixture(0.25), [BestOfN(4)]).win_rates["Best-of-4"]
    assert limited[0].win_rate.estimate > mixed.estimate


def test_what_cannot_be_split_is_refused() -> None:
    rewards = np.random.default_rng(0).random((3, 4))
    data = Channel(np.ones(2), np.full(2, 0.6)).draw(np.random.default_rng(0), 8, 8)
    with pytest.raises(InputError, match="no fixed rank"):
        best_split(data, Mixture([(0.5, Standard()), (0.5, BestOfN(4))]))
    with pytest.raises(InputError, match="too few reference rollouts"):
        best_split(data, BestOfN(5))
    with pytest.raises(InputError, match="no rollouts"):
        best_split(ReshapingData(data.ref), BestOfN(2))
    with pytest.raises(InputError, match="samples for"):
        stratified_win_rate([rewards], rewards, ExactCounts((5,)))
    with pytest.raises(InputError, match="NaN"):
        stratified_win_rate([rewards * np.nan], rewards, ExactCounts((2,)))
    with pytest.raises(InputError, match="no candidate"):
        ExactCounts((0, 0))
    with pytest.raises(InputError, match="do not sum"):
        ExactCounts.of(BestOfN(4), (1, 2))
