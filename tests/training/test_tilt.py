"""The floor under the tilt, and how it comes into force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infalign.errors import InputError
from infalign.procedures import BestOfN, WorstOfN
from infalign.theory.finite_k import rank_conditional_tilt
from infalign.theory.plan import optimum_at_kl
from infalign.training.kl_control import KLController
from infalign.training.methods.raw import RawMethod
from infalign.training.self_consistent import SelfConsistentTransform
from infalign.training.steering import Steering
from infalign.training.tilt import FLOOR, highest_under_cap, log_partition, tilt_by_rank, tilt_of_reward
from infalign.transforms import Exponential, Identity
from tests.training.enumerable import PROMPTS, Testbed


def optimum(tilt: np.ndarray) -> np.ndarray:
    """The distribution over ranks that tilting the uniform one gives."""
    return np.exp(tilt - np.logaddexp.reduce(tilt))


@settings(max_examples=60, deadline=None)
@given(st.floats(-20, 20), st.floats(-4, 1), st.sampled_from([1, 8, 64, 256]))
def test_the_floor_moves_the_optimum_by_next_to_nothing(t, log_beta, num_ref):
    transform, beta = (Identity() if abs(t) < 1e-3 else Exponential(t)), 10.0**log_beta
    exact = rank_conditional_tilt(transform, beta, num_ref) / beta
    floored = tilt_by_rank(transform, beta, num_ref)
    assert 0.5 * np.abs(optimum(floored) - optimum(exact)).sum() <= np.exp(-FLOOR)
    assert floored.min() >= log_partition(exact) - FLOOR - 1e-9
    above = exact >= log_partition(exact) - FLOOR
    assert floored[above] == pytest.approx(exact[above])


def test_it_bites_where_the_transform_forbids():
    """Worst-of-4 at 2 nats: thousands of nats between the worst rank and the best."""
    best = optimum_at_kl(WorstOfN(4), 2.0)
    exact = rank_conditional_tilt(best.transform, best.beta, 256) / best.beta
    assert exact.max() - exact.min() > 100
    floored = tilt_by_rank(best.transform, best.beta, 256)
    assert floored.max() - floored.min() < FLOOR + 6


def test_a_self_consistent_transform_has_it_too():
    tilt = tilt_of_reward(SelfConsistentTransform(WorstOfN(4)).reward(64), 1e-3).by_rank
    assert tilt.max() - tilt.min() < FLOOR + np.log(65)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-50, 500), min_size=1, max_size=40), st.floats(0.05, 6.0))
def test_under_a_cap_no_density_is_above_it(tilt, cap):
    given_tilt = np.array(tilt)
    cut = np.minimum(given_tilt, highest_under_cap(given_tilt, cap))
    top = cut.max() - log_partition(cut)
    assert top <= cap + 1e-9
    if given_tilt.max() - log_partition(given_tilt) <= cap:
        assert cut.tolist() == tilt
    else:
        assert top == pytest.approx(cap, abs=1e-6), "no lower than it must be"


def test_a_cap_by_hand():
    """Of four ranks one is far above: a density of 2 there leaves 2/3 to each of the others, log 3 nats less."""
    tilt = np.array([0.0, 0.0, 0.0, 300.0])
    assert highest_under_cap(tilt, np.log(2.0)) == pytest.approx(np.log(3.0))
    assert highest_under_cap(tilt, None) == 300.0


def test_a_reward_keeps_its_cap_whatever_its_transform(testbed):
    for transform in (Exponential(10.0), SelfConsistentTransform(BestOfN(16))):
        reward = testbed.reward(transform, 1e-3)
        ids, rewards = [PROMPTS[0].id] * 2, np.array([0.1, 1.0])
        free = reward.tilt(rewards, ids) - reward.log_normalizer(ids)
        reward.tilt_cap = 1.5
        capped = reward.tilt(rewards, ids) - reward.log_normalizer(ids)
        assert free.max() > 2.0
        assert capped.max() == pytest.approx(1.5, abs=1e-3), "the floor is a little of Z"
    with pytest.raises(InputError, match="tilt_cap"):
        reward.tilt_cap = -1.0


@pytest.fixture(scope="module")
def testbed(tmp_path_factory):
    return Testbed(tmp_path_factory.mktemp("tilt") / "reference", vocabulary=6)


@pytest.mark.parametrize("kind", ["calibrated", "raw"])
def test_half_strength_is_half_the_tilt_with_its_own_normaliser(testbed, kind):
    reward = testbed.reward(Exponential(5.0), 0.2)
    if kind == "raw":
        reward = RawMethod().reward(reward.source, testbed.calibrator, [p.id for p in PROMPTS], 0.2)
    ids = [PROMPTS[0].id] * 3
    rewards = np.array([0.1, 0.5, 0.9])
    whole, normalizer = reward.tilt(rewards, ids), reward.log_normalizer(ids)
    reward.strength = 0.5
    assert reward.tilt(rewards, ids) == pytest.approx(whole / 2)
    # By Jensen's inequality E exp(t/2) lies strictly between 1/2 of the exponent and the whole.
    assert (reward.log_normalizer(ids) < normalizer).all()
    refs = testbed.calibrator.ref_rewards_PK[0] if kind == "raw" else None
    if refs is not None:
        assert reward.log_normalizer(ids[:1]) == pytest.approx(np.log(np.mean(np.exp(0.5 * refs / 0.2))))
    reward.strength = 1.0
    assert reward.tilt(rewards, ids) == pytest.approx(whole)


class State:
    """What a trainer tells its callbacks."""

    is_world_process_zero = True

    def __init__(self, step: int) -> None:
        self.global_step = step


def test_the_tilt_comes_in_evenly_and_the_controller_waits(testbed, tmp_path):
    reward = testbed.reward(Identity(), 0.2)
    controller = KLController(kl_budget=0.5, beta=0.2, patience=0)
    steering = Steering(reward, controller, tmp_path / "steps.jsonl", 10, None, anneal_steps=4)
    seen = []
    for step in range(6):
        steering.on_step_begin(None, State(step), None)
        seen.append(reward.strength)
        logs = {
            "sequence_kl": 0.01, "calibrated_reward": 0.5, "raw_reward": 0.5, "completions/mean_length": 2.0,
            "completions/clipped_ratio": 0.0,
        }  # fmt: skip
        steering.on_log(None, State(step + 1), None, logs)
        assert (reward.beta == 0.2) == (step < 4), "0.01 nats are far too little only once all of the tilt is there"
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_without_annealing_all_of_it_is_there_at_once(testbed, tmp_path):
    reward = testbed.reward(Identity(), 0.2)
    Steering(reward, None, tmp_path / "steps.jsonl", 10, None).on_step_begin(None, State(0), None)
    assert reward.strength == 1.0
