"""Calibration against hand-worked values, brute force and the uniform law it must produce."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from infalign.calibration.calibrator import RefinedCalibrator, RewardCalibrator
from infalign.errors import InputError, StorageError


def brute_force(ref_rewards_PK, rewards_PG, ties):
    """M5 as it is written, one comparison at a time."""
    out = []
    for references, scores in zip(ref_rewards_PK, rewards_PG, strict=True):
        weight = {"midrank": 0.5, "strict": 0.0, "inclusive": 1.0}[ties]
        out.append([sum(float(z < r) + weight * float(z == r) for z in references) / len(references) for r in scores])
    return out


def test_hand_worked_values():
    calibrator = RewardCalibrator().fit([[3.0, 1.0, 2.0, 2.0]])
    assert calibrator.calibrate([[0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 9.0]]).tolist() == [
        [0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 1]
    ]
    assert calibrator.ranks([[2.0, 9.0]]).tolist() == [[2.0, 4.0]]
    assert calibrator.calibrate_references() == pytest.approx(np.array([[1.0, 0.0, 0.5, 0.5]]))
    assert calibrator.tie_mass == pytest.approx(1 / 6)  # one pair of six


@pytest.mark.parametrize(("ties", "expected"), [("strict", 0.25), ("inclusive", 0.75), ("midrank", 0.5)])
def test_tie_rules(ties, expected):
    calibrator = RewardCalibrator(ties=ties).fit([[1.0, 2.0, 2.0, 3.0]])
    assert calibrator.calibrate([[2.0]])[0, 0] == expected


def test_random_ties_are_whole_ranks_and_uniform():
    calibrator = RewardCalibrator(ties="random", seed=3).fit([[5.0, 5.0, 5.0]])
    ranks = calibrator.ranks(np.full((1, 8000), 5.0))
    counts = np.bincount(ranks.astype(int).ravel(), minlength=4)
    # Four equally likely ranks: chi-square with 3 degrees of freedom exceeds 21.1 with probability 1e-4; seeded.
    assert ((counts - 2000) ** 2 / 2000).sum() < 21.1
    assert set(np.unique(ranks)) == {0, 1, 2, 3}


@given(
    hnp.arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 17)), elements=st.integers(-4, 4).map(float)),
    st.data(),
)
def test_agrees_with_brute_force(ref_rewards_PK, data):
    shape = (ref_rewards_PK.shape[0], data.draw(st.integers(1, 6)))
    rewards_PG = data.draw(hnp.arrays(np.float64, shape, elements=st.integers(-5, 5).map(float)))
    for ties in ("midrank", "strict", "inclusive"):
        calibrator = RewardCalibrator(ties=ties).fit(ref_rewards_PK)
        np.testing.assert_allclose(calibrator.calibrate(rewards_PG), brute_force(ref_rewards_PK, rewards_PG, ties))


@given(
    st.lists(st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=9), min_size=1, max_size=6),
    st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=5),
)
def test_ragged_prompts_equal_prompts_fitted_alone(rows, scores):
    together = RewardCalibrator().fit(rows)
    for p, row in enumerate(rows):
        alone = RewardCalibrator().fit([row])
        np.testing.assert_array_equal(together.calibrate(scores, prompt_index=p), alone.calibrate([scores])[0])
        np.testing.assert_allclose(together.calibrate_references()[p], alone.calibrate_references()[0])
        assert together.tie_mass_P[p] == pytest.approx(alone.tie_mass)


def test_mask_equals_ragged():
    rewards = np.array([[1.0, np.nan, 3.0], [2.0, 4.0, 0.0]])
    mask = np.array([[True, False, True], [True, True, True]])
    masked = RewardCalibrator().fit(rewards, mask_PK=mask)
    ragged = RewardCalibrator().fit([[1.0, 3.0], [2.0, 4.0, 0.0]])
    scores = [[2.0], [2.0]]
    np.testing.assert_array_equal(masked.calibrate(scores), ragged.calibrate(scores))
    assert masked.num_ref_P.tolist() == [2, 3]


def test_prompt_index_gives_the_same_as_rows():
    rng = np.random.default_rng(0)
    calibrator = RewardCalibrator().fit(rng.normal(size=(7, 13)))
    rewards_PG = rng.normal(size=(7, 4))
    index = np.repeat(np.arange(7), 4)
    order = rng.permutation(28)
    flat = calibrator.calibrate(rewards_PG.ravel()[order], prompt_index=index[order])
    np.testing.assert_array_equal(flat, calibrator.calibrate(rewards_PG).ravel()[order])


@given(st.integers(0, 2**32 - 1), st.sampled_from(["midrank", "strict", "inclusive"]))
def test_any_increasing_map_within_a_prompt_changes_nothing(seed, ties):
    rng = np.random.default_rng(seed)
    ref, new = rng.integers(-3, 4, (3, 9)).astype(float), rng.integers(-3, 4, (3, 5)).astype(float)
    scale, offset = rng.uniform(0.5, 4, (3, 1)), rng.normal(size=(3, 1))
    plain = RewardCalibrator(ties=ties).fit(ref).calibrate(new)
    # exp(x) is increasing and exact enough on small integers to keep distinct values distinct.
    moved = RewardCalibrator(ties=ties).fit(np.exp(ref) * scale + offset).calibrate(np.exp(new) * scale + offset)
    np.testing.assert_array_equal(plain, moved)


def test_references_average_to_one_half_exactly():
    rng = np.random.default_rng(1)
    calibrator = RewardCalibrator().fit(rng.integers(0, 3, (20, 11)).astype(float))
    left_out = calibrator.calibrate_references()
    np.testing.assert_allclose(left_out.mean(axis=1), 0.5)
    wins = (
        RewardCalibrator()
        .fit(np.delete(calibrator.ref_rewards_PK, 4, axis=1))
        .calibrate(calibrator.ref_rewards_PK[:, 4:5])
    )
    np.testing.assert_allclose(left_out[:, 4:5], wins)


def test_fresh_reference_ranks_are_uniform():
    """M4 at finite K: the rank of a fresh response among K references is uniform on 0..K."""
    rng = np.random.default_rng(2)
    rewards = rng.standard_exponential((40_000, 8)) * rng.uniform(0.1, 9, (40_000, 1))
    ranks = RewardCalibrator().fit(rewards[:, :7]).ranks(rewards[:, 7:]).astype(int).ravel()
    counts = np.bincount(ranks, minlength=8)
    # Chi-square with 7 degrees of freedom exceeds 29.9 with probability 1e-4; seeded, so it cannot flicker.
    assert ((counts - 5000) ** 2 / 5000).sum() < 29.9


def test_save_and_load(tmp_path):
    rng = np.random.default_rng(3)
    for references in (rng.normal(size=(5, 6)), [[1.0], [2.0, 3.0]]):
        calibrator = RewardCalibrator(ties="inclusive").fit(references)
        calibrator.save(tmp_path / "calibrator")
        again = RewardCalibrator.load(tmp_path / "calibrator")
        scores = rng.normal(size=(calibrator.num_prompts, 3))
        np.testing.assert_array_equal(calibrator.calibrate(scores), again.calibrate(scores))
        assert again.ties == "inclusive"
    with pytest.raises(StorageError, match="no readable calibrator"):
        RewardCalibrator.load(tmp_path / "nothing")


def test_errors_say_what_and_where():
    calibrator = RewardCalibrator()
    with pytest.raises(InputError, match="no references yet"):
        calibrator.calibrate([[1.0]])
    with pytest.raises(InputError, match="2 rewards are NaN or infinite, the first at prompt 0, reference 1"):
        calibrator.fit([[1.0, np.nan], [np.inf, 2.0]])
    with pytest.raises(InputError, match="1 prompt has no reference reward, the first is prompt 1"):
        calibrator.fit([[1.0, 2.0], []])
    with pytest.raises(InputError, match="shape"):
        calibrator.fit([1.0, 2.0])
    calibrator.fit([[1.0, 2.0], [3.0, 4.0]])
    with pytest.raises(InputError, match=r"1 reward is NaN or infinite, the first at \(1, 0\)"):
        calibrator.calibrate([[1.0], [np.nan]])
    with pytest.raises(InputError, match="holds 2 prompts"):
        calibrator.calibrate([[1.0]])
    with pytest.raises(InputError, match="prompt 2 is not one of the 2"):
        calibrator.calibrate([1.0], prompt_index=[2])
    with pytest.raises(InputError, match="one reference only"):
        RewardCalibrator().fit([[1.0]]).calibrate_references()
    with pytest.raises(InputError, match="unknown tie rule"):
        RewardCalibrator(ties="lucky")


def test_refining_with_nothing_is_plain_calibration():
    rng = np.random.default_rng(4)
    ref, new = rng.integers(0, 5, (4, 9)).astype(float), rng.integers(-1, 6, (4, 7)).astype(float)
    plain = RewardCalibrator().fit(ref).calibrate(new)
    refined = RefinedCalibrator(ref, rng.normal(size=ref.shape), np.empty((4, 0)), np.empty((4, 0)))
    # With no policy responses the log-ratios of the references do not matter.
    np.testing.assert_allclose(refined.calibrate(new), plain, atol=1e-12)
    np.testing.assert_allclose(refined.effective_num_ref_P, 9.0)
    # Responses of a policy equal to the reference are references like the others.
    same = RefinedCalibrator(ref, np.zeros_like(ref), new, np.zeros_like(new))
    both = RewardCalibrator().fit(np.concatenate([ref, new], axis=1))
    np.testing.assert_allclose(same.calibrate(ref), both.calibrate(ref), atol=1e-12)
    np.testing.assert_allclose(same.calibrate([1.5], prompt_index=2), both.calibrate([1.5], prompt_index=2))


def test_refining_is_right_on_average_and_sharper_where_the_policy_is():
    """p uniform, π with density 4u³ (Best-of-4): the top is resolved far better, and nowhere is there a bias."""
    rng = np.random.default_rng(5)
    ref, new = rng.random((4000, 16)), rng.random((4000, 32)) ** 0.25
    refined = RefinedCalibrator(ref, np.log(4 * ref**3), new, np.log(4 * new**3))
    plain = RewardCalibrator().fit(ref)
    at = np.tile([0.3, 0.6, 0.9, 0.97], (4000, 1))
    guess, baseline = refined.calibrate(at), plain.calibrate(at)
    # Self-normalising biases by O(1/K); measured 0.004 at most. Monte Carlo error below 0.002; seeded.
    assert np.abs(guess.mean(axis=0) - at[0]).max() < 0.01
    ratio = guess.std(axis=0) / baseline.std(axis=0)
    assert (ratio < 1.0).all()
    assert ratio[3] < 0.45
    assert (guess.min() >= 0) & (guess.max() <= 1)


def test_refining_refuses_what_does_not_fit():
    one = np.ones((2, 3))
    with pytest.raises(InputError, match="same prompts"):
        RefinedCalibrator(one, one, np.ones((3, 1)), np.ones((3, 1)))
    with pytest.raises(InputError, match="log-ratios"):
        RefinedCalibrator(one, np.ones((2, 2)), one, one)
    with pytest.raises(InputError, match="NaN"):
        RefinedCalibrator(one, one * np.nan, one, one)
    with pytest.raises(InputError, match="holds 2 prompts"):
        RefinedCalibrator(one, one, one, one).calibrate([1.0])
