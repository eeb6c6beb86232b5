"""Two real processes under `accelerate launch`: the training is that of one process, and a failure is shown once."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from infalign._io import processes
from infalign.run.pipeline import Pipeline
from infalign.run.recipe import load_recipe
from infalign.run.testbed.toy import random_llama
from tests.runs import Recorder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"),
]

# The transform has a state, β follows the KL, a group's rollouts are split between the processes.
RECIPE = """
name: shared
policy: {model: policy}
reward: {function: "shared_rewards:vowels"}
prompts: {source: prompts.jsonl, train: 8, evaluation: 4, held_out: 0.5}
procedure: best-of-2
transform: self-consistent
compare_with: []
rollouts: {num_ref: 4, max_new_tokens: 4}
kl_budget: 0.2
training: {steps: 12, prompts_per_step: 1, num_generations: 8, learning_rate: 3.0e-3, save_steps: 5, anneal: 0.1}
evaluation: {num_samples: 4, procedures: [best-of-2]}
"""
REWARDS = """
import os

def vowels(prompts, completions):
    return [sum(c in "aeiou" for c in text) + len(text) / 100 for text in completions]

def constant(prompts, completions):
    return [1.0] * len(completions)

def lost_by_the_second(prompts, completions):
    return [None] * len(completions) if os.environ["RANK"] == "1" else vowels(prompts, completions)
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    random_llama(folder / "policy", None, hidden_size=16, seed=1)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Number {i}: "}) + "\n" for i in range(20)))
    (folder / "shared_rewards.py").write_text(REWARDS)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def launch(job, *arguments):
    """`infalign run` in two processes, which meet over gloo where there is no GPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["-m", "infalign", "run", "recipe.yaml", "--json", *arguments]
    return subprocess.run(command, cwd=job, env=dict(os.environ), capture_output=True, text=True, timeout=300)


def apart(job, one, two, name):
    """Largest difference between the trained weights of two runs, as a share of how far they moved.

    The landing scales the whole update by a KL that it estimates from its own rollouts, of which rounding may turn one.
    It is compared by itself (`landings`).
    """
    start = load_file(job / "policy/model.safetensors")
    first, second = (
        {key: (weight - start[key]) / scale for key, weight in load_file(folder / "model/model.safetensors").items()}
        for folder, scale in ((job / run / "policies" / name, landings(job, run, name)) for run in (one, two))
    )
    moved = max(np.abs(update).max() for update in first.values())
    return max(np.abs(first[key] - second[key]).max() for key in start) / moved


def landings(job, run, name):
    return json.loads((job / run / "policies" / name / "result.json").read_text())["landing"]["scale"]


def test_two_processes_train_as_one_does(job, monkeypatch):
    monkeypatch.syspath_prepend(str(job))
    alone = Pipeline(load_recipe(job / "recipe.yaml", []), job / "one", Recorder()).run()
    finished = launch(job, "--out", "two")
    assert finished.returncode == 0, finished.stderr
    together = json.loads(finished.stdout)  # of one process alone
    assert finished.stderr.count("Align (self-consistent) …") == 1

    one, two = (
        [json.loads(line) for line in (job / run / "policies/self-consistent/steps.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    )
    assert len(one) == 12
    # Not one value by chance: the policy moves, and so do β and the transform.
    assert max(row["kl"] for row in one) > 0.01  # of a few rollouts each, so some are below zero
    assert one[-1]["beta"] != one[0]["beta"]
    for name in ("kl", "beta", "calibrated_reward", "raw_reward", "win_rate", "tie_mass", "mean_length"):
        assert [step[name] for step in two] == pytest.approx([step[name] for step in one], rel=1e-3, abs=1e-5), name
    assert apart(job, "one", "two", "self-consistent") < 1e-3
    assert landings(job, "two", "self-consistent") == pytest.approx(landings(job, "one", "self-consistent"), rel=1e-2)
    assert together["results"][0]["kl"]["estimate"] == pytest.approx(alone["results"][0]["kl"]["estimate"], rel=1e-2)
    assert not (job / "two/policies/self-consistent/checkpoints").exists()


def test_two_processes_fit_stored_rollouts_as_one_does(job, monkeypatch):
    """Regression, with gradient accumulation: the same examples in every step, and one landing."""
    monkeypatch.syspath_prepend(str(job))
    settings = [
        "transform=identity",
        "rollouts.num_ref=8",
        "training={solver: offline-regression, steps: 6, prompts_per_step: 1, num_generations: 8, save_steps: 4, "
        "learning_rate: 3.0e-3, offline: {gradient_accumulation_steps: 2}}",
    ]
    Pipeline(load_recipe(job / "recipe.yaml", settings), job / "fit-one", Recorder()).run()
    finished = launch(job, "--out", "fit-two", *(word for one in settings for word in ("--set", one)))
    assert finished.returncode == 0, finished.stderr
    one, two = (json.loads((job / run / "policies/identity/result.json").read_text()) for run in ("fit-one", "fit-two"))
    assert len(one["steps"]) == 6
    assert max(step["kl"] for step in one["steps"]) > 0.05, "the policy moves; 0.12 was seen"
    for name in ("loss", "kl", "log_ratio"):
        seen = [[step[name] for step in run["steps"]] for run in (one, two)]
        assert seen[1] == pytest.approx(seen[0], rel=1e-3, abs=1e-5), name  # 5e-6 was seen
    assert two["landing"].pop("note") == one["landing"].pop("note")
    assert two["landing"] == pytest.approx(one["landing"], rel=1e-2)
    assert apart(job, "fit-one", "fit-two", "identity") < 1e-3


@pytest.mark.parametrize(
    ("function", "message"),
    [("constant", "nothing to learn"), ("lost_by_the_second", "no finite reward")],
    ids=["main process, others waiting", "other process, in training"],
)
def test_a_failure_of_one_ends_all_and_is_shown_once(job, function, message):
    failed = launch(job, "--out", function, "--set", f"reward.function=shared_rewards:{function}")
    assert failed.returncode != 0
    assert failed.stdout == ""
    assert failed.stderr.count("error: ") == 1, failed.stderr
    assert failed.stderr.count(message) == 1
    assert "RewardError" not in failed.stderr, "no traceback of ours"


def test_alone_there_is_nobody_to_wait_for(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    processes.join()
    processes.wait_for_all()
    processes.tell({"train": 1})
    assert processes.launched() == 1
    assert processes.is_main()
    assert processes.first_to_fail()
    (same,) = processes.gathered([np.arange(3)])
    assert same.tolist() == [0, 1, 2]
    processes.leave()
