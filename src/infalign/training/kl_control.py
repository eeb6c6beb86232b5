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

    Sometimes β is not what limits the KL: at a sharp tilt one or two rollouts of a step carry all of it, and a smaller
    β leaves fewer still. So whenever β has come down by `trial`, the KL is looked at. Where it has not answered, rising
    by at least trial^answer, β is put back to where it was and goes no lower for a while, twice as long each time.

    Attributes:
        kl_budget: Target of the sequence KL, in nats.
        beta: Current coefficient, in units of Φ per nat.
        gain: Change of log β per unit of log(expected KL / budget).
        clip: Largest |log(expected KL / budget)| acted upon.
        memory: Weight of the past in the moving averages of measured KL and of its trend.
        lead: Steps to look ahead.
        patience: Steps before β is first changed.
        span: Largest factor between β and where it started.
        trial: Factor by which β comes down before the KL must have answered.
        answer: Least change of log KL per change of log(1/β) that counts as an answer.
        kl: Moving average of the measured KL, bias-corrected, in nats.
        trend: Moving average of its change per step.
        start_beta: β at the first step.
        step: Steps seen.
        hold: Steps for which β goes no lower, the next time it is put back.
        note: What to tell the user about a KL that did not answer; empty otherwise.
    """

    kl_budget: float
    beta: float
    gain: float = 0.05
    clip: float = 1.0
    memory: float = 0.7
    lead: float = 10.0
    patience: int = 8
    span: float = 6.0
    trial: float = 2.0
    answer: float = 0.4
    kl: float = 0.0
    trend: float = 0.0
    start_beta: float = 0.0
    step: int = 0
    hold: int = 40
    note: str = ""
    _mark_beta: float = 0.0  # where the trial began: β, KL and step
    _mark_kl: float = 0.0
    _mark_step: int = 0
    _back_to: float = 0.0  # the β to go back to: before the trial, and what came down with no trial before it
    _held_until: int = 0
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
            beta = self.start_beta * math.exp(max(-bound, min(bound, log_ratio)))
            self.beta = self._if_answered(beta)
        self.step += 1
        return self.beta

    def _if_answered(self, beta: float) -> float:
        """The β asked for, or the one before it came down where that did not raise the KL."""
        settling = self.step < self.patience + 2 * self.lead  # the KL grows from 0, whatever β is
        if self.step < self._held_until:
            beta = max(beta, self._back_to)
        if settling or beta >= self._mark_beta:
            self._begin_trial(beta, max(beta, self._back_to or self.start_beta) if settling else beta)
        elif beta <= self._mark_beta / self.trial and self.step - self._mark_step >= 2 * self.lead:
            # Log-ratios of a policy that has hardly moved are noise: its KL counts as a twentieth of the budget.
            least = 0.05 * self.kl_budget
            ahead = self.kl + self.lead * max(self.trend, 0.0)  # an answer may be on its way
            if max(ahead, least) < max(self._mark_kl, least) * self.trial**self.answer:
                self.note = (
                    f"bringing beta down from {self._mark_beta:.3g} to {beta:.3g} did not raise the KL "
                    f"({self._mark_kl:.2f} before, {self.kl:.2f} nats after), so it was put back to "
                    f"{self._back_to:.3g}: not beta but the training holds the policy. More rollouts per step, a "
                    "training.tilt_cap, more steps or a higher learning rate may help"
                )
                beta = self._back_to
                self._held_until, self.hold = self.step + self.hold, 2 * self.hold
            self._begin_trial(beta, beta)
        return beta

    def _begin_trial(self, beta: float, back_to: float) -> None:
        self._mark_beta, self._mark_kl, self._mark_step, self._back_to = beta, self.kl, self.step, back_to

    @property
    def verdict(self) -> str:
        """What to tell the user at the end, empty if β did what it should: it is at its bound, or had no effect."""
        if self.beta < 1.01 * self.start_beta / self.span:
            return (
                f"beta came down from the planned {self.start_beta:.3g} as far as it may, to {self.beta:.3g}, and the "
                f"KL is at {self.kl:.2f} of {self.kl_budget:g} nats: the plan does not fit this policy. More steps, a "
                "higher learning rate or a smaller kl_budget may help"
            )
        return self.note

    def state(self) -> dict[str, Any]:
        """Everything needed to go on from here, JSON-able."""
        return asdict(self)
