"""Solvers and baselines by name, through the whole pipeline on a toy model."""

import json
import sys

import pytest
from transformers import TrainerState

from infalign.errors import InputError
from infalign.run.pipeline import Pipeline
from infalign.run.recipe import load_recipe, parse_recipe
from infalign.run.testbed.toy import random_llama
from infalign.training.fresh import FreshRollouts
from infalign.training.methods import comparator_from_dict
from tests.runs import Recorder

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

RECIPE = """
name: tiny
policy: {model: policy}
reward: {function: "toy_rewards:vowels"}
prompts: {source: prompts.jsonl, train: 6, evaluation: 4, held_out: 0.5}
procedure: best-of-2
rollouts: {num_ref: 8, max_new_tokens: 4}
beta: 0.2
transform: identity
compare_with: [{baseline: raw}, {baseline: standardised}, {baseline: log-sigmoid}, {baseline: qrpo},
  {baseline: dpo, n: 4}, {baseline: ipo}, {baseline: bonbon, n: 2}]
training: {steps: 3, prompts_per_step: 2, num_generations: 4, learning_rate: 1.0e-3, solver: offline-regression}
evaluation: {num_samples: 4, procedures: [standard, best-of-2]}
"""
REWARDS = """
def vowels(prompts, completions):
    return [sum(c in "aeiou" for c in text) + len(text) / 100 for text in completions]
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    random_llama(folder / "policy", None, hidden_size=16, seed=1)
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {word}: "}) + "\n" for word in words))
    (folder / "toy_rewards.py").write_text(REWARDS)
    (folder / "recipe.yaml").write_text(RECIPE)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def run(job, out, *overrides, only=None):
    recorder = Recorder()
    return Pipeline(load_recipe(job / "recipe.yaml", overrides), out, recorder).run(only), recorder.done


@pytest.mark.slow
def test_every_solver_and_baseline_is_trained_and_evaluated_like_the_others(job, tmp_path):
    names = ["identity", "raw", "standardised", "log-sigmoid", "qrpo", "dpo-n4", "ipo", "bonbon-n2"]
    result, done = run(job, tmp_path)
    assert [one["label"] for one in result["results"]] == names
    assert [title for title in done if title.startswith("Align")] == [f"Align ({name})" for name in names]
    betas = {entry["name"]: entry["beta"] for entry in json.loads((tmp_path / "plan.json").read_text())["baselines"]}
    assert betas["qrpo"] == pytest.approx(0.2), "the identity's, for it is the same optimum"
    assert betas["dpo-n4"] == 0.1
    assert (tmp_path / "policies" / "dpo-n4" / "model" / "README.md").exists()
    steps = (tmp_path / "policies" / "ipo" / "steps.jsonl").read_text().splitlines()
    assert json.loads(steps[0])["kl"] is None, "pairs chosen by their reward are no draws of the reference"

    # Another solver redoes what it trains, and that alone; settings of the online solver do not touch the offline ones.
    _, done = run(job, tmp_path, "training.solver=mixed", "training.refresh_every=2", only="train")
    assert done == ["Align (identity)"]
    _, done = run(job, tmp_path, "training.solver=weighted-likelihood", only="train")
    assert done == ["Align (identity)"]
    _, done = run(
        job, tmp_path, "training.solver=weighted-likelihood", "training.rloo={weight_decay: 0.1}", only="train"
    )
    assert done == ["Align (raw)", "Align (standardised)", "Align (log-sigmoid)"]
    _, done = run(job, tmp_path, "training.solver=online", "training.rloo={weight_decay: 0.1}", only="train")
    assert done == ["Align (identity)"]


@pytest.mark.slow
def test_mixed_training_of_the_self_consistent_transform_is_a_recipe_too(job, tmp_path):
    mixed = ("training.solver=mixed", "training.refresh_every=2", "transform=self-consistent", "compare_with=[]")
    result, _ = run(job, tmp_path, *mixed)
    assert [one["label"] for one in result["results"]] == ["self-consistent"]
    steps = [json.loads(line) for line in (tmp_path / "policies/self-consistent/steps.jsonl").read_text().splitlines()]
    assert [step["kl"] is None for step in steps] == [False, False, False], "one round was drawn after the first step"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compare_with=[{baseline: rawr}]", r"compare_with.*unknown baseline 'rawr'; did you mean raw\?"),
        ("compare_with=[{baseline: nothing-like-it}]", "there are: raw, standardised"),
        ("compare_with=[{baseline: raw, n: 4}]", "raw has no setting 'n'; it takes none"),
        ("compare_with=[{baseline: dpo, n: 1}]", "n of the baseline dpo must be a whole number of at least 2, not 1"),
        ("compare_with=[{baseline: log-sigmoid, quantile: 85}]", "between 0 and 1"),
        ("compare_with=[{baseline: dpo}, {baseline: dpo}]", "repeats"),
        ("training.solver=offline", "training.solver: "),
        ("training.refresh_every=1", r"training\.refresh_every: "),
        ("training={solver: mixed, steps: 10, refresh_every: 10}", "would see no fresh rollouts"),
        ("transform=self-consistent", "self-consistent transform follows the policy's own rollouts"),
        ("transform={baseline: raw}", "a transform is one of"),
    ],
)
def test_names_and_settings_are_checked(override, message, tmp_path):
    with pytest.raises(InputError, match=message):
        parse_recipe(RECIPE, where="recipe.yaml", folder=tmp_path, overrides=[override])


def test_settings_are_checked_before_anything_is_computed(job, tmp_path):
    with pytest.raises(InputError, match=r"training\.offline.*lerning_rate|lerning_rate"):
        run(job, tmp_path, "training.offline={lerning_rate: 1}")
    alone = ("compare_with=[]", "training.solver=weighted-likelihood")
    with pytest.raises(
        InputError, match=r"training\.rloo: nothing in this recipe takes these settings \(temperature\)"
    ):
        run(job, tmp_path, *alone, "training.rloo={temperature: 0.5}")
    with pytest.raises(InputError, match=r"training\.offline: nothing in this recipe takes these settings"):
        run(job, tmp_path, "compare_with=[]", "training.solver=online", "training.offline={weight_decay: 0.1}")
    with pytest.raises(InputError, match="takes the best and the worst of 99, but there are only"):
        run(job, tmp_path, "compare_with=[{baseline: dpo, n: 99}]")
    with pytest.raises(InputError, match="raw rewards needs one reward"):
        run(job, tmp_path, "reward=[{function: 'toy_rewards:vowels'}, {function: 'toy_rewards:vowels'}]")
    assert not (tmp_path / "rollouts").exists()


@pytest.mark.parametrize(
    ("override", "batches", "said"),
    [
        # Three baselines draw in each of the 3 steps; the other four never do, and only the solver differs.
        ("training.solver=offline-regression", 9, "8 × 3 steps of 2 × 4 rollouts; 72 are drawn for it"),
        ("training.solver=weighted-likelihood", 9, "; 72 are drawn for it, the others are stored ones"),
        ("training.solver=online", 12, "; 96 are drawn for it"),
        ("compare_with=[{baseline: qrpo}, {baseline: dpo}]", 0, "3 × 3 steps of 2 × 4 rollouts; 0 are drawn for it"),
    ],
)
def test_the_plan_counts_the_rollouts_that_training_draws(job, tmp_path, override, batches, said):
    plan = Pipeline(load_recipe(job / "recipe.yaml", [override]), tmp_path / "run", Recorder()).check()
    assert plan["training_rollouts"] == batches * 2 * 4
    assert said in plan["text"]


@pytest.mark.parametrize(("steps", "every"), [(3, 2), (4, 2), (5, 2), (11, 10), (20, 10), (30, 7)])
def test_the_plan_counts_the_rounds_that_the_mixed_solver_draws(job, tmp_path, steps, every):
    """Against the steps after which the callback itself draws one."""

    class Counted(FreshRollouts):
        rounds = 0

        def _add(self, window, policy):
            self.rounds += 1

    fresh = Counted(None, every=every, num_prompts=2, num_samples=4)
    for step in range(1, steps + 1):
        fresh.on_step_end(None, TrainerState(global_step=step, max_steps=steps), None)
    settings = [
        "training.solver=mixed",
        f"training.refresh_every={every}",
        f"training.steps={steps}",
        "compare_with=[]",
    ]
    plan = Pipeline(load_recipe(job / "recipe.yaml", settings), tmp_path / "run", Recorder()).check()
    assert plan["training_rollouts"] == fresh.rounds * 2 * 4


def test_a_name_can_be_a_folder():
    assert comparator_from_dict({"baseline": "dpo", "n": 8, "beta": 0.25}).name == "dpo-n8-beta0.25"
