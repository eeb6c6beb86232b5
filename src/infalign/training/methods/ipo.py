"""IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17) on best-and-worst pairs, with sums over whole sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from infalign.calibration.calibrator import RewardCalibrator
from infalign.calibration.combined import CombinedCalibrator
from infalign.theory.alternatives import tilt_at_kl
from infalign.training.losses import Examples, OfflineLoss, squared_residual
from infalign.training.methods._pairs import PairComparator, best_and_worst, lead
from infalign.training.methods.base import comparator, group_size, positive
from infalign.transforms import Identity

if TYPE_CHECKING:
    import torch

    from infalign.training.pool import RolloutPool


@dataclass(frozen=True)
class IPO:
    """The loss. On pairs of independent draws (n = 2) the optimum is p·exp(C/τ)/Z: calibrated RLHF at β = τ.

    Attributes:
        beta: The paper's τ.
        n: Size of the groups that the best and the worst are taken from.
    """

    beta: float = 0.1
    n: int = 2
    label: str = "ipo"
    any_distribution: bool = False

    def examples(self, pool: RolloutPool) -> Examples:
        """Best and worst of every n; the target is 1/(2τ)."""
        return best_and_worst(pool, self.n, target=0.5 / self.beta)

    def __call__(self, log_ratios_NM: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """(log-ratio of the best − log-ratio of the worst − 1/(2τ))²."""
        return squared_residual(lead(log_ratios_NM), targets_N)


@comparator
class IPOMethod(PairComparator):
    """IPO on the best and the worst of every `n` stored rollouts, at `beta` or at that of the KL."""

    kind = "ipo"
    SETTINGS: ClassVar = {"beta": positive(None), "n": group_size(IPO.n)}

    def beta_for_kl(self, kl: float, calibrator: RewardCalibrator | CombinedCalibrator | None = None) -> float:
        """Its own if it has one; otherwise that of the identity, whose optimum on pairs is near."""
        own = self.settings["beta"]
        return float(tilt_at_kl(Identity(), kl).beta if own is None else own)

    def loss(self, beta: float, solver: str) -> OfflineLoss:
        """The loss."""
        return IPO(beta, self.settings["n"])
