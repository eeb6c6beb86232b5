"""Everything about a recipe that can be checked before anything is computed, and the plan in words."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infalign.data import Prompt, read_rows
from infalign.errors import InputError, StorageError
from infalign.inputs import split_prompts
from infalign.recipe import Recipe, transform_name


def check_recipe(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Check files, columns, models, prompt lengths, the reward and the output folder.

    Args:
        recipe: The experiment.
        out: Its run folder.

    Returns:
        `text`: the plan in words; and its numbers.

    Raises:
        InputError: Saying what cannot work, where, and the mend.
        StorageError: If the output folder cannot be written.
    """
    check_writable(out)
    _check_testbed_data(recipe)
    prompts = _check_prompts(recipe)
    policy = None if recipe.policy.model is None else check_policy(recipe, prompts)
    check_reward(recipe)
    return _plan_text(recipe, out, len(prompts) or None, policy)


def check_writable(out: Path) -> None:
    """Refuse an output folder that cannot be written.

    Raises:
        StorageError: If it cannot.
    """
    existing = out
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise StorageError("this folder cannot be written", where=str(out), mend="Choose another with --out")


def check_policy(recipe: Recipe, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Load the policy's configuration and tokenizer (no weights) and measure every prompt against its context.

    Raises:
        InputError: If there is no model or tokenizer, a chat template is needed and missing, or a prompt is too long.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from infalign.rollouts.models import adapter_base
    from infalign.rollouts.tokens import prompt_token_ids

    model = recipe.policy.model
    assert model is not None  # the caller checked
    options: dict[str, Any] = {"trust_remote_code": recipe.policy.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(adapter_base(model), **options)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"no model can be read there ({_first_line(error)})",
            where=f"policy.model {model}",
            mend="Give a Hugging Face model folder, an adapter folder or a hub name",
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"no tokenizer can be loaded there ({_first_line(error)})",
            where=f"policy.model {model}",
            mend="Save the tokenizer into the same folder (tokenizer.save_pretrained)",
        ) from error
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    new = recipe.rollouts.max_new_tokens
    longest = 0
    for prompt, ids in zip(prompts, prompt_token_ids(tokenizer, prompts), strict=True):
        longest = max(longest, len(ids))
        if context is not None and len(ids) + new > context:
            raise InputError(
                f"prompt {prompt.id} has {len(ids)} tokens; with rollouts.max_new_tokens={new} it does not fit the "
                f"model's context of {context}",
                where="prompts",
                mend="Shorten or remove such prompts, or lower rollouts.max_new_tokens",
            )
    import torch

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, **options)
    return {"parameters": skeleton.num_parameters(), "context": context, "longest_prompt": longest}


def check_reward(recipe: Recipe) -> None:
    """Make sure that the reward model's configuration, or the reward function, can be found.

    Raises:
        InputError: If it cannot.
    """
    if recipe.reward.function is not None:
        from infalign.rollouts.rewards import FunctionReward

        FunctionReward(recipe.reward.function)
    elif recipe.reward.model is not None:
        from transformers import AutoConfig

        try:
            AutoConfig.from_pretrained(recipe.reward.model, trust_remote_code=recipe.reward.trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"no model can be read there ({_first_line(error)})",
                where=f"reward.model {recipe.reward.model}",
                mend="Give a sequence-classification model folder or hub name",
            ) from error


def _check_testbed_data(recipe: Recipe) -> None:
    testbed = recipe.testbed
    if testbed is None:
        return
    if testbed.demonstrations is not None:
        rows = testbed.demonstrations
        read_rows(rows.source, columns=[rows.prompt, rows.completion], split=rows.split, limit=1)
    for rows in testbed.preferences:
        read_rows(rows.source, columns=[rows.prompt, rows.chosen, rows.rejected], split=rows.split, limit=1)


def _check_prompts(recipe: Recipe) -> list[Prompt]:
    if recipe.prompts.source is None:
        return []
    train, evaluation = split_prompts(recipe)
    return [*train, *evaluation]


def _plan_text(recipe: Recipe, out: Path, prompts: int | None, policy: dict[str, Any] | None) -> dict[str, Any]:
    names = [transform_name(t) for t in recipe.transforms]
    training, rollouts, evaluation = recipe.training, recipe.rollouts, recipe.evaluation
    reference_rollouts = recipe.prompts.train * rollouts.num_ref
    training_rollouts = training.steps * training.prompts_per_step * training.num_generations * len(names)
    evaluation_rollouts = recipe.prompts.evaluation * evaluation.num_samples * (len(names) + 1)
    lines = [
        f"Recipe {recipe.name}, run folder {out}",
        f"Procedure: {recipe.target_procedure.label}; transforms: {', '.join(names)}; "
        + (f"KL budget {recipe.kl_budget} nats" if recipe.kl_budget is not None else f"beta {recipe.beta}"),
    ]
    if recipe.testbed is not None:
        lines.append("Testbed: a reference policy and a reward model are trained from scratch first")
    if prompts is not None:
        wanted = recipe.prompts
        lines.append(f"Prompts: {prompts}, of up to {wanted.train} to train on and {wanted.evaluation} to evaluate")
    lines += [
        f"Reference rollouts: up to {recipe.prompts.train} prompts × {rollouts.num_ref} = {reference_rollouts:,}",
        f"Training: {len(names)} × {training.steps} steps of {training.prompts_per_step} × {training.num_generations} "
        f"= {training_rollouts:,} rollouts",
        f"Evaluation: {len(names) + 1} models × up to {recipe.prompts.evaluation} prompts × {evaluation.num_samples} "
        f"= {evaluation_rollouts:,} rollouts",
    ]
    numbers: dict[str, Any] = {
        "reference_rollouts": reference_rollouts,
        "training_rollouts": training_rollouts,
        "evaluation_rollouts": evaluation_rollouts,
    }
    if policy is not None:
        numbers |= policy
        lines.append(f"Policy: {policy['parameters']:,} parameters, longest prompt {policy['longest_prompt']} tokens")
        # Weights, gradients and two Adam moments in 32 bits, and the frozen reference beside them.
        copies = 2.2 if training.lora is not None else 5
        numbers["training_memory_gib"] = round(copies * 4 * policy["parameters"] / 2**30, 2)
        lines.append(
            f"Training memory before activations: about {numbers['training_memory_gib']} GiB in 32-bit numbers"
        )
    return {"text": "\n".join(lines), **numbers}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", maxsplit=1)[0]
