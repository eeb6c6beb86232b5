"""Score → calibrate → transform, as a trainer calls it."""

import json

import numpy as np
import pytest

from infalign.calibration.calibrator import RewardCalibrator
from infalign.errors import InputError, RewardError
from infalign.procedures import BestOfN
from infalign.rewards.source import FunctionReward
from infalign.rollouts.prompts import Prompt
from infalign.theory.finite_k import rank_conditional_tilt
from infalign.training.reward import TransformedReward
from infalign.training.self_consistent import SelfConsistentTransform
from infalign.training.tilt import tilt_of_reward
from infalign.transforms import Exponential, Identity, Log


def length_reward(prompts, completions):
    return [float(len(text)) for text in completions]


def make(transform, beta=0.5, references=((1.0, 2.0, 3.0), (10.0, 20.0, 30.0)), procedure=None):
    calibrator = RewardCalibrator().fit([list(r) for r in references])
    return TransformedReward(
        FunctionReward(length_reward), calibrator, ["p", "q"], transform, beta, procedure=procedure
    )


def test_by_hand():
    """K = 3: a length of 2.5 beats two of p's references; of q's it beats none."""
    reward = make(Exponential(3.0), beta=0.5)
    table = rank_conditional_tilt(Exponential(3.0), 0.5, 3) / 0.5
    completions = ["xx" + "x" * 23, "xx"]
    assert reward(["?", "?"], completions, prompt_id=["q", "q"]) == pytest.approx([table[2], table[0]])
    assert reward(["?"], ["xxxx"], prompt_id=["p"]) == pytest.approx([table[3]])
    assert reward.calibrate(np.array([2.5]), ["p"]) == pytest.approx([2 / 3])


def test_a_tie_keeps_the_normaliser_exact():
    """Equal to one reference: the ranks below and above it are equally likely (M6)."""
    reward = make(Exponential(3.0), beta=0.5)
    table = rank_conditional_tilt(Exponential(3.0), 0.5, 3) / 0.5
    (tied,) = reward(["?"], ["xx"], prompt_id=["p"])
    assert np.exp(tied) == pytest.approx((np.exp(table[1]) + np.exp(table[2])) / 2)


def test_many_ties_keep_the_normaliser_exact():
    """Equal to three of four references: the four ranks from below to above them are equally likely (M6)."""
    reward = make(Exponential(3.0), beta=0.5, references=((1.0, 2.0, 2.0, 2.0), (0.0,)))
    table = rank_conditional_tilt(Exponential(3.0), 0.5, 4) / 0.5
    (tied,) = reward(["?"], ["xx"], prompt_id=["p"])
    assert np.exp(tied) == pytest.approx(np.exp(table[1:5]).mean())


def test_the_log_transform_stays_finite_below_all_references():
    assert np.isfinite(make(Log(), beta=1 / 3)(["?"], [""], prompt_id=["q"])).all()


def test_changing_beta_changes_the_next_rewards():
    reward = make(Identity(), beta=1.0)
    (before,) = reward(["?"], ["xxxx"], prompt_id=["p"])
    reward.beta = 0.1
    (after,) = reward(["?"], ["xxxx"], prompt_id=["p"])
    assert before == pytest.approx(rank_conditional_tilt(Identity(), 1.0, 3)[3])
    assert after == pytest.approx(rank_conditional_tilt(Identity(), 0.1, 3)[3] / 0.1)


def test_ragged_references_use_each_prompts_own_number():
    reward = make(Identity(), references=((1.0, 2.0), (10.0, 20.0, 30.0, 40.0)))
    got = reward(["?", "?"], ["xxx", "x" * 50], prompt_id=["p", "q"])
    expected = [rank_conditional_tilt(Identity(), 0.5, 2)[2] / 0.5, rank_conditional_tilt(Identity(), 0.5, 4)[4] / 0.5]
    assert got == pytest.approx(expected)


def test_metrics_reach_the_trainer():
    seen = {}
    make(Identity())(["?", "?"], ["xxxx", ""], prompt_id=["p", "p"], log_metric=seen.__setitem__)
    assert seen == {
        "calibrated_reward": pytest.approx(0.5),
        "raw_reward": pytest.approx(2.0),
        "tie_mass": 0.0,
    }
    seen.clear()
    make(Identity(), procedure=BestOfN(2))(["?"] * 2, ["xxxx", "xx"], prompt_id=["p", "p"], log_metric=seen.__setitem__)
    # The best of both beats all three references; the length of 2 equals one of three.
    assert seen["win_rate"] == pytest.approx(1.0)
    assert seen["tie_mass"] == pytest.approx(1 / 6)


def test_columns_come_from_the_prompts_rows_where_it_knows_them():
    seen = []

    def graded(prompts, completions, answer):
        seen.append(answer)
        return [1.0 for _ in completions]

    calibrator = RewardCalibrator().fit([[1.0, 2.0]])
    prompt = Prompt("2 + 2 = ", {"prompt": "2 + 2 = ", "answer": {"is": 4}, "prompt_id": "its own"})
    reward = TransformedReward(FunctionReward(graded), calibrator, [prompt.id], Identity(), 1.0)
    reward.take_columns_from([prompt])
    reward(["?", "?"], ["4", "5"], prompt_id=[prompt.id] * 2, answer=["as a data set", "has it"])
    assert seen == [[{"is": 4}] * 2]


