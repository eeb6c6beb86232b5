"""The examples of docs/extending.md, run as they stand there."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from infalign.rewards.source import FunctionReward
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.store import RolloutStore
from infalign.run.pipeline import Pipeline
from infalign.run.recipe import load_recipe
from infalign.run.testbed.toy import random_llama
from infalign.training import methods
from infalign.training.methods import base
from tests.runs import Recorder

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")


def examples(heading: str) -> list[str]:
    """The code under a heading."""
    section = re.search(rf"^## {heading}$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert section is not None
    return re.findall(r"```python\n(.*?)```", section[1], re.DOTALL)


def names_of(code: str) -> dict:
    names: dict = {"__name__": "example"}
    exec(compile(code, "docs/extending.md", "exec", dont_inherit=True), names)
    return names


def test_no_example_is_longer_than_forty_lines():
    found = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(found) == 6
    assert max(code.count("\n") for code in found) <= 40


@pytest.fixture
def clipped(tmp_path, monkeypatch):
    """The example's file beside those of the other methods, found as they are."""
    (tmp_path / "clipped.py").write_text(examples("A method")[0], encoding="utf-8")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    monkeypatch.setattr(base, "_KINDS", dict(base._KINDS))
    methods.find_methods()
    yield
    del sys.modules["infalign.training.methods.clipped"], methods.clipped


def test_a_method_is_one_file_and_its_test(clipped):
    names_of(examples("A method")[1])
    assert "clipped" in methods.comparator_kinds()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_recipe_knows_a_method_that_is_one_file(clipped, tmp_path, monkeypatch):
    """Checked, planned, trained, evaluated: nothing but its own file names it."""
    job = tmp_path / "job"
    random_llama(job / "policy", None, hidden_size=16, seed=1)
    (job / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {word}: "}) + "\n" for word in "abcdefgh"))
    (job / "lengths_of_the_test.py").write_text(
        "def length(prompts, completions):\n    return [*map(len, completions)]\n"
    )
    (job / "recipe.yaml").write_text("""
name: tiny
policy: {model: policy}
reward: {function: "lengths_of_the_test:length"}
prompts: {source: prompts.jsonl, train: 4, evaluation: 4, held_out: 0.5}
procedure: best-of-2
rollouts: {num_ref: 8, max_new_tokens: 4}
beta: 0.5
transform: identity
compare_with: [{baseline: clipped, quantile: 0.75}]
training: {steps: 1, prompts_per_step: 2, num_generations: 2, solver: offline-regression}
evaluation: {num_samples: 2, procedures: [standard, best-of-2]}
""")
    monkeypatch.syspath_prepend(str(job))
    run = Pipeline(load_recipe(job / "recipe.yaml"), tmp_path / "run", Recorder())
    assert "comparators: clipped-quantile0.75" in run.check()["text"]
    assert [one["label"] for one in run.run(None)["results"]] == ["identity", "clipped-quantile0.75"]
    (planned,) = json.loads((tmp_path / "run" / "plan.json").read_text())["baselines"]
    assert planned["baseline"] == {"baseline": "clipped", "quantile": 0.75}
    assert planned["beta"] > 0


def test_a_procedure():
    names = names_of(examples("A procedure")[0])
    assert names["best"].win_rate > 0.5
    # By hand: the rewards 1, 2, 3, 4 are returned with chance 1/8, 1/8, 1/8 and 5/8, and so are 0, ½, 1, 2.
    assert names["procedure"].selection_weights(4) == pytest.approx([0.125, 0.125, 0.125, 0.625])
    assert names["estimate"] == pytest.approx((0.3125 + 0.6875 + 1.0) / 8 + 5 / 8)


def test_a_reward(tmp_path, monkeypatch):
    function, source = examples("A reward")
    (tmp_path / "my_rewards.py").write_text(function)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)  # another test's
    brevity = FunctionReward("my_rewards:brevity")
    assert brevity.score(["?", "?"], ["four", "seven!!"], target_length=[4, 5]).tolist() == [0.0, -2.0]
    assert names_of(source)["scores"] == pytest.approx([0.5, np.nan, 0.0], nan_ok=True)


def test_a_policy(tmp_path):
    policy = names_of(examples("A policy")[0])["ListPolicy"](["a", "b"], [0.25, 0.75])
    prompts = [Prompt("p"), Prompt("q")]
    store = RolloutStore.open(tmp_path, policy.key(max_new_tokens=1, seed=0))
    assert policy.draw(prompts, 500, store=store) == 1000
    assert policy.draw(prompts, 500, store=store) == 0, "all is there"
    texts = np.array(store.lists_PK("text", [prompt.id for prompt in prompts], 500))
    assert (texts == "b").mean() == pytest.approx(0.75, abs=0.06)  # seeded; four standard errors
    logs = store.column_PK("logprob", [prompt.id for prompt in prompts], 500)
    assert (np.exp(logs) == np.where(texts == "b", 0.75, 0.25)).all()
    assert policy.logprobs([[], []], [[0], [1]]) == pytest.approx(np.log([0.25, 0.75]))
