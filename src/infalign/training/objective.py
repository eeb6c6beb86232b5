"""Which trainer settings change the objective: one list, for our own training and for a user's trainer.

The objective is E_π Φ(C)/β − KL(π‖p) (M2, in nats), with rollouts of the policy itself and the sequence-level KL in the
reward. Our own training refuses anything else; a user's trainer is warned about it (`drop_in.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infalign.errors import InputError
from infalign.training.trainer_settings import ELSEWHERE, RELIED_ON, refuse_settings


@dataclass(frozen=True)
class Need:
    """What a setting must be, and why.

    Attributes:
        value: What it must be.
        why: What another value does.
        same: Other values that mean the same.
    """

    value: Any
    why: str
    same: tuple[Any, ...] = ()

    def met_by(self, value: Any) -> bool:
        """Whether this value leaves the objective as it is."""
        return value == self.value or value in self.same


# Of TRL's RLOOTrainer; GRPOTrainer has most of them as well.
OBJECTIVE: dict[str, Need] = {
    "beta": Need(1.0, "the reward is Φ/β in nats, so another KL coefficient is another β"),
    "normalize_advantages": Need(
        False,
        "advantages that should vanish at the optimum are blown up to unit size, so the policy never comes to rest",
    ),
    "reward_clip_range": Need(None, "clipped rewards are another Φ"),
    "reward_weights": Need(None, "a weight on the reward is another β", same=([1.0], [1])),
    "num_iterations": Need(1, "updates after the first would be on rollouts of an older policy"),
    "temperature": Need(1.0, "rollouts would be of another policy than the one whose KL is counted"),
    "top_p": Need(1.0, "rollouts would be of another policy than the one whose KL is counted"),
    "top_k": Need(0, "rollouts would be of another policy than the one whose KL is counted", same=(None, -1)),
    "min_p": Need(None, "rollouts would be of another policy than the one whose KL is counted", same=(0.0,)),
    "repetition_penalty": Need(1.0, "rollouts would be of another policy than the one whose KL is counted"),
    "generation_kwargs": Need(None, "rollouts would be of another policy than the one whose KL is counted", same=({},)),
    "disable_dropout": Need(True, "with dropout the log-probabilities are not those of the policy"),
    "mask_truncated_completions": Need(False, "a truncated response is a response: it was calibrated as one"),
    "sync_ref_model": Need(False, "the KL would no longer be to the reference of the calibration"),
}

# Settings that only TRL's GRPOTrainer has.
GRPO_OBJECTIVE: dict[str, Need] = {
    "scale_rewards": Need(
        "none", "dividing by the spread of the rewards cancels the scale of Φ, and with it β", same=(False,)
    ),
    "multi_objective_aggregation": Need("sum_then_normalize", "each reward is divided by its spread, which cancels β"),
    "loss_type": Need("dr_grpo", "the loss weights a response, or a batch, by its length"),
    "importance_sampling_level": Need("token", "the loss divides by the response's length"),
    "top_entropy_quantile": Need(1.0, "tokens of low entropy are left out of the gradient"),
    "entropy_coef": Need(0.0, "an entropy bonus is added to the objective"),
    "use_adaptive_entropy": Need(False, "an entropy bonus is added to the objective"),
    "off_policy_mask_threshold": Need(None, "responses are left out of the gradient by how far the policy has moved"),
}

# What our own training fixes besides, so that prompts and models are those of the calibration.
_OURS: dict[str, Any] = {
    "remove_unused_columns": False,  # the reward needs the prompt's id
    "shuffle_dataset": False,  # the order is drawn beforehand, so that a resumed training sees the same one
    "chat_template_kwargs": None,  # the prompts are those of the calibration
    "model_init_kwargs": None,  # would load the trainer's reference otherwise than the policy
}

FIXED: dict[str, Any] = {**{name: need.value for name, need in OBJECTIVE.items()}, **_OURS}

# `RLOOConfig` fields that the recipe sets elsewhere, and where.
_ELSEWHERE = {
    **ELSEWHERE,
    "num_generations": "training.num_generations",
    "generation_batch_size": "training.prompts_per_step",
    "max_completion_length": "rollouts.max_new_tokens",
    "trust_remote_code": "policy.trust_remote_code",
}


def refuse_changed_objective(rloo: Mapping[str, Any]) -> None:
    """Refuse `RLOOConfig` fields under which the trainer would optimise something else, or that the recipe sets.

    Raises:
        InputError: Naming the first such field and why.
    """
    refuse_settings(rloo, "training.rloo", elsewhere=_ELSEWHERE, relied_on=RELIED_ON)
    for name, value in rloo.items():
        if name in FIXED and value != FIXED[name]:
            why = f" ({OBJECTIVE[name].why})" if name in OBJECTIVE else ""
            raise InputError(
                f"{name}={value!r} would change the objective, which needs {name}={FIXED[name]!r}{why}",
                where="training.rloo",
                hint=f"Remove {name}",
            )
    generation, accumulation = rloo.get("steps_per_generation"), rloo.get("gradient_accumulation_steps", 1)
    if generation is not None and generation != accumulation:
        raise InputError(
            f"steps_per_generation={generation} with gradient_accumulation_steps={accumulation} would train on "
            "rollouts of an older policy",
            where="training.rloo",
            hint="Make the two equal, or remove steps_per_generation",
        )
