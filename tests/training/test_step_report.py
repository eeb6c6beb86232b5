"""What a training tells about each step: against enumeration and the estimators, and where it is told."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from infalign.calibration.calibrator import RewardCalibrator
from infalign.estimators import win_rate
from infalign.procedures import BestOfN, Mixture, Standard, WorstOfN
from infalign.rewards.source import FunctionReward
from infalign.theory.plan import limit
from infalign.training.online import align
from infalign.training.ranked import RankedRollouts, mean_per_prompt
from infalign.training.reward import TransformedReward
from infalign.training.step_report import StepReport
from infalign.transforms import Identity
from tests.training.enumerable import PROMPTS, TOKENS, Testbed

PROCEDURES = [Standard(), BestOfN(3), WorstOfN(2), Mixture([(0.4, Standard()), (0.6, BestOfN(2))])]


def number(prompts, completions):
    return [float(text) for text in completions]


def ranked(rewards_PG, refs_PK, order):
    """Of rollouts that stand in any order, as the processes bring them."""
    calibrator = RewardCalibrator().fit(refs_PK)
    prompt_B = np.repeat(np.arange(len(rewards_PG)), rewards_PG.shape[1])[order]
    flat_B = rewards_PG.ravel()[order]
    below_B, equal_B = calibrator.compare(flat_B, prompt_index=prompt_B)
    rank_B, tied_B = calibrator.resolve(below_B, equal_B)
    return RankedRollouts(prompt_B, below_B, equal_B, calibrator.num_ref_P[prompt_B], rank_B, tied_B)


@pytest.mark.parametrize("procedure", PROCEDURES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_the_win_rate_is_the_unbiased_one_however_rewards_tie(procedure, data):
    seed, values = data.draw(st.integers(0, 2**16)), data.draw(st.sampled_from([2, 5, 10**6]))
    rng = np.random.default_rng(seed)
    rewards_PG, refs_PK = rng.integers(values, size=(3, 5)), rng.integers(values, size=(3, 4))
    step = ranked(rewards_PG, refs_PK.astype(float), rng.permutation(15))
    assert step.win_rate_P(procedure) == pytest.approx(win_rate(rewards_PG, refs_PK, procedure).per_prompt)
    assert step.tie_mass == pytest.approx((rewards_PG[:, :, None] == refs_PK[:, None, :]).mean())


def test_too_few_rollouts_are_no_estimate():
    step = ranked(np.array([[1.0, 2.0]]), [[0.0, 1.0, 3.0]], np.arange(2))
    assert step.win_rate_P(BestOfN(3)) is None
    assert step.win_rate_P(BestOfN(2)) is not None


def test_means_are_taken_per_prompt():
    assert mean_per_prompt(np.array([1.0, 5.0, 3.0]), np.array([4, 2, 4])).tolist() == [5.0, 2.0]


def test_a_step_by_hand():
    """Two prompts with log-ratios of mean 0.2 and 0.4: KL 0.3 ± 0.1; every rollout beats every reference."""
    calibrator = RewardCalibrator().fit([[0.0, 1.0], [0.0, 1.0]])
    reward = TransformedReward(FunctionReward(number), calibrator, ["p", "q"], Identity(), 1.0, procedure=BestOfN(2))
    reward(["?"] * 4, ["5", "6", "7", "8"], prompt_id=["p", "q", "p", "q"])
    told = StepReport(reward)(np.array([0.1, 0.5, 0.3, 0.3]))
    assert told["sequence_kl"] == pytest.approx(0.3)
    assert told["sequence_kl_error"] == pytest.approx(0.1)
    assert told["frontier_share"] == pytest.approx(0.5 / (limit(BestOfN(2), [0.3])[0] - 0.5), rel=1e-3)
    assert "frontier_share" not in StepReport(reward)(np.full(4, -0.1)), "no gain is possible at such a KL"
    assert np.isnan(StepReport(reward)(np.array([0.1, np.nan, 0.3, 0.3]))["sequence_kl"])


class Tracker(TrainerCallback):
    """What a tracker such as TensorBoard gets."""

    seen: list[dict] = []  # noqa: RUF012

    def on_log(self, args, state, control, logs=None, **_):
        self.seen.append(dict(logs))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_it_is_in_the_record_and_reaches_the_tracker_that_report_to_names(tmp_path, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tracker_of_the_test", Tracker)
    Tracker.seen.clear()
    testbed = Testbed(tmp_path / "reference", vocabulary=6)
    reward = testbed.reward(Identity(), 0.3)
    reward.procedure = BestOfN(4)
    told = []
    align(
        testbed.reference, tmp_path / "out", PROMPTS, reward, max_new_tokens=TOKENS, steps=6, prompts_per_step=2,
        num_generations=64, learning_rate=1e-2, rloo={"report_to": ["tracker_of_the_test"]},
        progress=lambda done, total, text: told.append(text),
    )  # fmt: skip
    steps = [json.loads(line) for line in (tmp_path / "out" / "steps.jsonl").read_text().splitlines()]
    logged = [logs for logs in Tracker.seen if "sequence_kl" in logs]
    assert len(steps) == len(logged) == 6
    for step, logs in zip(steps, logged, strict=True):
        # TRL's own numbers give the same KL: Σ log-ratios / Σ tokens, times the mean length.
        assert step["kl"] == pytest.approx(logs["kl"] * logs["completions/mean_length"], abs=1e-5)
        for ours, theirs in (
            ("kl", "sequence_kl"), ("kl_error", "sequence_kl_error"), ("win_rate", "win_rate"),
            ("tie_mass", "tie_mass"), ("calibrated_reward", "calibrated_reward"),
        ):  # fmt: skip
            assert step[ours] == pytest.approx(logs[theirs], abs=1e-6)
    # Before anything is learned Best-of-4 wins half the time: 2 × 64 rollouts, five standard errors are about 0.2.
    assert steps[0]["win_rate"] == pytest.approx(0.5, abs=0.2)
    assert steps[-1]["win_rate"] > 0.6
    assert steps[-1]["frontier_share"] == pytest.approx(
        (steps[-1]["win_rate"] - 0.5) / (limit(BestOfN(4), [steps[-1]["kl"]])[0] - 0.5), rel=1e-2
    )
    assert max(len(text) for text in told) < 80
