"""A run that trains inside a mixture and reshapes: what it leaves, that it resumes, and what it refuses."""

import json
import re
import shutil
import sys

import numpy as np
import pytest

from infalign.errors import InputError
from infalign.evaluation.record import Evaluation
from infalign.evaluation.reshaped import read_fit
from infalign.report.build import report_data
from infalign.report.page import render
from infalign.rollouts.mixture import MixturePolicy
from infalign.rollouts.opening import open_policy
from infalign.rollouts.store import RolloutStore
from infalign.run.pipeline import Pipeline
from infalign.run.recipe import load_recipe
from infalign.run.testbed.toy import random_llama
from tests.runs import Recorder, infalign

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

RECIPE = """
name: tiny
policy: {model: policy}
reward: {function: "reshape_rewards:vowels"}
prompts: {source: prompts.jsonl, train: 36, evaluation: 6, held_out: 0.15}
procedure: best-of-4
rollouts: {num_ref: 24, max_new_tokens: 4}
transform: self-consistent
compare_with: [identity]
kl_budget: 0.1
training:
  {steps: 6, prompts_per_step: 4, num_generations: 8, learning_rate: 2.0e-2, save_steps: 2, mixture: auto}
reshape: {kind: auto, num_samples: 8, methods: all}
evaluation: {num_samples: 8, procedures: [standard, best-of-4]}
"""
REWARDS = """
def vowels(prompts, completions):
    return [sum(c in "aeiou" for c in text) + len(text) / 100 + sum(map(ord, text)) / 1e6 for text in completions]
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    random_llama(folder / "policy", None, hidden_size=32, seed=1)
    rows = [{"prompt": f"Say {i}: "} for i in range(48)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reshape_rewards.py").write_text(REWARDS)
    (folder / "recipe.yaml").write_text(RECIPE)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def finished(job):
    reporter = Recorder()
    result = Pipeline(load_recipe(job / "recipe.yaml"), job / "out", reporter).run()
    return job / "out", result, reporter


def test_it_evaluates_the_mixture_and_every_comparator_plain_and_reshaped(finished):
    out, result, reporter = finished
    plan = json.loads((out / "plan.json").read_text())
    own, identity = plan["transforms"]
    assert 0 < own["mixture_weight"] < 0.8, "Best-of-4 at a tenth of a nat is a mixture with the reference"
    assert "mixture_weight" not in identity
    labels = [one["label"] for one in result["results"]]
    assert labels[0] == "self-consistent-mixture"
    assert "self-consistent" not in labels, "the model alone is only a part of the mixture"
    assert "identity" in labels
    assert "Reshape (self-consistent-mixture)" in reporter.done
    assert "Reshape (identity)" in reporter.done
    fitted = json.loads((out / "policies/self-consistent-mixture/reshaped/reshape.json").read_text())
    assert fitted["chosen"]
    predicted = fitted["reshaping"]["predictions"]
    assert {"Standard", "Best-of-4"} <= set(predicted["win_rates"])


def test_the_reshaped_policy_opens_from_its_folder_and_its_kl_is_measured(finished):
    out, result, _ = finished
    policy = open_policy(out / "policies/self-consistent-mixture/reshaped")
    assert policy.fingerprint != open_policy(out / "policies/self-consistent-mixture/model").fingerprint
    kls = json.loads((out / "rollouts/evaluation-self-consistent-mixture/kl.json").read_text())
    own = next(one for one in result["results"] if one["label"] == "self-consistent-mixture")
    assert np.mean(kls["exact_kl_PG"]) == pytest.approx(own["kl"]["estimate"])
    if isinstance(policy, MixturePolicy):
        assert 0 <= policy.weights[0] <= 1


def test_every_step_has_the_kl_of_the_mixture_and_of_the_model_alone(finished):
    out, *_ = finished
    steps = [
        json.loads(line) for line in (out / "policies/self-consistent-mixture/steps.jsonl").read_text().splitlines()
    ]
    assert len(steps) == 6
    assert all(step["kl"] <= step["aligned_kl"] + 1e-9 for step in steps), "a mixture is nearer to the reference"
    assert json.loads((out / "policies/self-consistent-mixture/result.json").read_text())["landing"] is None


def test_the_evaluation_records_how_each_reshaped_policy_was_made_and_what_it_took(finished):
    out, *_ = finished
    evaluation = Evaluation.read(out)
    made = {one.label: one.reshaped for one in evaluation.results}
    own = made["self-consistent-mixture"]
    assert own.method == "self-consistent-mixture"
    assert own.trained_weight == json.loads((out / "plan.json").read_text())["transforms"][0]["mixture_weight"]
    assert own.procedure == "Best-of-4"
    assert made["identity"] is None
    fitted = json.loads((out / "policies/self-consistent-mixture/reshaped/reshape.json").read_text())
    assert own.predictions.to_dict() == fitted["reshaping"]["predictions"]
    assert own.alone_kl.estimate == fitted["plain"]["kl"]["estimate"]
    assert len(fitted["histogram"]["edges"]) == 41
    for label, record in made.items():
        if record is None:
            continue
        tries = out / f"rollouts/evaluation-{label}/tries.json"
        store = RolloutStore.open(out / f"rollouts/evaluation-{label}")
        assert tries.exists() == (record.kind == "reshaped")
        if tries.exists():
            counted = json.loads(tries.read_text())
            assert record.acceptance == counted["acceptance"]
            assert record.tokens == counted["tokens"] / (6 * 8)
        else:
            assert record.acceptance == 1.0
            assert record.tokens == pytest.approx(np.mean(store.table(["num_tokens"])["num_tokens"].to_pylist()))


def test_the_report_shows_them_with_the_training_of_the_mixture(finished):
    out, result, _ = finished
    data = report_data(out, Evaluation.read(out))
    assert "self-consistent-mixture" in data.reshapings
    assert "self-consistent-mixture" in data.curves, "the mixture's own training"
    text = render(data)
    for told in ("Reshaped policies", "One sample of self-consistent-mixture instead of Best-of-4"):
        assert told in text
    assert "One sample of self-consistent-mixture instead of Best-of-4" in result["text"]


def test_the_cards_say_how_to_use_it_and_the_code_on_them_runs(finished, monkeypatch):
    out, *_ = finished
    folder = out / "policies/self-consistent-mixture"
    own, part = ((folder / name / "README.md").read_text() for name in ("reshaped", "model"))
    assert "Not meant to be used alone" in part
    assert "The model is not evaluated alone" in part
    assert "A single sample." in own
    assert "| Best\\-of\\-4 win rate, % |" in own
    assert "not yet" not in own
    assert str(out) not in own + part
    for text, at in ((own, folder / "reshaped"), (part, folder / "model")):
        monkeypatch.chdir(at)
        (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        names = {}
        exec(code, names)
        assert len(names["store"]) == 4
        shutil.rmtree("rollouts")


def test_a_finished_run_does_nothing_again(job, finished):
    reporter = Recorder()
    Pipeline(load_recipe(job / "recipe.yaml"), job / "out", reporter).run()
    assert reporter.done == [], reporter.lines


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("reshape=none", "give reshape: auto with training.mixture"),
        ("training.solver=offline-regression", "online training"),
        ("training.mixture={weight: 1.5}", "less than or equal to 1"),
        ("reshape.kind=sideways", "auto"),
        ("procedure={kind: fitted, decoder: 'a:b'}", "a decoder runs one model"),
    ],
)
def test_settings_that_do_not_fit_are_refused(job, change, message):
    overrides = [change]
    if "solver" in change:
        overrides += ["transform=optimal"]
    with pytest.raises(InputError, match=message):
        load_recipe(job / "recipe.yaml", overrides)


def test_too_few_prompts_to_fit_on_are_refused_before_anything_is_computed(job, tmp_path):
    recipe = load_recipe(job / "recipe.yaml", ["prompts.train=12"])
    with pytest.raises(InputError, match="reshaping is fitted on"):
        Pipeline(recipe, tmp_path / "out", Recorder()).run()
    assert not (tmp_path / "out").exists()


def test_a_finished_run_is_reshaped_for_another_procedure_and_budget(finished, capsys, monkeypatch, tmp_path):
    out, *_ = finished
    code, printed, _ = infalign(
        *(
            capsys,
            monkeypatch,
            "reshape",
            out,
            "--trust-run",
            "--procedure",
            "best-of-8",
            "--kl",
            "0.05",
            "--method",
            "identity",
        ),
        *("--kind", "mixture", "--samples", "8", "--out", tmp_path / "policy", "--json"),
    )
    assert code == 0
    content = json.loads(printed)
    assert content["reshaping"]["procedure"] == "Best-of-8"
    assert content["reshaping"]["predictions"]["kl"]["estimate"] <= 0.06
    assert read_fit(tmp_path / "policy")["histogram"]["reference"], "the report of an evaluation draws it"
    policy = open_policy(tmp_path / "policy")
    assert isinstance(policy, MixturePolicy)
    assert policy.weights[0] == pytest.approx(content["reshaping"]["weights"][0])


def test_exact_counts_are_said_best_first(finished, capsys, monkeypatch, tmp_path):
    out, *_ = finished
    command = ("reshape", out, "--trust-run", "--procedure", "best-of-4", "--kl", "0.1", "--samples", "8", "--split")
    code, printed, _ = infalign(capsys, monkeypatch, *command, "--out", tmp_path / "policy")
    assert code == 0
    assert "Exact counts" in printed
    assert "tokens per delivered response" in printed
    code, printed, _ = infalign(capsys, monkeypatch, *command, "--out", tmp_path / "policy", "--json")
    rates = [one["win_rate"]["estimate"] for one in json.loads(printed)["splits"]]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "nobody"), "There are: self-consistent-mixture, identity"),
        (("--kl", "-1"), "nats above 0"),
        (("--kind", "sideways"), "Use one of auto, mixture, reshaped"),
        (("--procedure", "best-of-0"), "whole number of at least 1"),
    ],
)
def test_what_cannot_be_reshaped_is_said_with_a_hint(finished, capsys, monkeypatch, arguments, message):
    out, *_ = finished
    code, _, told = infalign(capsys, monkeypatch, "reshape", out, "--trust-run", *arguments)
    assert code == 2
    assert message in told


def test_a_policy_is_distilled_into_one_model(finished, capsys, monkeypatch, tmp_path):
    out, *_ = finished
    where = tmp_path / "mixture"
    command = ("reshape", out, "--trust-run", "--method", "identity", "--kind", "mixture", "--out", where, "--json")
    code, plain, _ = infalign(capsys, monkeypatch, *command)
    assert code == 0
    assert "distilled" not in json.loads(plain)
    code, told, _ = infalign(capsys, monkeypatch, *command, "--distil", "--distil-samples", 4)
    assert code == 0
    distilled = json.loads(told)["distilled"]
    rate = distilled["measured"]["win_rates"]["Best-of-4"]["estimate"]
    assert f"Distilled into one model: Best-of-4 {100 * rate:.1f}" in json.loads(told)["text"]
    # One ordinary model, trained on 27 prompts × 4 samples, twice, 32 of them at a time.
    reference = json.loads((out / "recipe.json").read_text())["policy"]["model"]
    assert open_policy(distilled["model"]).fingerprint != open_policy(reference).fingerprint
    steps = (where / distilled["model"].split("/")[-2] / "steps.jsonl").read_text().splitlines()
    assert len(steps) == round(2 * 27 * 4 / 32)
    assert np.isfinite(distilled["measured"]["kl"]["estimate"])
    again = json.loads(infalign(capsys, monkeypatch, *command, "--distil", "--distil-samples", 4)[1])
    assert again["distilled"] == distilled, "nothing is done twice"
    code, _, err = infalign(capsys, monkeypatch, *command, "--distil-samples", 4)
    assert (code, "--distil-samples goes with --distil" in err) == (2, True)
