"""An entry of the plan: a method, and how it is trained in this run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infalign._io.files import plain_name
from infalign.run.recipe import Training
from infalign.training.methods import Method, method_from_dict


@dataclass(frozen=True)
class PlannedMethod:
    """A method to align with, and its β at the planned KL."""

    name: str
    method: Method
    beta: float
    mixture_weight: float = 1.0  # below 1: trained inside a mixture with the reference, of which it is this share (M19)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PlannedMethod:
        """Inverse of what `plan.json` holds.

        Raises:
            InputError: If its name, which becomes a folder's, is not a plain one.
        """
        name = plain_name(content["name"], "plan.json")
        return cls(name, method_from_dict(content), content["beta"], content.get("mixture_weight", 1.0))

    @property
    def reshaped_name(self) -> str:
        """Name of its reshaped policy in tables; that of a model trained inside a mixture already says so."""
        return self.name if self.mixture_weight < 1.0 else f"{self.name}-reshaped"

    @property
    def trained_weight(self) -> float | None:
        """The model's share during its training inside a mixture; None where it was trained to be used alone."""
        return None if self.mixture_weight == 1.0 else self.mixture_weight

    def training_settings(self, training: Training) -> dict[str, Any]:
        """The settings that decide what its training gives."""
        settings = training.model_dump(include=set(self.method.deciding_settings(training.solver)))
        if settings.get("tilt_cap", 0.0) is None:  # trainings of before there was a cap are those without one
            del settings["tilt_cap"]
        return settings if self.mixture_weight == 1.0 else settings | {"mixture_weight": self.mixture_weight}
