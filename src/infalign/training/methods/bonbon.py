"""BoNBoN (Gui et al. 2024, arXiv 2406.00832): imitate the best of n, and put the worst of n as far behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from infalign.calibration.calibrator import RewardCalibrator
from infalign.calibration.combined import CombinedCalibrator
from infalign.training.losses import Examples, OfflineLoss
from infalign.training.methods._pairs import PairComparator
from infalign.training.methods.base import comparator, group_size, share
from infalign.training.methods.ipo import IPO

if TYPE_CHECKING:
    import torch

    from infalign.training.pool import RolloutPool


@dataclass(frozen=True)
class BoNBoN:
    """The loss.

    α times maximum likelihood on the best of n, and 1 − α times an IPO loss whose target is the expected difference of
    log-ratios, under Best-of-n, between the best and the worst of n: (n − 1) Σ_{k<n} 1/k.

    Attributes:
        n: The n of Best-of-n.
        alpha: Share of the likelihood part.
    """

    n: int = 4
    alpha: float = 0.005
    label: str = "bonbon"
    any_distribution: bool = False

    @property
    def beta(self) -> float:
        """The β of the IPO part: 1 / (2 (n − 1) Σ_{k<n} 1/k)."""
        return 0.5 / ((self.n - 1) * sum(1.0 / k for k in range(1, self.n)))

    @property
    def ipo(self) -> IPO:
        """The IPO part."""
        return IPO(self.beta, self.n)

    def examples(self, pool: RolloutPool) -> Examples:
        """Best and worst of every n; the target is that of the IPO part."""
        return self.ipo.examples(pool)

    def __call__(self, log_ratios_NM: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """−α (log π − log p of the best) + (1 − α) (difference − target)²."""
        return -self.alpha * log_ratios_NM[:, 0] + (1.0 - self.alpha) * self.ipo(log_ratios_NM, targets_N)


@comparator
class BoNBoNMethod(PairComparator):
    """BoNBoN on stored rollouts; its β comes from n."""

    kind = "bonbon"
    SETTINGS: ClassVar = {"n": group_size(BoNBoN.n), "alpha": share(BoNBoN.alpha)}

    def beta_for_kl(self, kl: float, calibrator: RewardCalibrator | CombinedCalibrator | None = None) -> float:
        """That of its IPO part; the KL depends on training."""
        return self._loss.beta

    def loss(self, beta: float, solver: str) -> OfflineLoss:
        """The loss."""
        return self._loss

    @property
    def _loss(self) -> BoNBoN:
        return BoNBoN(self.settings["n"], self.settings["alpha"])
