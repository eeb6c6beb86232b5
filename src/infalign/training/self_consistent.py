"""The self-consistent transform (M13, M17): M9 with the rank distribution of the policy as it really is, per prompt.

The optimal transform of the idealised theory is nearly flat where a real policy's mass still lies. M3 holds for any
policy, with the derivative of the win rate taken at that policy: R'(u) = h(F̂(u)) h₀(u), F̂ the distribution of
calibrated rewards of the current policy, rebuilt as training goes. Where the policy can follow, its fixed point is
M9's.

F̂ belongs to a prompt. Pooled over unlike prompts it is not the gradient, and the prompts that lead stop the others.
But a prompt comes by rarely, with a few rollouts. So F̂ of a prompt is the pooled one, which follows the policy from
step to step, plus how far the prompt's own rollouts have been from the others of their step: a long average, shrunk by
the number of rollouts behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.errors import InputError
from infalign.procedures import InferenceProcedure, procedure_from_dict
from infalign.theory.winrate import Objective
from infalign.training.rank_value import RankScale, RankTable
from infalign.training.ranked import RankedRollouts

Float = NDArray[np.float64]
Int = NDArray[np.int64]

CELLS = 1024
KNOTS: Float = (1.0 - np.cos(np.pi * np.arange(33) / 32)) / 2
"""Where a prompt's own deviation is kept: close together at the ends, where Best-of-N and Worst-of-N look."""

OWN_ROLLOUTS = 160.0
"""After so many rollouts of a prompt what came before has 1/e of its weight in the prompt's deviation."""

PRIOR_ROLLOUTS = 64.0
"""The pooled F̂ counts as much as so many rollouts of a prompt's own."""


class SelfConsistentTransform:
    """Φ for a procedure at the current policy.

    Args:
        procedure: What the policy will be used through.
        memory: Weight of the past in the pooled F̂; 0.9 averages over about ten steps.
        weight: ε in (0, 1]. Below 1 the policy in training is one part of a mixture, drawn with probability ε, and the
            reference the other: R' = h((1 − ε) u + ε F̂) h₀ (M19).

    Attributes:
        rollouts_per_step: How many rollouts make a step, for a trainer that asks for its rewards in parts or one by
            one: they are taken in when they are complete. None where every update is a step.
        cdf: F̂ over all prompts, at `edges`.

    Raises:
        InputError: If `weight` is not in (0, 1], or `memory` not in [0, 1).
    """

    label = "self-consistent"

    def __init__(self, procedure: InferenceProcedure, memory: float = 0.9, weight: float = 1.0) -> None:
        if not 0.0 < weight <= 1.0:
            raise InputError(f"weight is {weight}", where=self.label, hint="Give a share in (0, 1]")
        if not 0.0 <= memory < 1.0:
            raise InputError(f"memory is {memory}", where=self.label, hint="Give a number in [0, 1)")
        self.procedure = procedure
        self.memory = memory
        self.weight = weight
        self.rollouts_per_step: int | None = None
        self.edges: Float = np.linspace(0.0, 1.0, CELLS + 1)
        self._objective = Objective.of(procedure)
        self._scale_of_K: dict[int, RankScale] = {}
        self.restart()

    def restart(self) -> None:
        """Forget the policy: F̂ is the reference's again."""
        self.cdf: Float = self.edges.copy()
        self._own: dict[int, tuple[float, Float]] = {}  # of a prompt: weight, and weight × deviation at the knots
        self._waiting: RankedRollouts | None = None  # rollouts of a step that is not complete

    def frozen(self) -> SelfConsistentTransform:
        """A copy at the present estimate, which later updates of this one leave as it is."""
        now = copy(self)
        now._own = dict(self._own)  # everything else is replaced by an update, never changed in place
        return now

    def update(self, ranked: RankedRollouts) -> None:
        """Take in rollouts, of one step or a part of it, each spread evenly over its share of [0, 1]."""
        if self.rollouts_per_step is None:
            self._take_in(ranked)
            return
        waiting = ranked if self._waiting is None else self._waiting.followed_by(ranked)
        while len(waiting) >= self.rollouts_per_step:
            self._take_in(waiting.part(slice(0, self.rollouts_per_step)))
            waiting = waiting.part(slice(self.rollouts_per_step, None))
        self._waiting = waiting

    def _take_in(self, ranked: RankedRollouts) -> None:
        everyone = ranked.cdf(self.edges)
        at_knots = np.interp(KNOTS, self.edges, everyone)
        for prompt in np.unique(ranked.prompt_B):
            mine = ranked.part(ranked.prompt_B == prompt)
            kept = float(np.exp(-len(mine) / OWN_ROLLOUTS))
            weight, deviation = self._own.get(int(prompt), (0.0, np.zeros(len(KNOTS))))
            deviation = kept * deviation + (1.0 - kept) * (mine.cdf(KNOTS) - at_knots)
            self._own[int(prompt)] = (kept * weight + 1.0 - kept, deviation)
        self.cdf = self.memory * self.cdf + (1.0 - self.memory) * everyone

    def cdf_of(self, prompt: int | None = None) -> Float:
        """F̂ of a prompt (a row of the calibrator) at the edges; over all prompts if there is none."""
        if prompt is None or prompt not in self._own:
            return self.cdf
        weight, deviation = self._own[prompt]
        rollouts = 2.0 * OWN_ROLLOUTS * weight / (2.0 - weight)  # equally weighted ones that are as exact
        shift = rollouts / (rollouts + PRIOR_ROLLOUTS) * deviation / weight
        return np.maximum.accumulate(np.clip(self.cdf + np.interp(self.edges, KNOTS, shift), 0.0, 1.0))

    def reward(self, num_ref: int, prompt: int | None = None, level_counts: Int | None = None) -> RankTable:
        """R of every rank among K references (M17), in units of win rate; R = 0 at the lower end.

        Args:
            num_ref: K.
            prompt: The prompt, a row of the calibrator; None for all prompts together.
            level_counts: Which of its references are equal, as in `RankScale.reward`.
        """
        if num_ref not in self._scale_of_K:
            self._scale_of_K[num_ref] = RankScale.of(self._objective, num_ref, self.edges)
        mixed = (1.0 - self.weight) * self.edges + self.weight * self.cdf_of(prompt)
        return self._scale_of_K[num_ref].reward(mixed, level_counts)

    def state(self) -> dict[str, Any]:
        """What it has learnt, JSON-able: F̂, and of every prompt seen the weight and the deviation."""
        waiting = self._waiting
        return {
            "cdf": self.cdf.tolist(),
            "own": {str(prompt): [weight, *deviation.tolist()] for prompt, (weight, deviation) in self._own.items()},
            "waiting": None if waiting is None else waiting.to_lists(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            InputError: If it is of an earlier version, which kept no prompt's own distribution.
        """
        if "own" not in state:
            raise InputError("this state is of an earlier version", where=self.label, hint="Train from the start")
        self.cdf = np.array(state["cdf"])
        self._own = {int(prompt): (row[0], np.array(row[1:])) for prompt, row in state["own"].items()}
        self._waiting = None if state["waiting"] is None else RankedRollouts.from_lists(state["waiting"])

    def to_dict(self) -> dict[str, Any]:
        """What it is, JSON-able; F̂ is state, not part of it."""
        whole = {} if self.weight == 1.0 else {"weight": self.weight}
        return {"kind": self.label, "procedure": self.procedure.to_dict(), "memory": self.memory, **whole}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> SelfConsistentTransform:
        """Inverse of `to_dict`."""
        return cls(procedure_from_dict(content["procedure"]), content["memory"], content.get("weight", 1.0))
