"""A recipe whose procedure is measured: from a decoder to its distortion, an alignment for it, and a verdict."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from infalign.errors import InputError
from infalign.procedures import FittedProcedure
from infalign.run.pipeline import Pipeline
from infalign.run.recipe import load_recipe
from infalign.run.testbed.toy import random_llama
from tests.runs import Recorder

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

RECIPE = """
name: measured
policy: {model: policy}
reward: {function: "measured_rewards:mixed"}
prompts: {source: prompts.jsonl, train: 10, evaluation: 8, held_out: 0.5}
procedure: {kind: fitted, decoder: DECODER}
rollouts: {num_ref: 16, max_new_tokens: 4}
kl_budget: 0.1
training: {steps: 2, prompts_per_step: 2, num_generations: 4, learning_rate: 1.0e-2}
evaluation: {num_samples: 4, procedures: [standard]}
"""
# As good as continuous: with many ties a procedure is no map of ranks at all.
REWARDS = """
import zlib

def mixed(prompts, completions):
    return [zlib.crc32(text.encode()) / 2**32 for text in completions]
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    random_llama(tmp_path / "policy", hidden_size=16, seed=1)
    rows = [{"prompt": f"Say something about number {i}: "} for i in range(40)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "measured_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "measured_rewards", raising=False)

    def run(decoder, *overrides, out="run", only=None):
        (tmp_path / "recipe.yaml").write_text(RECIPE.replace("DECODER", decoder))
        recorder = Recorder()
        recipe = load_recipe(tmp_path / "recipe.yaml", overrides)
        return Pipeline(recipe, tmp_path / out, recorder).run(only), recorder

    return tmp_path, run


def test_the_best_of_n_by_the_reward_itself_is_measured_as_such(job):
    # A proxy that is the reward makes the decoder Best-of-4, whose distortion is known: q^4.
    folder, run = job
    decoder = '{proxy: "measured_rewards:mixed", n: 4}, rollouts_per_prompt: 40'
    run(decoder, "rollouts.num_ref=64", "evaluation.num_samples=8", only="rollout")
    run(decoder, "rollouts.num_ref=64", "evaluation.num_samples=8", only="calibrate")
    content = json.loads((folder / "run" / "procedure.json").read_text())
    fitted = FittedProcedure(tuple(content["weights"]), content["num_samples"])
    assert content["num_samples"] == 400
    # Uniform error of 400 ranks beyond 0.12 by chance: 2 exp(−2 · 400 · 0.12²) < 2e-5, if they were independent; ranks
    # of one prompt share its 64 references, which the margin allows for.
    q = np.linspace(0, 1, 101)
    assert np.abs(fitted.distortion(q) - q**4).max() < 0.12
    # Four fifths of the way to the top: the mean rank of Best-of-4.
    assert content["mean_rank"] == pytest.approx(0.8, abs=0.06)


@pytest.mark.slow
def test_from_decoder_to_verdict(job):
    folder, run = job
    result, recorder = run("{top_p: 0.6}, rollouts_per_prompt: 4")
    assert "Measure the procedure (top-p 0.6)" in recorder.done
    plan = json.loads((folder / "run" / "plan.json").read_text())
    assert plan["procedure"]["kind"] == "fitted"
    evaluation = json.loads((folder / "run" / "evaluation.json").read_text())
    assert evaluation["procedure"] == plan["procedure"]
    assert len(plan["procedure"]["weights"]) <= 4, "no more order statistics than there are samples to judge by"
    assert "Through the decoder itself (top-p 0.6)" in result["text"]
    assert [entry["name"] for entry in result["through"]["win_rates"]] == ["optimal", "identity"]
    assert (folder / "run" / "report.html").exists()
    # The same again does nothing; another decoder redoes what depends on it, and the training it changes.
    _, again = run("{top_p: 0.6}, rollouts_per_prompt: 4")
    assert again.done == []
    _, other = run("{beam: 2}", "prompts.train=20", only="rollout")
    result, other = run("{beam: 2}", "prompts.train=20")
    assert "Measure the procedure (beam search, 2 beams)" in other.done
    assert "beam search, 2 beams" in result["text"]


def test_what_cannot_be_measured_is_refused_before_anything_is_computed(job):
    _, run = job
    for decoder, message in (
        ("{beam: one}", "beam is 'one'"),
        ('"measured_rewards:nothing"', "cannot be imported"),
        ('{proxy: "measured_rewards:nothing", n: 4}', "cannot be imported"),
    ):
        with pytest.raises(InputError, match=message):
            run(decoder)
    with pytest.raises(InputError, match="can only be the recipe's own procedure"):
        run("{top_p: 0.5}", "evaluation.procedures=[{kind: fitted, decoder: {beam: 2}}]")


def test_the_shipped_recipe_is_in_order(monkeypatch):
    recipes = Path(__file__).parents[1] / "recipes"
    monkeypatch.syspath_prepend(recipes)
    recipe = load_recipe(recipes / "fitted_tiny.yaml")
    assert recipe.measured_procedure.label == "best of 4 by fitted_tiny_verifier:well_formed"
    from infalign.select.black_box import proxy_reward

    scores = proxy_reward(recipe.measured_procedure.proxy).score(["p"] * 3, ["Return it.", "return it", "It it it it."])
    assert scores.tolist() == [2.0, 0.0, 1.0]
