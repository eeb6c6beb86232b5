"""How well a fit predicts what sampled responses on other prompts show: coverage over repeats, on a finished run.

    infalign run recipes/docstrings_best_of_16.yaml --out runs/d0
    python benchmarks/reshape_coverage.py runs/d0 [--method identity-mixture] [--kind mixture] [--repeats 40]

No update has seen the kept prompts and the evaluation prompts. Each repeat splits them at random: a fit on as many as
the run kept, and its prediction of KL and win rate; then sampled responses of the fitted policy on the others, from
rollouts that the fit has not seen: a mixture takes each from the aligned model with its weight, a reshaped policy
accepts proposals by rejection. Covered: the measured value lies within 1.96 joint standard errors (of prediction and
measurement) of the prediction. The repeats share prompts and model, so the shares are less certain than independent
ones. Rollouts are kept in RUN/rollouts/coverage-…; a second start draws nothing again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from infalign._io.progress import no_progress
from infalign.estimators import mean_estimate, win_rate
from infalign.procedures import procedure_from_name
from infalign.reshape import Goal, Reshaping, ReshapingData, fit_reshaping_to
from infalign.rollouts.logprobs import flat_responses
from infalign.rollouts.policy import Policy
from infalign.rollouts.prompts import PromptSet
from infalign.rollouts.store import RolloutStore
from infalign.run.stages.run import Run, open_run
from infalign.run.testbed.quiet import quiet

FIT, FRESH, AT_ONCE = 64, 96, 16


def rollouts(run: Run, name: str, drawn_by: str, count: int, seed: int, prompts: PromptSet, pair: Any) -> Any:
    """Log-ratios aligned to reference, and rewards, of `count` rollouts of each prompt; (P, count) each."""
    policy: Policy = run.open(drawn_by)
    key = policy.key(max_new_tokens=run.recipe.rollouts.max_new_tokens, seed=seed)
    store = RolloutStore.open(run.out / "rollouts" / f"coverage-{name}", key)
    policy.draw(prompts, count, store=store, batch_size=run.recipe.rollouts.batch_size)
    run.rewards.score(store, prompts, no_progress)
    token_ids = store.lists_PK("token_ids", prompts.ids, count)
    aligned, reference = pair
    ratios = np.empty((len(prompts), count))
    for start in range(0, len(prompts), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        prompt_ids, responses, shape = flat_responses(policy.tokenizer, prompts[part], token_ids[part])
        ratios[part] = (aligned.logprobs(prompt_ids, responses) - reference.logprobs(prompt_ids, responses)).reshape(
            shape
        )
    print(f"{name}: {ratios.size} rollouts", flush=True)
    return ratios, run.rewards.read_PKM(store, prompts.ids, count)[..., 0]


def sampled(fit: Reshaping, ref: Any, own: Any, rng: Any) -> tuple[list[Any], list[Any]]:
    """For each prompt, log-ratios and rewards of exact draws of the policy, from fresh rollouts of both models."""
    (ref_ratio, ref_reward), (own_ratio, own_reward) = ref, own
    from_own = rng.random(ref_ratio.shape) < fit.mixture_weight
    ratio = np.where(from_own, own_ratio, ref_ratio)
    reward = np.where(from_own, own_reward, ref_reward)
    accepted = np.log(rng.random(ratio.shape)) < fit.log_acceptance(ratio)
    return [r[a] for r, a in zip(ratio, accepted, strict=True)], [r[a] for r, a in zip(reward, accepted, strict=True)]


def log_partitions(fit: Reshaping, ref_ratio: Any, own_ratio: Any) -> Any:
    """Log Z of each prompt for a reshaped policy, from both models' fresh rollouts (balance heuristic)."""
    if fit.kind == "mixture":
        return np.zeros(len(ref_ratio))
    both = np.concatenate([ref_ratio, own_ratio], axis=1)
    weight = 2.0 / (1.0 + np.exp(both)) / both.shape[1]
    weight /= weight.sum(axis=1, keepdims=True)
    return np.log((weight * np.exp(fit.log_density(both))).sum(axis=1))


def main() -> None:
    """Repeat and count."""
    parser = argparse.ArgumentParser(description="Coverage of a fit's predictions.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--method", default="identity-mixture")
    parser.add_argument("--procedure", default="best-of-16")
    parser.add_argument("--kind", choices=("mixture", "reshaped"), default="mixture")
    parser.add_argument("--kl", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    quiet()
    run, procedure = open_run(options.run), procedure_from_name(options.procedure)
    kept = run.kept_prompts()
    prompts = PromptSet((*kept, *run.prompts("evaluation")))
    model = str(run.policy_folder(options.method))
    pair = run.pair(model)
    ref = rollouts(run, "reference", run.reference, FIT + 2 * FRESH, 4001, prompts, pair)
    own = rollouts(run, options.method, model, FIT + FRESH, 4002, prompts, pair)
    goal = Goal(procedure, kl_budget=options.kl)
    rng, misses = np.random.default_rng(0), []
    for repeat in range(options.repeats):
        order = rng.permutation(len(prompts))
        fitted_on, rest = np.sort(order[: len(kept)]), np.sort(order[len(kept) :])
        data = ReshapingData.from_rewards(
            ref[0][fitted_on, :FIT],
            ref[1][fitted_on, :FIT],
            aligned_log_ratios_PG=own[0][fitted_on, :FIT],
            aligned_rewards_PG=own[1][fitted_on, :FIT],
        )
        fit = fit_reshaping_to(data, goal, kind=options.kind)
        assert fit.predictions is not None, "a fit predicts"
        fresh_ref = [values[rest, FIT : FIT + FRESH] for values in ref]
        fresh_own = [values[rest, FIT:] for values in own]
        ratios, rewards = sampled(fit, fresh_ref, fresh_own, rng)
        log_z = log_partitions(fit, fresh_ref[0], fresh_own[0])
        kl = mean_estimate([(fit.log_density(r) - z).mean() for r, z in zip(ratios, log_z, strict=True)])
        shortest = min(map(len, rewards))
        won = win_rate([r[:shortest] for r in rewards], ref[1][rest, FIT + FRESH :], procedure)
        predicted = {"KL": fit.predictions.kl, "W": fit.predictions.win_rates[procedure.label]}
        row = []
        for name, measured in {"KL": kl, "W": won}.items():
            error = float(np.hypot(predicted[name].standard_error, measured.standard_error))
            row.append((measured.estimate - predicted[name].estimate) / error)
        misses.append(row)
        print(
            f"{repeat + 1}/{options.repeats}: KL predicted {predicted['KL'].estimate:.3f} measured {kl.estimate:.3f}; "
            f"{procedure.label} predicted {predicted['W'].estimate:.4f} measured {won.estimate:.4f}",
            flush=True,
        )
    for name, column in zip(("KL", procedure.label), np.array(misses).T, strict=True):
        covered = float((np.abs(column) < 1.96).mean())
        print(f"{name}: covered {covered:.0%}, mean error {column.mean():+.2f} joint standard errors")


if __name__ == "__main__":
    main()
