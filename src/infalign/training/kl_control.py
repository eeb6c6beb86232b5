"""Steer the KL coefficient so that training ends at a KL budget.

The theory's map from β to KL holds for an idealised policy; a real one, trained for a finite number of steps, lands
elsewhere. So β follows the *measured* sequence KL.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from infalign.errors import InputError


@dataclass
class KLController:
    """Control of log β on the log of the KL that is to be expected some steps ahead, by its trend, over the budget.

    The policy answers to β with a lag and at a limited pace: without looking ahead β would overshoot, and so would the
    KL. β changes by at most a factor exp(gain · clip) per step, only after the first steps have shown a trend, and
    stays within `span` of where it started, so that a policy which cannot reach the budget does not drive β to zero.

    Attributes:
        kl_budget: Target of the sequence KL, in nats.
        beta: Current coefficient, in units of Φ per nat.
        gain: Change of log β per unit of log(expected KL / budget).
        clip: Largest |log(expected KL / budget)| acted upon.
        memory: Weight of the past in the moving averages of measured KL and of its trend.
        lead: Steps to look ahead.
        patience: Steps before β is first changed.
        span: Largest factor between β and where it started.
        kl: Moving average of the measured KL, bias-corrected, in nats.
        trend: Moving average of its change per step.
        start_beta: β at the first step.
        step: Steps seen.
    """

    kl_budget: float
    beta: float
    gain: float = 0.05
    clip: float = 1.0
    memory: float = 0.7
    lead: float = 10.0
    patience: int = 8
    span: float = 6.0
    kl: float = 0.0
    trend: float = 0.0
    start_beta: float = 0.0
    step: int = 0
    _sum: float = 0.0
    _weight: float = 0.0

    @classmethod
    def of(cls, kl_budget: float, beta: float, steps: int) -> KLController:
        """For a training of so many steps: slow enough that β can cross its span about once.

        With a gain of 0.05 the KL of a policy that answers ten steps late never comes to rest (simulated in the tests).
        """
        return cls(kl_budget, beta, gain=min(cls.gain, 2.5 / steps))

    def __post_init__(self) -> None:
        """Check the budget and remember the starting point."""
        if not (math.isfinite(self.kl_budget) and self.kl_budget > 0):
            raise InputError(f"the KL budget must be a positive number of nats, not {self.kl_budget}")
        self.start_beta = self.start_beta or self.beta

    def update(self, measured_kl: float) -> float:
        """Take in the KL measured on one step's rollouts (nats) and return the β of the next step."""
        self._sum = self.memory * self._sum + (1 - self.memory) * measured_kl
        self._weight = self.memory * self._weight + (1 - self.memory)
        before, self.kl = self.kl, self._sum / self._weight
        if self.step > 0:
            self.trend = self.memory * self.trend + (1 - self.memory) * (self.kl - before)
        if self.step >= self.patience:
            expected = max(self.kl + self.lead * self.trend, 0.05 * self.kl_budget)
            error = max(-self.clip, min(self.clip, math.log(expected / self.kl_budget)))
            bound = math.log(self.span)
            log_ratio = math.log(self.beta / self.start_beta) + self.gain * error
            self.beta = self.start_beta * math.exp(max(-bound, min(bound, log_ratio)))
        self.step += 1
        return self.beta

    def state(self) -> dict[str, Any]:
        """Everything needed to go on from here, JSON-able."""
        return asdict(self)
