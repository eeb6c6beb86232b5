"""A transform or baseline of the plan, and how it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infalign.files import plain_name
from infalign.recipe import Training
from infalign.training.methods import is_online
from infalign.training.self_consistent import SelfConsistentTransform
from infalign.transforms import Identity, RewardTransform, transform_from_dict


@dataclass(frozen=True)
class PlannedTransform:
    """A transform to align with, or a baseline, and its β at the planned KL."""

    name: str
    transform: RewardTransform | SelfConsistentTransform  # the identity for a baseline, which has none
    beta: float
    baseline: dict[str, Any] | None = None
    mixture_weight: float = 1.0  # below 1: trained inside a mixture with the reference, of which it is this share (M19)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PlannedTransform:
        """Inverse of what `plan.json` holds.

        Raises:
            InputError: If its name, which becomes a folder's, is not a plain one.
        """
        name = plain_name(content["name"], "plan.json")
        if "baseline" in content:
            return cls(name, Identity(), content["beta"], content["baseline"])
        described = content["transform"]
        own = described["kind"] == SelfConsistentTransform.label
        transform = SelfConsistentTransform.from_dict(described) if own else transform_from_dict(described)
        return cls(name, transform, content["beta"], mixture_weight=content.get("mixture_weight", 1.0))

    @property
    def reshaped_name(self) -> str:
        """Name of its reshaped policy in tables; that of a model trained inside a mixture already says so."""
        return self.name if self.mixture_weight < 1.0 else f"{self.name}-reshaped"

    @property
    def trained_weight(self) -> float | None:
        """The model's share during its training inside a mixture; None where it was trained to be used alone."""
        return None if self.mixture_weight == 1.0 else self.mixture_weight

    def trains_online(self, solver: str) -> bool:
        """Whether it is trained by the online solver, where the recipe's transforms use `solver`."""
        return solver == "online" if self.baseline is None else is_online(self.baseline)

    def training_settings(self, training: Training) -> dict[str, Any]:
        """The settings that decide what its training gives."""
        if self.trains_online(training.solver):
            # Trainings of before there was a cap are those without one.
            unused = {"save_steps", "solver", "refresh_every", "offline", "mixture"}
            settings = training.model_dump(exclude=unused if training.tilt_cap else unused | {"tilt_cap"})
            return settings if self.mixture_weight == 1.0 else settings | {"mixture_weight": self.mixture_weight}
        shared = {
            "steps",
            "prompts_per_step",
            "num_generations",
            "learning_rate",
            "lora",
            "keep_checkpoints",
            "offline",
        }
        if self.baseline is None:
            shared |= {"solver", "refresh_every"} if training.solver == "mixed" else {"solver"}
        return training.model_dump(include=shared)
