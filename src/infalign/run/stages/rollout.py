"""Prompts, and the reference rollouts that calibrate the reward."""

from __future__ import annotations

from collections.abc import Sequence

from infalign._io.files import write_text
from infalign._io.http import Endpoint
from infalign._io.progress import Progress
from infalign._io.wording import counted
from infalign.rollouts.endpoint import ServedPolicy
from infalign.rollouts.models import load_tokenizer
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.rendering import moment_now
from infalign.rollouts.store import RolloutStore
from infalign.run.inputs import split_prompts
from infalign.run.recipe import RolloutEndpoint
from infalign.run.rewards import scored_by_all
from infalign.run.stages.run import Run, moment_of, prompt_lines


def write_prompts(run: Run, progress: Progress) -> None:
    """Training and evaluation prompts, written down once for all later stages."""
    train, evaluation = split_prompts(run.recipe)
    # Written again, they are rendered at the moment that stored rollouts were.
    moment = moment_of(run.out) or moment_now()
    for name, prompts in (("train", train), ("evaluation", evaluation)):
        write_text(run.out / "prompts" / f"{name}.jsonl", prompt_lines(prompts.rendered_at(moment)))
    duplicates = train.duplicates + evaluation.duplicates
    told = f"{len(train)} training and {counted(len(evaluation), 'evaluation prompt')}"
    run.say(f"  {told}" + (f" ({counted(duplicates, 'duplicate')} left out)" if duplicates else ""))


def draw_reference(run: Run, progress: Progress) -> None:
    """The K reference rollouts per training prompt that calibrate the reward."""
    draw(run, "reference", run.reference, run.prompts("train"), run.recipe.rollouts.num_ref, run.recipe.seed, progress)


def score_reference(run: Run, progress: Progress) -> None:
    """Their rewards."""
    run.rewards.score(run.store("reference"), run.prompts("train"), progress)


def count_reference(run: Run) -> dict[str, int]:
    """Of the reference rollouts of the training prompts: their tokens, how many were cut, and how many unscored."""
    store, prompts = run.store("reference"), run.prompts("train")
    ids, num_ref = prompts.ids, run.recipe.rollouts.num_ref
    return {
        "prompts": len(prompts),
        "rollouts": len(prompts) * num_ref,
        "tokens": int(store.column_PK("num_tokens", ids, num_ref).sum()),
        "truncated": int((store.column_PK("finish_reason", ids, num_ref) == "length").sum()),
        "unscored": int((~scored_by_all(run.rewards.read_PKM(store, ids, num_ref))).sum()),
    }


def draw(
    run: Run, folder: str, model: str, prompts: Sequence[Prompt], count: int, seed: int, progress: Progress
) -> None:
    """Rollouts of a model: here, or those of the reference at the recipe's server."""
    if model == run.reference and run.recipe.rollouts.endpoint is not None:
        _draw_at_endpoint(run, run.recipe.rollouts.endpoint, folder, prompts, count, seed, progress)
        return
    policy = run.open(model)
    key = policy.key(max_new_tokens=run.recipe.rollouts.max_new_tokens, seed=seed)
    policy.draw(
        prompts,
        count,
        store=RolloutStore.open(run.out / "rollouts" / folder, key),
        batch_size=run.recipe.rollouts.batch_size,
        progress=progress,
    )


def _draw_at_endpoint(
    run: Run,
    served: RolloutEndpoint,
    folder: str,
    prompts: Sequence[Prompt],
    count: int,
    seed: int,
    progress: Progress,
) -> None:
    tokenizer = load_tokenizer(run.reference, trust_remote_code=run.recipe.policy.trust_remote_code)
    policy = ServedPolicy(
        Endpoint(served.url, api_key_variable=served.api_key_variable),
        served.model,
        concurrency=served.concurrency,
        count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]),
        tokenizer=tokenizer,
        fingerprint=f"served:{served.model}",
    )
    key = policy.key(max_new_tokens=run.recipe.rollouts.max_new_tokens, seed=seed)
    store = RolloutStore.open(run.out / "rollouts" / folder, key)
    policy.draw(prompts, count, store=store, progress=progress)
