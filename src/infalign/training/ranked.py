"""How one step's rollouts stand among their prompts' references, and what that says about the procedure's win rate.

Rewards and references are compared once; what a rollout is paid, what is logged and what a self-consistent transform
learns all come from that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign._io.processes import gathered
from infalign.procedures import InferenceProcedure

Float = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RankedRollouts:
    """B rollouts compared with the references of their prompts.

    Attributes:
        prompt_B: Row of the calibrator that each rollout's prompt has.
        below_B: How many references each beats.
        equal_B: How many it equals.
        num_ref_B: K of its prompt.
        rank_B: Its rank in 0..K by the calibrator's tie rule.
        tied_B: With how many references it shares that rank: `equal_B` with mid-ranks, 0 where the rule resolves ties.
        raw_B: The rewards that were compared; of M sources together shape (B, M). None where they are not kept.
    """

    prompt_B: NDArray[np.int64]  # noqa: N815
    below_B: NDArray[np.int64]  # noqa: N815
    equal_B: NDArray[np.int64]  # noqa: N815
    num_ref_B: NDArray[np.int64]  # noqa: N815
    rank_B: Float  # noqa: N815
    tied_B: NDArray[np.int64]  # noqa: N815
    raw_B: Float | None = None  # noqa: N815

    def __len__(self) -> int:
        return len(self.prompt_B)

    @property
    def first_B(self) -> NDArray[np.int64]:  # noqa: N802
        """The lowest of the ranks that each one shares with the references it ties with."""
        return np.rint(self.rank_B - self.tied_B / 2).astype(np.int64)

    def part(self, which: Any) -> RankedRollouts:
        """Some of them, by a slice or a mask."""
        return RankedRollouts(**{name: array[which] for name, array in self._arrays().items()})

    def followed_by(self, more: RankedRollouts) -> RankedRollouts:
        """These, then more; raw rewards are kept where both have them."""
        first, second = self._arrays(), more._arrays()
        return RankedRollouts(**{name: np.concatenate([first[name], second[name]]) for name in first if name in second})

    def _arrays(self) -> dict[str, NDArray[Any]]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: array for name, array in found.items() if array is not None}

    def cdf(self, at_U: Float) -> Float:
        """Their distribution over [0, 1], each spread evenly over the `tied` + 1 cells of K + 1 that it fills."""
        cells_BU = at_U[None, :] * (self.num_ref_B[:, None] + 1.0) - self.first_B[:, None]
        return np.clip(cells_BU / (self.tied_B[:, None] + 1.0), 0.0, 1.0).mean(axis=0)

    def to_lists(self) -> dict[str, list[Any]]:
        """How they rank, JSON-able; without the raw rewards."""
        return {name: array.tolist() for name, array in self._arrays().items() if name != "raw_B"}

    @classmethod
    def from_lists(cls, content: Mapping[str, Any]) -> RankedRollouts:
        """Inverse of `to_lists`."""
        kinds = {"rank_B": np.float64}  # the others are counts
        arrays: dict[str, Any] = {name: np.array(list_B, kinds.get(name, np.int64)) for name, list_B in content.items()}
        return cls(**arrays)

    def of_all_processes(self) -> RankedRollouts:
        """The same of all processes that take part in this training, each rollout once; in the order of the batch."""
        mine = self._arrays()
        return RankedRollouts(**dict(zip(mine, gathered(list(mine.values())), strict=True)))

    @property
    def tie_mass(self) -> float:
        """Chance that a rollout equals a reference of its prompt."""
        return float((self.equal_B / self.num_ref_B).mean())

    def win_rate_P(self, procedure: InferenceProcedure) -> Float | None:  # noqa: N802
        """Unbiased inference-time win rate over the reference on each prompt (M10), ties counted ½.

        Returns:
            One value per prompt, in the order of `np.unique(prompt_B)`; None where a prompt has fewer rollouts or
            references than the procedure draws, or the procedure draws no fixed number.
        """
        if procedure.n is None:
            return None
        out: list[float] = []
        for prompt in np.unique(self.prompt_B):
            of_prompt = self.prompt_B == prompt
            below_G, num_ref = self.below_B[of_prompt], int(self.num_ref_B[of_prompt][0])
            if min(below_G.size, num_ref) < procedure.n:
                return None
            upto_G = below_G + self.equal_B[of_prompt]
            order_G = np.argsort(below_G + upto_G, kind="stable")
            rate = 0.0
            for weight, component in procedure.components:
                # Chance that the references' side returns one of the lowest 0..K.
                mass = np.concatenate([[0.0], np.cumsum(component.selection_weights(num_ref))])
                won_G = 0.5 * (mass[below_G] + mass[upto_G])
                rate += weight * float(component.selection_weights(below_G.size) @ won_G[order_G])
            out.append(rate)
        return np.array(out)


def mean_per_prompt(values_B: Float, prompt_B: NDArray[np.int64]) -> Float:
    """Mean over each prompt's rollouts, in the order of `np.unique(prompt_B)`."""
    _, index_B = np.unique(prompt_B, return_inverse=True)
    return np.bincount(index_B, weights=values_B) / np.bincount(index_B)
