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
    """Control of log β on the log of expected KL over a target that ramps up to the budget.

    The policy answers to β with a lag, so what counts is the KL expected `lead` steps ahead, by the trend; without that
    β overshoots. The ramp gives the policy time to move along the frontier instead of racing to the budget and being
    pulled back. β changes by at most a factor exp(gain · clip) per step and stays within `span` of where it started, so
    that a policy which cannot reach the budget does not drive β to zero.

    Attributes:
        kl_budget: Target of the sequence KL, in nats.
        beta: Current coefficient, in units of Φ per nat.
        total_steps: Steps of the whole training.
        ramp: Share of the steps in which the target rises to the budget, as the square of time: the KL of a policy that
            moves at a steady pace.
        gain: Change of log β per unit of log(KL / target).
        clip: Largest |log(KL / target)| acted upon.
        memory: Weight of the past in the moving averages of measured KL and of its trend.
        lead: Steps to look ahead.
        span: Largest factor between β and where it started.
        kl: Moving average of the measured KL, bias-corrected, in nats.
        trend: Moving average of its change per step.
    """

    kl_budget: float
    beta: float
    total_steps: int
    ramp: float = 0.5
    gain: float = 0.15
    clip: float = 0.7
    memory: float = 0.7
    lead: float = 5.0
    span: float = 100.0
    kl: float = 0.0
    trend: float = 0.0
    start_beta: float = 0.0
    step: int = 0
    _sum: float = 0.0
    _weight: float = 0.0

    def __post_init__(self) -> None:
        """Check the budget and remember the starting point."""
        if not (math.isfinite(self.kl_budget) and self.kl_budget > 0):
            raise InputError(f"the KL budget must be a positive number of nats, not {self.kl_budget}")
        self.start_beta = self.start_beta or self.beta

    @property
    def target(self) -> float:
        """The KL aimed at in this step, in nats."""
        return self.kl_budget * min(1.0, (self.step + 1) / max(1.0, self.ramp * self.total_steps)) ** 2

    def update(self, measured_kl: float) -> float:
        """Take in the KL measured on one step's rollouts (nats) and return the β of the next step."""
        self._sum = self.memory * self._sum + (1 - self.memory) * measured_kl
        self._weight = self.memory * self._weight + (1 - self.memory)
        before, self.kl = self.kl, self._sum / self._weight
        if self.step > 0:
            self.trend = self.memory * self.trend + (1 - self.memory) * (self.kl - before)
        expected = self.kl + self.lead * self.trend
        error = math.log(max(expected, 0.05 * self.target) / self.target)
        change = self.gain * max(-self.clip, min(self.clip, error))
        bound = math.log(self.span)
        log_ratio = max(-bound, min(bound, math.log(self.beta / self.start_beta) + change))
        self.beta = self.start_beta * math.exp(log_ratio)
        self.step += 1
        return self.beta

    def state(self) -> dict[str, Any]:
        """Everything needed to go on from here, JSON-able."""
        return asdict(self)
