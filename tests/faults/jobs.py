"""Tiny recipes, one for each way to train, and what a run of them comes to."""

import hashlib
import json
from pathlib import Path

RECIPE = """
name: tiny
policy: {model: policy}
reward: {function: "fault_rewards:vowels"}
prompts: {source: prompts.jsonl, train: 8, evaluation: 4, held_out: 0.5}
procedure: best-of-2
compare_with: []
rollouts: {num_ref: 4, max_new_tokens: 4}
training: {steps: 6, prompts_per_step: 2, num_generations: 4, learning_rate: 1.0e-2, save_steps: 2}
evaluation: {num_samples: 4, procedures: [standard, best-of-2]}
"""
RESHAPED = [
    *("prompts.train=36", "prompts.held_out=0.15", "rollouts.num_ref=8", "kl_budget=0.1"),
    *("reshape={kind: auto, num_samples: 4, methods: all}", "training.steps=4"),
]
# What is changed in the recipe. "landing" is online training that ends at a KL budget.
SOLVERS = {
    "online": ["beta=0.5"],
    "offline": ["beta=0.5", "training.solver=offline-regression"],
    "weighted": ["beta=0.5", "training.solver=weighted-likelihood"],
    "mixed": ["beta=0.5", "training.solver=mixed", "training.refresh_every=2"],
    "landing": ["kl_budget=0.2", "training.steps=4"],
    "reshape": RESHAPED,
}
# A file `countdown` beside it says at which call the reward presses Ctrl-C.
REWARDS = """
import os, pathlib, signal

def vowels(prompts, completions):
    countdown = pathlib.Path(__file__).with_name("countdown")
    if countdown.exists():
        left = int(countdown.read_text())
        countdown.write_text(str(left - 1))
        if left == 0:
            os.kill(os.getpid(), signal.SIGINT)
    return [sum(c in "aeiou" for c in text) + len(text) / 100 + sum(map(ord, text)) / 1e6 for text in completions]
"""


def make_job(folder: Path) -> Path:
    """A folder with a policy, prompts, a reward and a recipe."""
    from infalign.run.testbed.toy import random_llama

    random_llama(folder / "policy", None, hidden_size=16, seed=1)
    rows = [{"prompt": f"Say {number}: "} for number in range(48)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "fault_rewards.py").write_text(REWARDS)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def outcome(out: Path) -> dict:
    """What must not depend on what happened on the way: results, plan, every training's steps and weights."""
    evaluation = json.loads((out / "evaluation.json").read_text())
    for result in evaluation["results"]:
        # What drawing took: work that was lost in a kill is not counted.
        for name in ("acceptance", "tokens"):
            (result.get("reshaped") or {}).pop(name, None)
    found = {
        "results": evaluation["results"],
        "comparisons": evaluation["comparisons"],
        "plan": json.loads((out / "plan.json").read_text()),
    }
    for path in sorted(out.glob("policies/*/model/model.safetensors")):
        found[f"weights of {path.parts[-3]}"] = hashlib.sha256(path.read_bytes()).hexdigest()
        result = json.loads((path.parents[1] / "result.json").read_text())
        found[f"training of {path.parts[-3]}"] = result
    for path in sorted(out.glob("policies/*/reshaped/reshape.json")):
        found[f"fit of {path.parts[-3]}"] = json.loads(path.read_text())
    return found


def leftovers(out: Path) -> list[str]:
    """Files of writers that did not come to their end."""
    return [
        str(path.relative_to(out))
        for path in out.rglob("*")
        if path.name.endswith((".tmp", ".part", ".partial")) and "superseded" not in path.parts
    ]
