"""Alignment with the self-consistent transform (M13, M17), which follows the policy's own rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from infalign.calibration.calibrator import RewardCalibrator
from infalign.calibration.combined import CombinedCalibrator
from infalign.errors import InputError
from infalign.theory.plan import optimum_at_kl
from infalign.training.losses import OfflineLoss, Regression
from infalign.training.methods.calibrated import TransformMethod
from infalign.training.self_consistent import SelfConsistentTransform


class SelfConsistentMethod(TransformMethod[SelfConsistentTransform]):
    """The derivative of the win rate at the policy as it is."""

    SOLVERS: ClassVar = ("online", "mixed")  # those that draw rollouts of the policy

    def beta_for_kl(self, kl: float, calibrator: RewardCalibrator | CombinedCalibrator | None = None) -> float:
        """That of the optimum (M9) with this KL, its fixed point."""
        return optimum_at_kl(self.transform.procedure, kl).beta

    def loss(self, beta: float, solver: str) -> OfflineLoss:
        """Regression on targets that follow the policy.

        Raises:
            InputError: If the solver has no rollouts of the policy.
        """
        if solver not in self.SOLVERS:
            raise InputError(
                f"the self-consistent transform follows the policy's own rollouts, which {solver} does not have",
                where="training.solver",
                hint="Use transform: optimal, or solver: online or mixed",
            )
        return Regression(self.transform, beta)

    @classmethod
    def from_dict(cls, name: str, described: Mapping[str, Any]) -> SelfConsistentMethod:
        """Inverse of `described`."""
        return cls(name, SelfConsistentTransform.from_dict(described))
