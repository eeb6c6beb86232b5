"""Stored rollouts: ranked without themselves, with an exact normaliser, and refused where they cannot serve."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infalign.calibration.calibrator import RewardCalibrator
from infalign.errors import InputError
from infalign.rollouts.key import RolloutKey
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.store import RolloutStore
from infalign.theory.finite_k import rank_conditional_tilt
from infalign.training.pool import RolloutPool, log_weights, stored_rollouts
from infalign.transforms import Exponential, Identity, Log


def ranked(rewards: list[float]) -> RolloutPool:
    """One prompt's rollouts, known by their rewards alone."""
    ranks_R, ties_R = RewardCalibrator().fit([rewards]).reference_ranks_and_ties()
    size = len(rewards)
    return RolloutPool(
        (Prompt("p"),), np.zeros(size, int), [[1]] * size, np.zeros(size), ranks_R, ties_R, np.full(size, size - 1)
    )


def test_by_hand():
    """Three references: each is ranked among the other two; equal ones share their two ranks."""
    pool = ranked([5.0, 1.0, 3.0])
    assert pool.ranks_R.tolist() == [2.0, 0.0, 1.0]
    table = rank_conditional_tilt(Identity(), 0.5, 2) / 0.5
    log_partition = np.log(0.5 * (np.exp(1 / 0.5) - 1))  # ∫ exp(u/β) du
    assert log_weights(pool, Identity(), 0.5) == pytest.approx(table[[2, 0, 1]] - log_partition)
    tied = ranked([5.0, 1.0, 5.0])
    assert (tied.ranks_R.tolist(), tied.ties_R.tolist()) == ([1.5, 0.0, 1.5], [1, 0, 1])
    both = np.log((np.exp(table[1]) + np.exp(table[2])) / 2)
    assert log_weights(tied, Identity(), 0.5) == pytest.approx([both, table[0], both] - log_partition)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=2, max_size=40),
    st.sampled_from([Identity(), Exponential(10.0), Exponential(-10.0), Log()]),
    st.floats(0.05, 5.0),
)
def test_the_weights_of_a_prompts_rollouts_have_mean_one(rewards, transform, beta):
    """However many rewards are equal: the known and the self-normalised weights are one and the same."""
    weights = np.exp(log_weights(ranked([float(r) for r in rewards]), transform, beta))
    assert weights.mean() == pytest.approx(1.0, rel=1e-6)


def make_store(folder, prompts, *, temperature=1.0, logprob=-1.0, tokens=(3,)):
    store = RolloutStore.open(
        folder, RolloutKey("model", "tokenizer", max_new_tokens=2, seed=0, temperature=temperature)
    )
    for prompt in prompts:
        store.append(
            {
                "prompt_id": [prompt.id] * 3,
                "index": [0, 1, 2],
                "text": ["a", "b", "c"],
                "token_ids": [None if tokens is None else [*tokens, i] for i in range(3)],
                "logprob": [None if logprob is None else logprob - i for i in range(3)],
                "num_tokens": [2, 2, 2],
                "finish_reason": ["length"] * 3,
            }
        )
    return store


def test_it_takes_the_prompts_asked_for_and_what_was_scored(tmp_path):
    prompts = [Prompt("p"), Prompt("q"), Prompt("r")]
    store = make_store(tmp_path, prompts)
    rewards_PK = np.array([[1.0, 2.0, 3.0], [3.0, np.nan, 1.0], [9.0, 7.0, 8.0]])
    scored_PK = ~np.isnan(rewards_PK)
    calibrator = RewardCalibrator().fit(rewards_PK, mask_PK=scored_PK)
    ids = [prompt.id for prompt in prompts]
    pool = stored_rollouts(store, [prompts[2], prompts[1]], calibrator, ids, scored_PK=scored_PK)
    assert [pool.prompts[p].prompt for p in pool.prompt_R] == ["q", "q", "r", "r", "r"]
    assert [list(tokens) for tokens in pool.token_ids] == [[3, 0], [3, 2], [3, 0], [3, 1], [3, 2]]
    assert pool.ref_logprobs_R.tolist() == [-1.0, -3.0, -1.0, -2.0, -3.0]
    assert pool.ranks_R.tolist() == [1.0, 0.0, 2.0, 0.0, 1.0]
    assert pool.num_ref_R.tolist() == [1, 1, 2, 2, 2]
    with pytest.raises(InputError, match="fitted on other rollouts"):
        stored_rollouts(store, prompts, calibrator, ids)
    with pytest.raises(InputError, match="no reference rollouts to calibrate with"):
        stored_rollouts(store, [Prompt("z")], calibrator, ids, scored_PK=scored_PK)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logprob": None}, "3 rollouts have no log-probability under the reference.*compute_logprobs"),
        ({"tokens": None}, "3 rollouts have no token ids"),
        ({"temperature": 0.7}, "temperature 0.7"),
    ],
)
def test_stores_that_cannot_serve(tmp_path, changes, message):
    prompts = [Prompt("p")]
    store = make_store(tmp_path, prompts, **changes)
    calibrator = RewardCalibrator().fit([[1.0, 2.0, 3.0]])
    with pytest.raises(InputError, match=message):
        stored_rollouts(store, prompts, calibrator, [prompts[0].id])


def test_log_probabilities_can_be_handed_in(tmp_path):
    prompts = [Prompt("p")]
    store = make_store(tmp_path, prompts, logprob=None)
    calibrator = RewardCalibrator().fit([[1.0, 2.0, 3.0]])
    known = np.array([[-0.5, -0.6, -0.7]])
    pool = stored_rollouts(store, prompts, calibrator, [prompts[0].id], ref_logprobs_PK=known)
    assert pool.ref_logprobs_R.tolist() == [-0.5, -0.6, -0.7]
