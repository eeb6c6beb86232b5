"""The tilt that training aims at, rank by rank: Φ_K(b)/β (M6), with a floor far below what the optimum notices.

And, if asked for, a cap. A sharp tilt is carried by the few rollouts of a step that reach the highest ranks; the rest
say next to nothing. With a cap of c nats the policy aimed at has nowhere more than e^c times the reference's density,
so that a share of e^-c of the reference's own rollouts carries it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from infalign.theory.finite_k import rank_conditional_tilt
from infalign.training.rank_value import RankTable
from infalign.transforms import RewardTransform

Float = NDArray[np.float64]

FLOOR = 8.0
"""How far below log Z a tilt may lie, in nats.

The transforms of the lower end forbid bad responses by tens to thousands of nats, and one such response outweighs the
rest of a step. With the floor their share of the optimum is at most e^-FLOOR (0.0003) of their share under the
reference, which is also how far, in total variation, the optimum moves.
"""


def tilt_by_rank(transform: RewardTransform, beta: float, num_ref: int, cap: float | None = None) -> Float:
    """Φ_K(b)/β in nats for b = 0..K, none more than `FLOOR` below log Z; shape (K + 1,).

    Args:
        transform: Φ.
        beta: KL coefficient, in units of Φ per nat.
        num_ref: K.
        cap: Most nats above log Z; None for no cap.
    """
    table = rank_conditional_tilt(transform, beta, num_ref) / beta
    table = np.minimum(table, highest_under_cap(table, cap))
    return np.maximum(table, log_partition(table) - FLOOR)


def log_partition(tilt_by_rank: Float) -> float:
    """Log Z = log of the mean of exp(Φ_K(b)/β) over the ranks (M6), in nats: under the reference all are as likely."""
    return float(np.logaddexp.reduce(tilt_by_rank) - np.log(len(tilt_by_rank)))


def tilt_of_reward(reward: RankTable, beta: float, cap: float | None = None) -> RankTable:
    """R/β in nats of a self-consistent transform's rewards, none more than `FLOOR` below log Z.

    Args:
        reward: R of every rank (M17).
        beta: KL coefficient, in units of R per nat.
        cap: Most nats above log Z; None for no cap.
    """
    tilt = reward.times(1.0 / beta)
    tilt = tilt.at_most(highest_under_cap(tilt.half_cells, cap))
    return tilt.at_least(tilt.log_partition - FLOOR)


def highest_under_cap(tilt: Float, cap: float | None) -> float:
    """Where to cut a tilt so that what is left rises exactly `cap` nats above its own log Z; its top if it does not.

    Args:
        tilt: In nats, of equally likely draws of the reference, any order.
        cap: In nats; None for no cap.
    """
    lowest, highest = float(tilt.min()), float(tilt.max())
    if cap is None or highest - log_partition(tilt) <= cap:
        return highest
    # The cut less the log Z of what is left rises with the cut, from 0 at the lowest.
    for _ in range(100):
        middle = (lowest + highest) / 2
        if middle - log_partition(np.minimum(tilt, middle)) > cap:
            highest = middle
        else:
            lowest = middle
    return lowest
