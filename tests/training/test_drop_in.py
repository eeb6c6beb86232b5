"""The reward in a user's own trainer: real trainers, with settings that undo it and without."""

import functools
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer

import infalign as ia
from infalign.rewards.source import FunctionReward
from infalign.run.testbed.toy import random_llama
from infalign.training.drop_in import ObjectiveWarning, calling_trainer, check_trainer
from infalign.training.objective import FIXED, GRPO_OBJECTIVE, OBJECTIVE, refuse_changed_objective
from infalign.training.reward import TransformedReward

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

DATA = Dataset.from_list([{"prompt": text, "prompt_id": text} for text in ("a b", "c d")])
SMALL = {
    "max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 2, "bf16": False,
    "use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": None,
}  # fmt: skip
RIGHT = {"beta": 1.0, "disable_dropout": True}


def length(prompts, completions):
    return [float(len(text)) for text in completions]


def make_reward():
    calibrator = ia.RewardCalibrator().fit([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    return TransformedReward(FunctionReward(length), calibrator, ["a b", "c d"], ia.Identity(), 0.5)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return str(random_llama(tmp_path_factory.mktemp("toy") / "policy", 8))


def make(policy, tmp_path, trainer, rewards, **settings):
    config = {RLOOTrainer: RLOOConfig, GRPOTrainer: GRPOConfig}[trainer]
    args = config(output_dir=str(tmp_path), **{**SMALL, **settings})
    return trainer(model=policy, reward_funcs=rewards, args=args, train_dataset=DATA)


def test_the_right_settings_are_found_right_and_train_without_a_word(policy, tmp_path):
    trainer = make(policy, tmp_path, RLOOTrainer, make_reward(), **RIGHT)
    assert check_trainer(trainer) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error", ObjectiveWarning)
        trainer.train()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("beta", 0.05),
        ("normalize_advantages", True),
        ("reward_clip_range", (-1.0, 1.0)),
        ("reward_weights", [0.5]),
        ("num_iterations", 2),
        ("temperature", 0.7),
        ("top_p", 0.9),
        ("top_k", 50),
        ("min_p", 0.1),
        ("repetition_penalty", 1.1),
        ("generation_kwargs", {"typical_p": 0.9}),
        ("mask_truncated_completions", True),
        ("sync_ref_model", True),
        ("steps_per_generation", 2),
    ],
)
def test_each_setting_that_changes_the_objective_is_named(policy, tmp_path, setting, value):
    args = RLOOConfig(output_dir=str(tmp_path), **{**SMALL, **RIGHT, setting: value})
    found = check_trainer(_Like(args))
    assert [line.split("=")[0] for line in found] == [setting]
    # What a user's trainer is warned about, our own refuses: one list.
    with pytest.raises(ia.InputError, match=setting):
        refuse_changed_objective({setting: value})


class _Like:
    """As much of a trainer as `check_trainer` reads, to look at many configurations quickly."""

    def __init__(self, args, model=None):
        self.args, self.model, self.reward_funcs = args, model, [make_reward()]


def test_the_list_names_real_fields_and_is_the_one_that_training_uses():
    rloo, grpo = set(RLOOConfig.__dataclass_fields__), set(GRPOConfig.__dataclass_fields__)
    assert set(OBJECTIVE) <= rloo
    assert set(GRPO_OBJECTIVE) <= grpo - rloo
    assert {name: FIXED[name] for name in OBJECTIVE} == {name: need.value for name, need in OBJECTIVE.items()}


def test_a_grpo_trainer_as_it_comes_is_warned_about_once(policy, tmp_path):
    trainer = make(policy, tmp_path, GRPOTrainer, make_reward())
    with pytest.warns(ObjectiveWarning) as caught:
        trainer.train()
    (warning,) = [one for one in caught if issubclass(one.category, ObjectiveWarning)]
    text = str(warning.message)
    assert "GRPOTrainer would not maximise" in text
    for told in ("scale_rewards='group', should be 'none'", "loss_type='dapo'", "no KL at all", "use RLOOTrainer"):
        assert told in text
    assert "dropout" not in text, "this model has none"


def test_grpo_with_a_kl_is_told_where_it_stands(policy, tmp_path):
    settings = {"beta": 1.0, "scale_rewards": "none", "loss_type": "dr_grpo", "disable_dropout": True}
    (line,) = check_trainer(_Like(GRPOConfig(output_dir=str(tmp_path), **SMALL, **settings)))
    assert "k3" in line


def test_several_rewards_and_dropout(policy, tmp_path):
    reward = make_reward()
    trainer = make(policy, tmp_path, RLOOTrainer, [reward, length], beta=1.0, reward_weights=[1.0, 0.5])
    trainer.model.config.attention_dropout = 0.1
    dropout, functions = check_trainer(trainer, reward)
    assert dropout.startswith("disable_dropout=False, should be True")
    assert functions.startswith("2 reward functions")
    assert "length" in functions


def test_a_caller_that_is_no_trainer_is_no_harm():
    seen = {}
    reward = make_reward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward(["?"], ["xx"], prompt_id=["a b"], log_metric=seen.__setitem__)
        reward(["?"], ["xx"], prompt_id=["a b"])
    assert calling_trainer(None) is None
    assert calling_trainer(print) is None


def test_the_lines_of_the_readme_run(policy, tmp_path):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "TransformedReward(" in block
    ]
    names = {
        "ia": ia,
        "ref_rewards_PK": np.arange(8.0).reshape(2, 4),
        "my_reward": length,
        "prompt_ids": ["a b", "c d"],
        "best": ia.optimal_transform(ia.BestOfN(4), beta=0.1),
        "model": policy,
        "data": DATA,
        "RLOOTrainer": RLOOTrainer,
        "RLOOConfig": functools.partial(RLOOConfig, output_dir=str(tmp_path), **SMALL),
    }
    exec(code, names)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ObjectiveWarning)
        names["trainer"].train()
    metrics = names["trainer"].state.log_history
    assert any("calibrated_reward" in entry or "train_loss" in entry for entry in metrics)
