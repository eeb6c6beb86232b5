"""The reward in a user's own TRL trainer: does the trainer still maximise what the reward is meant for?"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from infalign.rollouts.prompts import Prompt
from infalign.rollouts.texts import response_texts
from infalign.rollouts.tokens import end_tokens, prompt_token_ids
from infalign.training.objective import GRPO_OBJECTIVE, OBJECTIVE


class ObjectiveWarning(UserWarning):
    """A trainer's setting changes the objective that a `TransformedReward` stands for."""


def check_trainer(trainer: Any, reward: Any = None) -> list[str]:
    """Settings of a TRL trainer under which it would not maximise E_π Φ(C)/β − KL(π‖p) (M2).

    Args:
        trainer: An `RLOOTrainer` or `GRPOTrainer`; of any other object, what it has of their settings.
        reward: The `TransformedReward` among the trainer's reward functions; its only one if None.

    Returns:
        One line per setting: what it is, what it should be, and why. Empty if all is well.
    """
    args = trainer.args
    found: list[str] = []
    grpo = hasattr(args, "scale_rewards")
    for name, need in {**OBJECTIVE, **GRPO_OBJECTIVE}.items():
        if not hasattr(args, name) or need.met_by(value := getattr(args, name)):
            continue
        if name == "beta" and grpo:
            continue  # said below
        if name == "disable_dropout" and not _has_dropout(trainer.model):
            continue
        if name == "reward_weights" and len(value) > 1:
            continue  # said below
        found.append(f"{name}={value!r}, should be {need.value!r}: {need.why}")
    if grpo:
        how = (
            "there is no KL at all"
            if args.beta == 0
            else "its KL estimate (k3) stands in the loss, token by token, where its gradient is not that of the KL"
        )
        found.append(
            f"beta={args.beta!r} in a GRPOTrainer: {how}; use RLOOTrainer with beta=1.0, which subtracts the sequence "
            "KL from the reward"
        )
    steps, accumulation = getattr(args, "steps_per_generation", None), getattr(args, "gradient_accumulation_steps", 1)
    if steps is not None and steps != accumulation:
        found.append(
            f"steps_per_generation={steps!r}, should be {accumulation!r} (gradient_accumulation_steps): updates after "
            "the first would be on rollouts of an older policy"
        )
    functions = getattr(trainer, "reward_funcs", [])
    if len(functions) > 1:
        others = [_name(function) for function in functions if function is not reward]
        found.append(
            f"{len(functions)} reward functions, should be one: what {', '.join(others) or 'the others'} adds is not "
            "calibrated; combine rewards before the transform (CombinedReward with CombinedCalibrator)"
        )
    return found


def calling_trainer(log_metric: Any) -> Any:
    """The trainer that calls a reward function; None if it cannot be told.

    TRL passes no trainer to a reward function, but a method of it, as `log_metric`.
    """
    trainer = getattr(log_metric, "__self__", None)
    return trainer if hasattr(trainer, "args") and hasattr(trainer, "model") else None


def texts_in_context(trainer: Any, prompts: Sequence[Prompt], completions: Sequence[Any], ids: Any) -> Sequence[Any]:
    """Responses of a trainer as rollouts of a store have them, where the trainer's tokens tell.

    TRL decodes a response alone, and some decoders then drop the space that it begins with (`texts.response_texts`).

    Args:
        trainer: The calling trainer.
        prompts: B prompts.
        completions: What the trainer gave; returned where its tokens do not tell, as for several turns.
        ids: Token ids of the responses, as TRL passes `completion_ids`; None if it passed none.
    """
    tokenizer = getattr(trainer, "processing_class", None)
    single = all(isinstance(one, str) or len(one) == 1 for one in completions)
    if ids is None or not single or not hasattr(tokenizer, "batch_decode") or hasattr(tokenizer, "image_processor"):
        return completions
    ends = set(end_tokens(trainer.model, tokenizer))
    responses = [one[:-1] if len(one) and int(one[-1]) in ends else one for one in ids]
    return response_texts(tokenizer, prompt_token_ids(tokenizer, prompts), responses)


def warn_of_settings(trainer: Any, reward: Any) -> None:
    """Give one warning with all that `check_trainer` finds."""
    if found := check_trainer(trainer, reward):
        lines = "\n".join(f"  - {line}" for line in found)
        warnings.warn(
            f"{type(trainer).__name__} would not maximise the objective of this TransformedReward:\n{lines}",
            ObjectiveWarning,
            stacklevel=3,
        )


def _has_dropout(model: Any) -> bool:
    """Whether a model drops anything out while it trains: by a module, or by a rate in its configuration."""
    modules = any(type(module).__name__.startswith("Dropout") and module.p > 0 for module in model.modules())
    rates = getattr(model, "config", None)
    configured = {} if rates is None else rates.to_dict()
    return modules or any(
        isinstance(rate, float) and rate > 0
        for name, rate in configured.items()
        if "dropout" in name or name.endswith("pdrop")
    )


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)
