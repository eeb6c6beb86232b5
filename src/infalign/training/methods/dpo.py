"""Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) on best-and-worst pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from infalign.calibration.calibrator import RewardCalibrator
from infalign.calibration.combined import CombinedCalibrator
from infalign.training.losses import Examples, OfflineLoss
from infalign.training.methods._pairs import PairComparator, best_and_worst, lead
from infalign.training.methods.base import comparator, group_size, positive

if TYPE_CHECKING:
    import torch

    from infalign.training.pool import RolloutPool


@dataclass(frozen=True)
class DPO:
    """The loss.

    Where preferences follow Bradley and Terry's model of a reward r the optimum is p·exp(r/β)/Z. Here the better one
    always wins, and there is no optimum: the margin grows with training, which the number of steps and a KL budget
    bound.

    Attributes:
        beta: β.
        n: Size of the groups that the best and the worst are taken from.
    """

    beta: float = 0.1
    n: int = 2
    label: str = "dpo"
    any_distribution: bool = False

    def examples(self, pool: RolloutPool) -> Examples:
        """Best and worst of every n."""
        return best_and_worst(pool, self.n)

    def __call__(self, log_ratios_NM: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """−log σ(β (log-ratio of the best − log-ratio of the worst))."""
        from torch.nn.functional import logsigmoid

        return -logsigmoid(self.beta * lead(log_ratios_NM))


@comparator
class DPOMethod(PairComparator):
    """DPO on the best and the worst of every `n` stored rollouts, at its own `beta`."""

    kind = "dpo"
    SETTINGS: ClassVar = {"beta": positive(DPO.beta), "n": group_size(DPO.n)}

    def beta_for_kl(self, kl: float, calibrator: RewardCalibrator | CombinedCalibrator | None = None) -> float:
        """Its own: on pairs that are always won there is no optimum, and the KL depends on training."""
        return self.settings["beta"]

    def loss(self, beta: float, solver: str) -> OfflineLoss:
        """The loss."""
        return DPO(beta, self.settings["n"])
