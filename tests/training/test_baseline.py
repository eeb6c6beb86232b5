"""The known baseline: exact normaliser, nothing left to chance at the optimum, one rollout per prompt."""

import numpy as np
import pytest
from transformers import TrainerCallback, set_seed

from infalign.calibration.calibrator import RewardCalibrator
from infalign.errors import InputError
from infalign.rewards.source import FunctionReward
from infalign.rollouts.models import load_policy
from infalign.rollouts.tokens import prompt_token_ids
from infalign.training import online
from infalign.training.baseline import effective_number
from infalign.training.reward import TransformedReward
from infalign.training.steering import Steering
from infalign.transforms import Exponential, Identity, Log
from tests.training.enumerable import PROMPTS, Testbed, hashed_reward

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.mark.parametrize("transform", [Identity(), Exponential(5.0), Log()])
@pytest.mark.parametrize("num_ref", [2, 7])
def test_the_normaliser_is_that_of_the_transform_itself(transform, num_ref):
    """Whatever K, the mean of exp(Φ_K(b)/β) over the ranks 0..K is ∫ exp(Φ/β) (M6)."""
    calibrator = RewardCalibrator().fit(np.arange(2.0 * num_ref).reshape(2, num_ref))
    reward = TransformedReward(FunctionReward(hashed_reward), calibrator, ["p", "q"], transform, 0.5)
    u = (np.arange(200_000) + 0.5) / 200_000
    expected = np.log(np.exp(transform(u) / 0.5).mean())
    assert reward.log_normalizer(["q", "p", "q"]) == pytest.approx([expected] * 3, abs=1e-4)


class Logged(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **_):
        if "residual_std" in logs:
            self.logs.append(logs)


def train(testbed, folder, *, baseline="known", num_generations=1, steps=150, rollouts=512):
    set_seed(0)
    model, tokenizer = load_policy(testbed.reference)
    reward = testbed.reward(Identity(), 0.25)
    prompts_per_step = rollouts // num_generations
    config = online._rloo_config(
        folder, steps=steps, prompts_per_step=prompts_per_step, num_generations=num_generations, max_new_tokens=2,
        learning_rate=1e-2, seed=0, save_steps=10**6, trust_remote_code=False, overrides={"save_strategy": "no"},
    )  # fmt: skip
    rows = online._training_rows(PROMPTS, steps * prompts_per_step, 0)
    steering = Steering(reward, None, folder / "steps.jsonl", steps, None)
    prompt_ids = dict(zip([prompt.id for prompt in PROMPTS], prompt_token_ids(tokenizer, PROMPTS), strict=True))
    trainer = online._make_trainer(model, tokenizer, reward, rows, prompt_ids, steering, None, baseline, config)
    logged = Logged()
    trainer.add_callback(logged)
    folder.mkdir(exist_ok=True)
    trainer.train()
    trainer.save_model(str(folder / "model"))
    tokenizer.save_pretrained(str(folder / "model"))
    return testbed.distance(folder / "model", reward), logged.logs


@pytest.mark.slow
def test_one_rollout_per_prompt_reaches_the_optimum_where_nothing_is_left_to_chance(tmp_path):
    testbed = Testbed(tmp_path / "reference", vocabulary=8)
    distance, logs = train(testbed, tmp_path / "run")
    assert max(distance) < 0.05
    start, end = logs[0], logs[-1]
    assert start["residual_std"] > 0.8, "Φ/β = C/0.25 spreads over four nats under the reference"
    assert end["residual_std"] < 0.3 * start["residual_std"]
    assert end["advantage_square/known"] < 0.1 * start["advantage_square/known"]


def test_it_spreads_less_than_leave_one_out_of_two(tmp_path):
    """Of two rollouts, leave-one-out adds the other one's whole variance; the known baseline a 255th of it."""
    testbed = Testbed(tmp_path / "reference", vocabulary=8)
    _, logs = train(testbed, tmp_path / "run", baseline="leave-one-out", num_generations=2, steps=6, rollouts=256)
    ratios = [log["advantage_square/known"] / log["advantage_square/leave_one_out"] for log in logs]
    assert 0.35 < np.mean(ratios) < 0.65  # ½ where prompts are alike; 768 pairs: standard error about 0.03


def test_leave_one_out_of_one_is_refused():
    with pytest.raises(InputError, match="num_generations"):
        online.check_training(
            steps=1, prompts_per_step=4, num_generations=1, learning_rate=1e-3, baseline="leave-one-out", anneal=0.5,
            max_new_tokens=2, lora=None, save_steps=1, rloo={}, tilt_cap=None,
        )  # fmt: skip


def test_how_many_rollouts_carry_a_step():
    assert effective_number([1.0, -1.0, 1.0, -1.0]) == pytest.approx(4.0)
    assert effective_number([0.0, 0.0, -3.0, 0.0]) == pytest.approx(1.0)
    assert effective_number([2.0, 1.0, 1.0]) == pytest.approx(16 / 6)
    assert effective_number([0.0, 0.0]) == 0.0
