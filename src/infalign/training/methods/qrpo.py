"""Quantile Reward Policy Optimization as published (Matrenok et al. 2025, arXiv 2507.08068)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from infalign.calibration.calibrator import RewardCalibrator
from infalign.calibration.combined import CombinedCalibrator
from infalign.theory.alternatives import tilt_at_kl
from infalign.training.losses import Examples, OfflineLoss, single_examples, squared_residual
from infalign.training.methods.base import Comparator, comparator
from infalign.transforms import Identity

if TYPE_CHECKING:
    import torch

    from infalign.training.pool import RolloutPool


@dataclass(frozen=True)
class QRPO:
    """The loss.

    The quantile is the share of the K references that a reward is at least equal to, the rollout itself among them;
    log Z = log β + 1/β is that of K = ∞, simplified (eq. 11). Our `Regression` with the identity leaves the rollout out
    of its own comparison and knows the normaliser for finite K.
    """

    beta: float
    label: str = "qrpo"
    any_distribution: bool = False  # the quantile counts the rollout itself among the references

    def examples(self, pool: RolloutPool) -> Examples:
        """Each rollout by itself."""
        quantile_R = (pool.ranks_R + pool.ties_R / 2.0 + 1.0) / (pool.num_ref_R + 1.0)
        return single_examples(quantile_R / self.beta - np.log(self.beta) - 1.0 / self.beta)

    def __call__(self, log_ratios_NM: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """(quantile − β log Z − β (log π − log p))², over β²: nats²."""
        return squared_residual(log_ratios_NM[:, 0], targets_N)


@comparator
class QRPOMethod(Comparator):
    """QRPO on stored rollouts."""

    kind = "qrpo"
    online = False
    aim = Identity()  # its optimum is near that of the identity

    def beta_for_kl(self, kl: float, calibrator: RewardCalibrator | CombinedCalibrator | None = None) -> float:
        """That of the identity, whose optimum is near."""
        return float(tilt_at_kl(Identity(), kl).beta)

    def loss(self, beta: float, solver: str) -> OfflineLoss:
        """The loss."""
        return QRPO(beta)
