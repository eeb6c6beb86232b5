"""Align the reference with one method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from infalign._io import processes
from infalign._io.progress import Progress
from infalign.rollouts.fill import compute_logprobs
from infalign.rollouts.prompts import Prompt
from infalign.run.rewards import scored_by_all
from infalign.run.stages.card import write_card
from infalign.run.stages.planned import PlannedMethod
from infalign.run.stages.run import Run
from infalign.training.checkpoints import resuming
from infalign.training.fresh import FreshRollouts
from infalign.training.offline import align_offline
from infalign.training.online import align
from infalign.training.pool import RolloutPool, stored_rollouts


def align_policy(run: Run, planned: PlannedMethod, progress: Progress) -> None:
    """Align the reference with one method: a transform by the recipe's solver, a comparator by its own."""
    recipe, prompts, training = run.recipe, run.prompts("train"), run.recipe.training
    # The KL that decides the landing is measured on prompts that no update has seen, and so is a reshaping fitted.
    kept = len(run.kept_prompts())
    out = run.out / "policies" / planned.name
    common: dict[str, Any] = {
        "max_new_tokens": recipe.rollouts.max_new_tokens,
        "kl_budget": recipe.kl_budget,
        "kl_prompts": prompts[:kept],
        "seed": recipe.seed,
        "trust_remote_code": recipe.policy.trust_remote_code,
        "allow_pickle": recipe.policy.allow_pickle,
        "progress": progress,
    }
    if processes.is_main():
        for told in resuming(out, training.steps):
            run.say(f"  {told}")
    solver = planned.method.solved_by(training.solver)
    if solver == "online":
        reward = run.transformed_reward(planned, mixture_weight=planned.mixture_weight)
        landing = align(run.reference, out, prompts[kept:], reward, **common, **training.online).landing
    else:
        landing = align_offline(
            run.reference,
            out,
            _stored_rollouts(run, prompts[kept:], progress),
            planned.method.loss(planned.beta, training.solver),
            rollouts_per_step=training.prompts_per_step * training.num_generations,
            trainer=training.offline,
            fresh=_fresh_rollouts(run, planned) if solver == "mixed" else None,
            **common,
            **training.model_dump(include={"steps", "learning_rate", "lora", "save_steps", "keep_checkpoints"}),
        ).landing
    if processes.is_main():
        if landing is not None:
            run.say(f"  {landing}")
        write_card(run, planned, None)


def _fresh_rollouts(run: Run, planned: PlannedMethod) -> FreshRollouts:
    training = run.recipe.training
    return FreshRollouts(
        run.transformed_reward(planned),
        every=training.refresh_every,
        num_prompts=training.prompts_per_step,
        num_samples=training.num_generations,
    )


def _stored_rollouts(run: Run, prompts: Sequence[Prompt], progress: Progress) -> RolloutPool:
    """The reference rollouts of these prompts; what a server did not give is computed first."""
    store, everyone, num_ref = run.store("reference"), run.prompts("train"), run.recipe.rollouts.num_ref
    if processes.is_main() and store.table(["logprob"])["logprob"].null_count:
        model, tokenizer = run.load(run.reference)
        compute_logprobs(store, model, tokenizer, everyone, progress=progress)
    processes.wait_for_all()
    scored_PK = scored_by_all(run.rewards.read_PKM(store, everyone.ids, num_ref))
    return stored_rollouts(store, prompts, run.calibrator(), everyone.ids, scored_PK=scored_PK)
