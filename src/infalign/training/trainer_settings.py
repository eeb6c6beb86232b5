"""Settings of a Hugging Face `Trainer` that a recipe cannot change: it sets them elsewhere, or training relies on them.

What is here holds for every solver; each adds its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infalign._io.processes import launched
from infalign.errors import InputError

# Fields that the recipe sets elsewhere, and where.
ELSEWHERE: dict[str, str] = {
    "output_dir": "--out",
    "max_steps": "training.steps",
    "num_train_epochs": "training.steps",
    "learning_rate": "training.learning_rate",
    "per_device_train_batch_size": "training.prompts_per_step",
    "save_steps": "training.save_steps",
    "seed": "seed",
    "data_seed": "seed",
    "resume_from_checkpoint": "the run folder, by running again,",
}

# What recording every step, steering by it and going on after a stop rely on.
RELIED_ON: dict[str, Any] = {
    "logging_strategy": "steps",
    "logging_steps": 1,
    "save_strategy": "steps",
    "load_best_model_at_end": False,
    "ignore_data_skip": False,
    "auto_find_batch_size": False,
}


def refuse_settings(
    given: Mapping[str, Any], where: str, *, elsewhere: Mapping[str, str], relied_on: Mapping[str, Any]
) -> None:
    """Refuse fields that are set elsewhere, or differ from what training relies on.

    Args:
        given: The user's fields.
        where: Their section of the recipe.
        elsewhere: Fields that are set elsewhere, and where.
        relied_on: What fields must be.

    Raises:
        InputError: Naming the first such field.
    """
    for name, value in given.items():
        if name in elsewhere:
            raise InputError(f"{name} is not set here", where=where, hint=f"Set {elsewhere[name]} instead")
        if name in relied_on and value != relied_on[name]:
            raise InputError(
                f"{name}={value!r}, but the training relies on {name}={relied_on[name]!r}",
                where=where,
                hint=f"Remove {name}",
            )


def divide_step(per_step: int, kind: str, given: Mapping[str, Any], where: str) -> tuple[int, int]:
    """How a step's rollouts or examples divide among processes and accumulation steps.

    Args:
        per_step: How many there are.
        kind: What they are.
        given: The user's fields, which may have `gradient_accumulation_steps`.
        where: Their section of the recipe.

    Returns:
        How many make one batch of one process, and the accumulation steps.

    Raises:
        InputError: If they do not divide.
    """
    accumulation = given.get("gradient_accumulation_steps", 1)
    if not isinstance(accumulation, int) or accumulation < 1:
        raise InputError(
            f"gradient_accumulation_steps={accumulation!r}", where=where, hint="Give a whole number from 1"
        )
    batches = accumulation * launched()
    if per_step < 1 or per_step % batches:
        raise InputError(
            f"{per_step} {kind} per step do not divide among {launched()} processes × {accumulation} "
            "accumulation steps",
            where="training",
            hint="Change prompts_per_step, num_generations or gradient_accumulation_steps",
        )
    return per_step // batches, accumulation
