"""Two real processes under `accelerate launch`: the training is that of one process, and a failure is shown once."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from infalign import processes
from infalign.pipeline import Pipeline
from infalign.recipe import load_recipe
from infalign.testbed.toy import random_llama
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
    weights = [load_file(job / run / "policies/self-consistent/model/model.safetensors") for run in ("one", "two")]
    start = load_file(job / "policy/model.safetensors")
    moved = max(np.abs(weights[0][name] - start[name]).max() for name in start)
    apart = max(np.abs(weights[0][name] - weights[1][name]).max() for name in start)
    assert apart < 1e-3 * moved
    assert together["results"][0]["kl"]["estimate"] == pytest.approx(alone["results"][0]["kl"]["estimate"], rel=1e-2)
    assert not (job / "two/policies/self-consistent/checkpoints").exists()


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
