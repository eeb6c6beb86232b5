"""Several rewards combined after calibration: exact ranks, and only proportions and order matter."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from infalign.calibration.calibrator import RewardCalibrator
from infalign.calibration.combined import CombinedCalibrator
from infalign.errors import InputError, StorageError


def by_brute_force(refs_KM, new_M, weights):
    """Rank of the newcomer's weighted mean rank in the pool of K + 1, ties ½."""
    pool = np.vstack([refs_KM, new_M])
    ranks = (pool[:, None, :] > pool[None, :, :]).sum(axis=1) + 0.5 * (pool[:, None, :] == pool[None, :, :]).sum(axis=1)
    scores = np.round(ranks @ (np.asarray(weights) / np.sum(weights)), 9)
    return (scores[:-1] < scores[-1]).sum() + 0.5 * (scores[:-1] == scores[-1]).sum()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 3), st.booleans())
def test_ranks_agree_with_brute_force(seed, num_ref, num_rewards, coarse):
    rng = np.random.default_rng(seed)
    draw = (
        (lambda *shape: rng.integers(0, 3, shape).astype(float))
        if coarse
        else (lambda *shape: rng.standard_normal(shape))
    )
    refs_PKM, new_PGM = draw(4, num_ref, num_rewards), draw(4, 5, num_rewards)
    weights = rng.uniform(0.1, 2.0, num_rewards)
    got = CombinedCalibrator(weights).fit(refs_PKM).ranks(new_PGM)
    expected = [[by_brute_force(refs_PKM[p], new, weights) for new in new_PGM[p]] for p in range(4)]
    np.testing.assert_array_equal(got, expected)


def test_one_reward_is_plain_calibration():
    rng = np.random.default_rng(0)
    refs, new = rng.integers(0, 6, (5, 9)).astype(float), rng.integers(0, 6, (5, 4)).astype(float)
    plain, combined = RewardCalibrator().fit(refs), CombinedCalibrator([3.0]).fit(refs[:, :, None])
    np.testing.assert_array_equal(combined.ranks(new[:, :, None]), plain.ranks(new))
    np.testing.assert_array_equal(combined.score(new[:, :, None]), plain.calibrate(new))
    assert combined.tie_mass == pytest.approx(plain.tie_mass)


def test_ranks_of_the_reference_are_uniform_where_rewards_disagree():
    """Exactly uniform over 0..K by exchangeability: chi-square, false alarms 1 in 1,000."""
    rng = np.random.default_rng(1)
    shared = rng.standard_normal((40_000, 5, 1))
    rewards = np.concatenate([shared, -shared + rng.standard_normal((40_000, 5, 1))], axis=2)
    ranks = CombinedCalibrator([2.0, 1.0], ties="random").fit(rewards[:, :4]).ranks(rewards[:, 4:])
    assert stats.chisquare(np.bincount(ranks.ravel().astype(int), minlength=5)).pvalue > 1e-3


@pytest.mark.parametrize("change", [lambda r: np.exp(3 * r), lambda r: r * [1e6, 1e-6] + [5.0, -7.0]])
def test_scales_of_the_rewards_do_not_matter(change):
    rng = np.random.default_rng(2)
    refs, new = rng.standard_normal((3, 8, 2)), rng.standard_normal((3, 6, 2))
    fitted, changed = CombinedCalibrator([1, 2]).fit(refs), CombinedCalibrator([10, 20]).fit(change(refs))
    np.testing.assert_array_equal(fitted.ranks(new), changed.ranks(change(new)))


def test_better_by_every_reward_is_never_worse():
    rng = np.random.default_rng(3)
    refs, new = rng.standard_normal((6, 7, 3)), rng.standard_normal((6, 50, 3))
    fitted = CombinedCalibrator([1, 1, 2]).fit(refs)
    assert (fitted.ranks(new + rng.exponential(size=new.shape)) >= fitted.ranks(new)).all()


def test_ragged_references_and_any_order_of_rows():
    rng = np.random.default_rng(4)
    refs, mask = rng.standard_normal((2, 4, 2)), np.array([[True, True, False, True], [True] * 4])
    fitted = CombinedCalibrator([1, 3]).fit(np.where(mask[:, :, None], refs, np.nan), mask_PK=mask)
    new = rng.standard_normal((10, 2))
    index = np.array([1, 0] * 5)
    assert fitted.num_ref_P.tolist() == [3, 4]
    expected = [by_brute_force(refs[p][mask[p]], one, [1, 3]) for p, one in zip(index, new, strict=True)]
    np.testing.assert_array_equal(fitted.ranks(new, prompt_index=index), expected)
    np.testing.assert_allclose(fitted.calibrate(new, prompt_index=index), expected / fitted.num_ref_P[index])


def test_equal_sums_of_other_ranks_tie():
    """Ranks (0, 1, 2) and permutations of them with equal weights: all six have the same sum."""
    refs = np.array([[list(order) for order in itertools.permutations([0.0, 1.0, 2.0])]])
    assert CombinedCalibrator([1, 1, 1]).fit(refs).tie_mass == 1.0


def test_it_survives_a_save(tmp_path):
    rng = np.random.default_rng(5)
    refs, new = rng.standard_normal((3, 5, 2)), rng.standard_normal((3, 4, 2))
    fitted = CombinedCalibrator([0.3, 0.7]).fit(refs)
    fitted.save(tmp_path / "c")
    np.testing.assert_array_equal(CombinedCalibrator.load(tmp_path / "c").ranks(new), fitted.ranks(new))
    with pytest.raises(StorageError):
        CombinedCalibrator.load(tmp_path)


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [1.0, -1.0], [float("nan")], [[1.0]]])
def test_unusable_weights_are_refused(weights):
    with pytest.raises(InputError, match="weights"):
        CombinedCalibrator(weights)


def test_rewards_that_do_not_fit_are_refused():
    fitted = CombinedCalibrator([1, 1]).fit(np.zeros((2, 3, 2)))
    with pytest.raises(InputError, match="shape"):
        fitted.ranks(np.zeros((2, 3)))
    with pytest.raises(InputError, match="NaN"):
        fitted.ranks(np.full((2, 1, 2), np.nan))
    with pytest.raises(InputError, match="shape"):
        CombinedCalibrator([1, 1]).fit(np.zeros((2, 3)))


def test_references_are_ranked_among_the_others_of_their_prompt():
    """By hand: quantile sums among the other two are 1.5, 0 and 1.5, so that two tie above one."""
    refs_PKM = [[[3.0, 5.0], [1.0, 4.0], [2.0, 6.0]]]
    ranks, ties = CombinedCalibrator([1, 1]).fit(refs_PKM).reference_ranks_and_ties()
    assert (ranks.tolist(), ties.tolist()) == ([1.5, 0.0, 1.5], [1, 0, 1])
    ranks, ties = CombinedCalibrator([1, 1]).fit(refs_PKM).ranks_and_ties([[[2.5, 5.5]]])
    assert ranks.shape == ties.shape == (1, 1)
