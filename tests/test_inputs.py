"""The prompts that a recipe reads: which, and in what order."""

import json

import numpy as np
import pytest

from infalign.run import inputs
from infalign.run.inputs import split_prompts
from infalign.run.recipe import Recipe
from infalign.run.recipe.experiment import num_kept

TESTBED = {"name": "t", "testbed": {"corpus": "docstrings"}, "procedure": "best-of-4", "kl_budget": 0.5}


def _recipe(tmp_path, rows, **changes):
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    content = {
        "name": "t",
        "policy": {"model": str(tmp_path)},
        "reward": {"function": "tests:none"},
        "procedure": "best-of-4",
        "kl_budget": 0.5,
        "prompts": {"source": str(source), "train": 80, "evaluation": 40, "held_out": 0.3, **changes},
    }
    return Recipe.model_validate(content)


def test_testbed_prompts_are_new_to_the_reference():
    recipe = Recipe.model_validate(TESTBED | {"prompts": {"train": 384, "evaluation": 256}})
    train, evaluation = split_prompts(recipe)
    assert (len(train), len(evaluation)) == (384, 256)
    demonstrated = {example.prompt for example in inputs.testbed_text(recipe)[0] if not example.held_out}
    assert not demonstrated & {prompt.text for prompt in (*train, *evaluation)}
    assert not set(train.ids) & set(evaluation.ids)


def test_parts_are_alike():
    """Modules are spread evenly over the kept prompts, the rest and the evaluation (they used to be a to c)."""
    recipe = Recipe.model_validate(TESTBED | {"prompts": {"train": 384, "evaluation": 256}})
    train, evaluation = split_prompts(recipe)
    kept = num_kept(recipe, len(train))
    letters = [np.mean([ord(p.text[0]) for p in part]) for part in (train[:kept], train[kept:], evaluation)]
    spread = np.std([ord(p.text[0]) for p in (*train, *evaluation)])
    # Means of 96 to 288 of 640 letters, drawn without replacement: 4 standard errors, false alarm under 2e-4.
    assert max(letters) - min(letters) < 4 * spread * np.sqrt(1 / kept + 1 / (len(train) - kept))


def test_order_does_not_follow_the_file(tmp_path):
    rows = [f"{number:04d}" for number in range(400)]
    train, evaluation = split_prompts(_recipe(tmp_path, rows))
    again, _ = split_prompts(_recipe(tmp_path, rows[::-1]))
    assert again.ids == train.ids
    assert (len(train), len(evaluation)) == (80, 40)
    numbers = np.array([int(prompt.text) for prompt in train])
    assert 150 < numbers.mean() < 250  # 200 ± 12; the first rows would give 57
    assert abs(np.corrcoef(numbers, np.arange(80))[0, 1]) < 0.4


@pytest.mark.parametrize("seed", [1, 2])
def test_another_seed_draws_others(tmp_path, seed):
    rows = [f"{number:04d}" for number in range(400)]
    recipe = _recipe(tmp_path, rows)
    other = recipe.model_copy(update={"seed": seed})
    assert set(split_prompts(recipe)[0].ids) != set(split_prompts(other)[0].ids)
    assert not set(split_prompts(recipe)[0].ids) & set(split_prompts(other)[1].ids)  # held out whatever the seed
