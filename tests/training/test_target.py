"""Targets: pure, one comparison behind every number, and log Z that belongs to what was paid."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infalign.calibration.calibrator import RewardCalibrator
from infalign.procedures import BestOfN, WorstOfN
from infalign.rewards.source import FunctionReward
from infalign.theory.finite_k import rank_conditional_tilt
from infalign.training.methods.raw import RawMethod
from infalign.training.ranked import RankedRollouts
from infalign.training.reward import TransformedReward
from infalign.training.self_consistent import SelfConsistentTransform
from infalign.training.target import Scale, Utility, follower_of, target_of
from infalign.transforms import Exponential, Identity

REFERENCES = [[1.0, 2.0, 3.0], [10.0, 20.0, 20.0, 40.0]]


def length(prompts, completions):
    return [float(len(text)) for text in completions]


def calibrator(ties="midrank"):
    return RewardCalibrator(ties, seed=3).fit(REFERENCES)


def ranked(rewards, rows, ties="midrank"):
    fitted, row_B = calibrator(ties), np.array(rows)
    below_B, equal_B = fitted.compare(np.array(rewards), prompt_index=row_B)
    rank_B, tied_B = fitted.resolve(below_B, equal_B)
    return RankedRollouts(row_B, below_B, equal_B, fitted.num_ref_P[row_B], rank_B, tied_B, np.array(rewards))


def utility():
    return Utility("twice", lambda rewards_B, row_B: 2.0 * rewards_B + row_B, calibrator())


def everything():
    return [Exponential(3.0), SelfConsistentTransform(BestOfN(2)), SelfConsistentTransform(WorstOfN(2)), utility()]


def test_a_fixed_target_by_hand():
    """K = 3 and 4; the second reward beats one of four and equals two: ranks 1 to 3 are as likely."""
    three, four = (rank_conditional_tilt(Exponential(3.0), 0.5, k) / 0.5 for k in (3, 4))
    target = target_of(Exponential(3.0), calibrator(), Scale(0.5))
    paid = target.nats(ranked([2.5, 20.0], [0, 1]))
    assert paid == pytest.approx([three[2], np.log(np.exp(four[1:4]).mean())])
    log_z = [np.log(np.exp(table).mean()) for table in (three, four)]
    assert target.log_partition(np.array([1, 0, 1])) == pytest.approx([log_z[1], log_z[0], log_z[1]])
    half = target_of(Exponential(3.0), calibrator(), Scale(0.5, strength=0.5))
    assert half.nats(ranked([2.5, 20.0], [0, 1])) == pytest.approx([three[2] / 2, np.log(np.exp(four[1:4] / 2).mean())])


def test_a_utility_by_hand():
    target = target_of(utility(), calibrator(), Scale(0.5, strength=0.25))
    assert target.nats(ranked([2.0, 20.0], [0, 1])).tolist() == [2.0, 20.5]
    first = np.log(np.mean(np.exp([1.0, 2.0, 3.0])))
    second = np.log(np.mean(np.exp([10.5, 20.5, 20.5, 40.5])))
    assert target.log_partition(np.array([1, 0])) == pytest.approx([second, first])


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(range(4)), st.floats(0.1, 3.0), st.floats(0.1, 1.0), st.sampled_from([None, 1.0]),
    st.lists(st.integers(0, 5), min_size=1, max_size=9),
)  # fmt: skip
def test_a_target_is_pure(which, beta, strength, cap, rewards):
    """Asked twice, in any order and by parts, it says the same; and what the policy does later changes nothing."""
    maximised = everything()[which]
    seen = ranked(np.array(rewards, dtype=float), np.arange(len(rewards)) % 2)
    target = target_of(maximised, calibrator(), Scale(beta, strength, cap))
    log_z, nats = target.log_partition(seen.prompt_B), target.nats(seen)
    follower = follower_of(maximised)
    if follower is not None:
        follower.update(seen)
        assert target_of(maximised, calibrator(), Scale(beta, strength, cap)).nats(seen).tolist() != nats.tolist()
    assert target.nats(seen).tolist() == nats.tolist()
    assert target.log_partition(seen.prompt_B).tolist() == log_z.tolist()
    other = target_of(everything()[which], calibrator(), Scale(beta, strength, cap))
    if which != 3:  # a utility may look at the whole group; the others are functions of each rollout
        parts = [other.nats(seen.part(slice(i, i + 1)))[0] for i in range(len(rewards))]
        assert parts == pytest.approx(nats, abs=1e-12)


@pytest.mark.parametrize("which", range(3))
def test_z_is_what_the_nats_sum_to_under_the_reference(which):
    """Under the reference all K + 1 ranks are as likely: without ties log Z is the log-mean-exp of the nats there."""
    fitted = RewardCalibrator().fit([[1.0, 2.0, 3.0, 4.0, 5.0]])
    target = target_of(everything()[which], fitted, Scale(0.4, cap=1.5))
    every = np.arange(6)
    at_each = RankedRollouts(every * 0, every, every * 0, np.full(6, 5), every.astype(float), every * 0)
    assert np.log(np.exp(target.nats(at_each)).mean()) == pytest.approx(target.log_partition(every[:1] * 0)[0])


@pytest.mark.parametrize("ties", ["midrank", "random", "strict", "inclusive"])
@pytest.mark.parametrize("which", range(4))
def test_log_z_belongs_to_what_was_paid_whenever_it_is_asked_for(which, ties):
    """After the call the transform has followed the policy; the trainer still gets the Z of what was paid."""
    make = lambda: TransformedReward(  # noqa: E731
        FunctionReward(length), calibrator(ties), ["p", "q"], everything()[which], 0.3
    )
    first, second = make(), make()
    ids, texts = ["p", "q", "q", "p"], ["xx", "x" * 20, "x" * 50, "x"]
    before = first.log_normalizer(ids)
    paid = first(["?"] * 4, texts, prompt_id=ids)
    assert second(["?"] * 4, texts, prompt_id=ids) == paid, "asking for Z first changes nothing"
    for reward in (first, second):
        assert reward.paid is not None
        assert reward.paid.nats_B.tolist() == paid
        assert reward.paid.log_partition_B.tolist() == before.tolist()
    if first.follower is not None:
        assert first.log_normalizer(ids).tolist() != before.tolist(), "the next step has another target"


def test_rewards_are_compared_once_and_everything_comes_from_that():
    """With ties by lot a second comparison would draw other ranks."""
    reward = RawMethod().reward(FunctionReward(length), calibrator("random"), ["p", "q"], 1.0)
    comparisons = []
    compare = reward.calibrator.compare
    reward.calibrator.compare = lambda *given, **more: comparisons.append(1) or compare(*given, **more)  # type: ignore[method-assign]
    seen = {}
    reward(["?"] * 2, ["x" * 20, "x" * 20], prompt_id=["q", "q"], log_metric=seen.__setitem__)
    assert len(comparisons) == 1
    assert reward.ranked is not None
    assert reward.paid is not None
    assert reward.ranked.rank_B.tolist() == reward.paid.ranked.rank_B.tolist()
    assert seen["calibrated_reward"] == pytest.approx((reward.ranked.rank_B / 4).mean())
    assert reward.ranked.raw_B is not None
    assert reward.ranked.raw_B.tolist() == [20.0, 20.0]


def test_ranked_rollouts_keep_their_raw_rewards_as_far_as_all_have_them():
    whole = ranked([2.5, 20.0, 1.0], [0, 1, 0])
    assert whole.part(slice(1, 3)).raw_B.tolist() == [20.0, 1.0]
    assert whole.followed_by(whole).raw_B.tolist() == [2.5, 20.0, 1.0] * 2
    restored = RankedRollouts.from_lists(whole.to_lists())
    assert restored.raw_B is None, "what is kept with a checkpoint is how they rank"
    assert restored.rank_B.tolist() == whole.rank_B.tolist()
    assert restored.followed_by(whole).raw_B is None


def test_only_what_follows_the_policy_is_a_follower():
    following = SelfConsistentTransform(BestOfN(2))
    assert follower_of(following) is following
    assert follower_of(Identity()) is None
    assert follower_of(utility()) is None
