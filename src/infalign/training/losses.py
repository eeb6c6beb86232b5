"""What an offline loss is: which rollouts it looks at together, and a number for each such example.

The two solvers of M2's objective are here; those of comparators are in `methods/`. Losses are functions of log-ratios
log π(y|x) − log p(y|x) of whole sequences, in nats; sums, never means over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from infalign.training.pool import Float, Int, RolloutPool, log_weights
from infalign.training.self_consistent import SelfConsistentTransform
from infalign.transforms import RewardTransform

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Examples:
    """N examples of M rollouts each: M = 1 for pointwise losses, 2 for the best and the worst of a group.

    Attributes:
        rollouts_NM: Rows of the pool.
        targets_N: What the loss compares with, in nats; each loss says what.
        weights_N: Weight of each example in the mean.
    """

    rollouts_NM: Int  # noqa: N815
    targets_N: Float  # noqa: N815
    weights_N: Float  # noqa: N815


class OfflineLoss(Protocol):
    """A loss on stored rollouts."""

    @property
    def label(self) -> str:
        """A short name."""
        ...

    @property
    def beta(self) -> float:
        """KL coefficient, in units of what is maximised per nat."""
        ...

    @property
    def any_distribution(self) -> bool:
        """Whether rollouts of any policy have the same optimum; otherwise they must be draws of the reference."""
        ...

    def examples(self, pool: RolloutPool) -> Examples:
        """The examples of a pool."""
        ...

    def __call__(self, log_ratios_NM: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """Loss of each example, shape (N,)."""
        ...


@dataclass(frozen=True)
class Regression:
    """Pointwise regression of the log-ratio on Φ_K(b)/β − log Z, with Z known (M6).

    The optimum of M2 has zero residual on *every* response (M12), so rollouts of any distribution serve: stored ones,
    fresh ones, or both. For the identity this is QRPO (Matrenok et al. 2025, arXiv 2507.08068) with the finite-K
    normaliser instead of the one for K = ∞.
    """

    transform: RewardTransform | SelfConsistentTransform
    beta: float
    label: str = "offline-regression"
    any_distribution: bool = True

    def examples(self, pool: RolloutPool) -> Examples:
        """Each rollout by itself; the target is what its log-ratio is at the optimum."""
        return single_examples(log_weights(pool, self.transform, self.beta))

    def __call__(self, log_ratios_NM: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """(Φ_K/β − log Z − (log π − log p))², nats²."""
        return squared_residual(log_ratios_NM[:, 0], targets_N)


@dataclass(frozen=True)
class WeightedLikelihood:
    """Maximum likelihood with weights exp(Φ_K(b)/β)/Z: the forward KL to the optimum of M2.

    The weights of a prompt's stored rollouts have mean 1 exactly, so they are also the self-normalised ones. Only
    draws of the reference will do, and with few of them the policy learns their noise: rare responses of large weight.
    """

    transform: RewardTransform
    beta: float
    label: str = "weighted-likelihood"
    any_distribution: bool = False

    def examples(self, pool: RolloutPool) -> Examples:
        """Each rollout by itself, with its weight."""
        weights_N = np.exp(log_weights(pool, self.transform, self.beta))
        return Examples(np.arange(len(pool))[:, None], np.zeros(len(pool)), weights_N)

    def __call__(self, log_ratios_NM: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """−(log π − log p), nats: −log π but for a constant."""
        return -log_ratios_NM[:, 0]


@dataclass(frozen=True)
class Likelihood:
    """Maximum likelihood on rollouts of another policy: distillation of that policy into this one."""

    label: str = "likelihood"
    beta: float = 0.0
    any_distribution: bool = False

    def examples(self, pool: RolloutPool) -> Examples:
        """Each rollout by itself."""
        return single_examples(np.zeros(len(pool)))

    def __call__(self, log_ratios_NM: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        """−(log π − log p), nats: −log π but for a constant."""
        return -log_ratios_NM[:, 0]


def single_examples(targets_N: NDArray[np.float64]) -> Examples:
    """Every rollout of a pool by itself, with equal weights."""
    return Examples(np.arange(len(targets_N))[:, None], targets_N, np.ones(len(targets_N)))


def squared_residual(values_N: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """(target − value)²."""
    return (targets_N - values_N).square()
