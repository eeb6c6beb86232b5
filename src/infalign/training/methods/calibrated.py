"""Alignment with a transform of calibrated rewards: identity, exponential, optimal, or one from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from infalign.calibration.calibrator import RewardCalibrator
from infalign.calibration.combined import CombinedCalibrator
from infalign.procedures import InferenceProcedure
from infalign.theory.alternatives import tilt_at_kl
from infalign.training.losses import OfflineLoss, Regression, WeightedLikelihood
from infalign.training.methods.base import Method
from infalign.training.self_consistent import SelfConsistentTransform
from infalign.transforms import RewardTransform, transform_from_dict

if TYPE_CHECKING:
    from infalign.rewards.source import RewardSource
    from infalign.training.reward import TransformedReward


Transform = TypeVar("Transform", bound=RewardTransform | SelfConsistentTransform)


class TransformMethod(Method, Generic[Transform]):
    """A transform of calibrated rewards, trained by the recipe's solver.

    Args:
        name: The recipe's name for it.
        transform: Φ.
    """

    def __init__(self, name: str, transform: Transform) -> None:
        self.name, self.label, self.transform = name, transform.label, transform

    @property
    def described(self) -> dict[str, Any]:
        """The transform."""
        return self.transform.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Its part of an entry in `plan.json`."""
        return {"transform": self.described}

    def solved_by(self, solver: str) -> str:
        """The recipe's solver."""
        return solver

    def deciding_settings(self, solver: str) -> frozenset[str]:
        """Names of the recipe's training settings that decide its result."""
        found = super().deciding_settings(solver)
        if solver == "online":
            return found
        return found | ({"solver", "refresh_every"} if solver == "mixed" else {"solver"})

    def reward(
        self,
        source: RewardSource,
        calibrator: RewardCalibrator | CombinedCalibrator,
        prompt_ids: Sequence[str],
        beta: float,
        *,
        procedure: InferenceProcedure | None = None,
        mixture_weight: float = 1.0,
    ) -> TransformedReward:
        """Φ_K(b)/β (M6, M17)."""
        from infalign.training.reward import TransformedReward

        return TransformedReward(
            source, calibrator, prompt_ids, self.transform, beta, procedure=procedure, mixture_weight=mixture_weight
        )


class CalibratedMethod(TransformMethod[RewardTransform]):
    """A transform that stays as it is; arguments as for `TransformMethod`."""

    def __init__(self, name: str, transform: RewardTransform) -> None:
        super().__init__(name, transform)
        self.aim = transform

    def beta_for_kl(self, kl: float, calibrator: RewardCalibrator | CombinedCalibrator | None = None) -> float:
        """The β at which the tilt has this KL (M7), in theory."""
        return tilt_at_kl(self.transform, kl).beta

    def loss(self, beta: float, solver: str) -> OfflineLoss:
        """Weighted likelihood, or for every other solver regression."""
        return (WeightedLikelihood if solver == "weighted-likelihood" else Regression)(self.transform, beta)

    @classmethod
    def from_dict(cls, name: str, described: Mapping[str, Any]) -> CalibratedMethod:
        """Inverse of `described`."""
        return cls(name, transform_from_dict(dict(described)))
