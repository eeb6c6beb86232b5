"""Unbiased estimates, with honest errors, of what an aligned policy achieves (M10, M11); functions of arrays."""

from infalign.estimators.clustered import (
    Difference,
    Estimate,
    difference_estimate,
    holm,
    mean_estimate,
    paired_difference,
    share_estimate,
)
from infalign.estimators.divergence import KLEfficiency, efficiency_of, kl_efficiency, moved, sequence_kl, useful_kl
from infalign.estimators.subsets import WinRate, expected_reward, win_rate, win_rates

__all__ = [
    "Difference",
    "Estimate",
    "KLEfficiency",
    "WinRate",
    "difference_estimate",
    "efficiency_of",
    "expected_reward",
    "holm",
    "kl_efficiency",
    "mean_estimate",
    "moved",
    "paired_difference",
    "sequence_kl",
    "share_estimate",
    "useful_kl",
    "win_rate",
    "win_rates",
]
