"""The limit beside a measurement: for the reward levels as they are, where ties lower it by enough to matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from infalign.evaluation.results import MethodResult, TiedLimit
from infalign.procedures import InferenceProcedure
from infalign.theory.envelope import Envelope
from infalign.theory.levels import LevelOptima, level_masses
from infalign.theory.plan import limit
from infalign.theory.winrate import Objective

LEAST_TIES = 0.01
"""With a smaller share of tied pairs among the reference's responses the limit is taken as if there were none."""

LEAST_DIFFERENCE = 0.005
"""Ties that lower the limit by less, half a point, are not taken into account."""

_POINTS = 40


@dataclass(frozen=True)
class LimitAt:
    """The limit at one KL.

    Attributes:
        win_rate: Its value, with ties where they matter.
        slope: Its slope there, per nat.
        without_ties: What it would be for a continuous reward.
        tied: The curve with ties, where they matter.
    """

    win_rate: float
    slope: float
    without_ties: float
    tied: TiedLimit | None = None


def ref_levels(ref_rewards_PK: np.ndarray) -> np.ndarray | None:
    """The reference's reward levels, (P, L) masses; None if hardly any of its responses are tied."""
    num_ref = ref_rewards_PK.shape[1]
    ordered = np.sort(ref_rewards_PK, axis=1)
    tied = sum(
        float((counts * (counts - 1)).sum()) for counts in (np.unique(row, return_counts=True)[1] for row in ordered)
    )
    if num_ref < 2 or tied / (ordered.shape[0] * num_ref * (num_ref - 1)) < LEAST_TIES:
        return None
    return level_masses(ref_rewards_PK)


def limit_at(procedure: InferenceProcedure, kl: float, levels: np.ndarray | None) -> LimitAt:
    """The limit at a measured KL.

    Args:
        procedure: What policy and reference are used with.
        kl: In nats, above 0.
        levels: From `ref_levels`.
    """
    kls = kl * np.array([0.99, 1.0, 1.01])
    below, without, above = (float(value) for value in limit(procedure, kls))
    if levels is not None:
        envelope = Envelope(LevelOptima(Objective.of(procedure), levels))
        best, slope = envelope.value_and_slope(kl)
        if without - best > LEAST_DIFFERENCE:
            reach = max(envelope.optima.end[0] if envelope.optima.end else kl, kl)
            curve = reach * np.linspace(0.0, 1.0, _POINTS) ** 2
            tied = TiedLimit(curve.tolist(), [envelope.win_rate(float(point)) for point in curve])
            return LimitAt(best, slope, without, tied)
    return LimitAt(without, (above - below) / (0.02 * kl), without)


def tie_notes(results: Sequence[MethodResult], labels: Sequence[str]) -> list[str]:
    """What to say beside a limit where rewards tie.

    Args:
        results: Methods.
        labels: Procedures whose limits are shown.
    """
    entries = [(result, result.of(label)) for result in results for label in labels]
    notes: list[str] = []
    tied = [entry for _, entry in entries if entry.tied_limit is not None and entry.limit_without_ties is not None]
    if tied:
        least = max(tied, key=lambda entry: (entry.limit_without_ties or 0.0) - (entry.limit or 0.0))
        notes.append(
            f"The limit of {', '.join(dict.fromkeys(entry.procedure for entry in tied))} is that for the reward levels "
            f"as they are; without ties it would be up to {100 * (least.limit_without_ties or 0.0):.1f}%."
        )
    unknown = [
        result
        for result, entry in entries
        if result.tie_share > 0.05 and entry.limit is not None and entry.limit_without_ties is None
    ]
    if unknown:
        notes.append(
            f"The limit assumes no ties and may be far too high here ({unknown[0].tie_share:.0%} of the pairs tie); "
            "evaluate again for the limit with ties."
        )
    return notes