def test_unknown_and_missing_prompt_ids():
    reward = make(Identity())
    with pytest.raises(InputError, match="'z' has no reference rollouts"):
        reward(["?"], ["x"], prompt_id=["z"])
    with pytest.raises(InputError, match="no column prompt_id"):
        reward(["?"], ["x"])


@pytest.mark.parametrize("beta", [0.0, -1.0, np.nan, np.inf])
def test_beta_must_be_positive(beta):
    with pytest.raises(InputError, match="beta must be a positive number"):
        make(Identity(), beta=beta)


def test_as_many_ids_as_prompts():
    calibrator = RewardCalibrator().fit([[1.0, 2.0]])
    with pytest.raises(InputError, match="2 prompt ids for a calibrator of 1 prompts"):
        TransformedReward(FunctionReward(length_reward), calibrator, ["p", "q"], Identity(), 1.0)


def test_nan_is_an_error_not_a_number():
    def broken(prompts, completions):
        return [float("nan")] * len(prompts)

    calibrator = RewardCalibrator().fit([[1.0, 2.0]])
    reward = TransformedReward(FunctionReward(broken), calibrator, ["p"], Identity(), 1.0)
    with pytest.raises(RewardError):
        reward(["?"], ["x"], prompt_id=["p"])


@pytest.mark.parametrize("missing", [None, float("nan"), float("inf"), "high"])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_every_response_needs_a_number_in_training_and_its_prompt_is_told(missing, one_by_one):
    def patchy(prompts, completions):
        if one_by_one and len(completions) > 1:
            raise ValueError("one at a time")
        return [missing if prompt == "second" else 1.0 for prompt in prompts]

    calibrator = RewardCalibrator().fit([[1.0, 2.0], [1.0, 2.0]])
    reward = TransformedReward(FunctionReward(patchy), calibrator, ["id-1", "id-2"], Identity(), 1.0)
    with pytest.raises(RewardError, match=r"to prompt id-2\b.*[Ii]n training every response needs a number"):
        reward(["first", "second"], ["x", "y"], prompt_id=["id-1", "id-2"])


def test_a_tie_by_lot_is_paid_logged_and_learnt_by_the_same_rank():
    """Equal to seven of eight references: the rank is drawn once, and everything goes by it."""
    references = [[1.0] * 7 + [5.0]]
    calibrator = RewardCalibrator("random", seed=3).fit(references)
    for transform in (Exponential(3.0), SelfConsistentTransform(BestOfN(2), memory=0.0)):
        reward = TransformedReward(FunctionReward(length_reward), calibrator, ["p"], transform, 0.5)
        seen = {}
        if isinstance(transform, SelfConsistentTransform):
            table = tilt_of_reward(transform.reward(8), 0.5).by_rank
        else:
            table = rank_conditional_tilt(transform, 0.5, 8) / 0.5
        (paid,) = reward(["?"], ["x"], prompt_id=["p"], log_metric=seen.__setitem__)
        assert reward.ranked is not None
        (rank,) = reward.ranked.rank_B
        assert paid == pytest.approx(table[int(rank)])
        assert seen["calibrated_reward"] == rank / 8
        if isinstance(transform, SelfConsistentTransform):
            assert np.interp([rank / 9, (rank + 1) / 9], transform.edges, transform.cdf) == pytest.approx(
                [0, 1], abs=2e-3
            )


def test_a_self_consistent_reward_knows_equal_references():
    """Two levels, half and half, Best-of-2 at the reference: h(½) (v(2) − v(1)) = ½ between them, over β."""
    calibrator = RewardCalibrator().fit([[1.0] * 500 + [2.0] * 500])
    transform = SelfConsistentTransform(BestOfN(2))
    reward = TransformedReward(FunctionReward(length_reward), calibrator, ["p"], transform, 0.5)
    low, high = reward(["?"] * 2, ["x", "xx"], prompt_id=["p"] * 2)
    assert high - low == pytest.approx(1.0, abs=5e-3)
    reward = TransformedReward(
        FunctionReward(length_reward), calibrator, ["p"], SelfConsistentTransform(BestOfN(2)), 0.5
    )
    expected = np.log(np.mean(np.exp([low, high])))
    assert reward.log_normalizer(["p"]) == pytest.approx([expected], abs=5e-3)


def test_a_reward_does_not_depend_on_its_own_rollouts_but_on_those_before():
    make_reward = lambda: make(SelfConsistentTransform(BestOfN(2)))  # noqa: E731
    one, two = make_reward(), make_reward()
    assert one(["?"], ["xxxx"], prompt_id=["p"]) == two(["?"] * 2, ["xxxx", ""], prompt_id=["p"] * 2)[:1]
    assert one(["?"], ["xx"], prompt_id=["p"]) != two(["?"], ["xx"], prompt_id=["p"])


def test_it_goes_on_exactly_from_a_checkpoint():
    one, two = make(SelfConsistentTransform(BestOfN(2))), make(SelfConsistentTransform(BestOfN(2)))
    one(["?"] * 3, ["xxxx", "", "x" * 15], prompt_id=["p", "p", "q"])
    one.beta = 0.3
    two.load_state(json.loads(json.dumps(one.state())))
    ask = (["?"] * 2, ["xx", "x" * 25]), {"prompt_id": ["p", "q"]}
    assert one(*ask[0], **ask[1]) == two(*ask[0], **ask[1])
