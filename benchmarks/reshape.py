"""What a mixture and a reshaped policy cost for each delivered answer, beside the plain reference.

    infalign run recipes/docstrings_best_of_16.yaml
    infalign reshape runs/docstrings_best_of_16 --procedure worst-of-16 --kl 0.5 --method raw
    python benchmarks/reshape.py runs/docstrings_best_of_16 POLICY_FOLDER... [--prompts 32] [--rounds 3]

For every policy the same prompts are answered with `--candidates` candidates each, the policies in turn, several
rounds. Printed for each delivered answer (all its candidates): tokens generated (rejected proposals included),
sequences scored, seconds (median over rounds), as a ratio to the plain reference too, and the share of accepted
proposals. Last, the parameters in memory of each policy beside one model's.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infalign.rollouts.batches import Missing
from infalign.rollouts.mixture import MixturePolicy
from infalign.rollouts.opening import open_policy
from infalign.rollouts.policy import LocalPolicy, Policy
from infalign.rollouts.reshaped import ReshapedPolicy
from infalign.run.stages.run import open_run
from infalign.run.testbed.quiet import quiet


def models_of(policy: Policy) -> list[Any]:
    """The distinct models that a policy holds in memory."""
    if isinstance(policy, LocalPolicy):
        return [policy.model]
    assert isinstance(policy, MixturePolicy | ReshapedPolicy), "the benchmark opens local policies"
    found: list[Any] = []
    for part in (policy.base, *policy.aligned):
        found += [model for model in models_of(part) if all(model is not other for other in found)]
    return found


def measure(policy: Policy, prompts: Any, candidates: int, max_new_tokens: int, seed: int) -> dict[str, float]:
    """Tokens, scored sequences and seconds of one round, for each answer; and the acceptance."""
    key = policy.key(max_new_tokens=max_new_tokens, seed=seed)
    tokens = policy.prompt_tokens(prompts, max_new_tokens)
    missing = [
        Missing(prompt.id, ids, list(range(candidates)), prompt=prompt)
        for prompt, ids in zip(prompts, tokens, strict=True)
    ]
    before = (policy.total.tries, policy.total.accepted, policy.total.tokens) if _rejects(policy) else (0, 0, 0)
    started = time.perf_counter()
    generated = sum(sum(count or 0 for count in rows["num_tokens"]) for rows in policy.draw_rows(missing, key))
    seconds = time.perf_counter() - started
    found = {"tokens": generated, "scored": 0.0, "seconds": seconds, "acceptance": 1.0}
    if _rejects(policy):
        tries, accepted, all_tokens = policy.total.tries, policy.total.accepted, policy.total.tokens
        found |= {
            "tokens": all_tokens - before[2],
            "scored": tries - before[0],  # each try is scored once, by the model that did not draw it
            "acceptance": (accepted - before[1]) / max(tries - before[0], 1),
        }
    return {name: value if name == "acceptance" else value / len(prompts) for name, value in found.items()}


def _rejects(policy: Policy) -> Any:
    return isinstance(policy, ReshapedPolicy)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("policies", type=Path, nargs="+")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    run = open_run(given.run)
    prompts = list(run.prompts("evaluation"))[: given.prompts]
    length = run.recipe.rollouts.max_new_tokens
    policies = {"reference": open_policy(run.reference)}
    policies |= {folder.name if folder.name != "reshaped" else folder.parent.name: open_policy(folder)
                 for folder in given.policies}  # fmt: skip
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in policies}
    for number in range(given.rounds + 1):  # the first is not counted
        for name, policy in policies.items():
            one = measure(policy, prompts, given.candidates, length, seed=number)
            if number:
                rounds[name].append(one)
    medians = {
        name: {what: float(np.median([one[what] for one in ones])) for what in ones[0]} for name, ones in rounds.items()
    }
    plain = medians["reference"]
    print(f"{len(prompts)} answers of {given.candidates} candidates, medians of {given.rounds} rounds; ratio to plain")
    print(f"{'policy':34s} {'tokens':>14s} {'scored':>8s} {'seconds':>16s} {'accepted':>9s} {'parameters':>11s}")
    one_model = sum(parameter.numel() for parameter in models_of(policies["reference"])[0].parameters())
    for name, found in medians.items():
        parameters = sum(p.numel() for model in models_of(policies[name]) for p in model.parameters())
        print(
            f"{name:34s} {found['tokens']:7.0f} ({found['tokens'] / plain['tokens']:.2f}) {found['scored']:8.1f} "
            f"{found['seconds']:8.4f} ({found['seconds'] / plain['seconds']:.2f}) {found['acceptance']:9.2f} "
            f"{parameters / one_model:10.2f}x"
        )


if __name__ == "__main__":
    main()
