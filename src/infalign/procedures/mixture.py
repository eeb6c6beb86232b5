"""Several deployments of one model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from infalign.errors import InputError
from infalign.numerics.quadrature import Array
from infalign.procedures.base import InferenceProcedure, check_is_procedure


@dataclass(frozen=True)
class Mixture(InferenceProcedure):
    """Several deployments of one model: a mixture of objectives, W = sum_i w_i W_i.

    Each part competes against its own opponent (its own procedure run on the reference) unless an opponent is named.
    `distortion` and `density` are those of the output that a user picked at random sees, sum_i w_i H_i; win rates use
    `components`, because a user of one part never meets the other part's output.

    Args:
        parts: Pairs (weight, procedure). Weights are positive and sum to 1. Mixtures inside are flattened.
    """

    parts: tuple[tuple[float, InferenceProcedure], ...]

    def __init__(self, parts: Iterable[tuple[float, InferenceProcedure]]) -> None:
        flat: list[tuple[float, InferenceProcedure]] = []
        for part in parts:
            try:
                weight, procedure = part
                weight = float(weight)
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"{part!r} is not a pair", where="Mixture", hint="Give pairs such as (0.5, BestOfN(4))"
                ) from error
            check_is_procedure(procedure, "Mixture")
            if not (math.isfinite(weight) and weight > 0):
                raise InputError(f"weight {weight!r} is not positive", where="Mixture", hint="Leave that part out")
            flat += [(weight * inner, component) for inner, component in procedure.components]
        total = math.fsum(weight for weight, _ in flat)
        if not flat or abs(total - 1.0) > 1e-6:
            raise InputError(f"the weights sum to {total:g}", where="Mixture", hint="Make them sum to 1")
        object.__setattr__(self, "parts", tuple((weight / total, part) for weight, part in flat))

    def distortion(self, q: npt.ArrayLike) -> Array:
        """H(q) = sum_i w_i H_i(q)."""
        return np.asarray(sum(weight * part.distortion(q) for weight, part in self.parts), dtype=np.float64)

    def density(self, q: npt.ArrayLike) -> Array:
        """h(q) = sum_i w_i h_i(q)."""
        return np.asarray(sum(weight * part.density(q) for weight, part in self.parts), dtype=np.float64)

    def density_slope(self, q: npt.ArrayLike) -> Array:
        """h'(q) = sum_i w_i h_i'(q)."""
        return np.asarray(sum(weight * part.density_slope(q) for weight, part in self.parts), dtype=np.float64)

    @property
    def label(self) -> str:
        """The name in tables, such as "0.7 Standard + 0.3 Best-of-8"."""
        return " + ".join(f"{weight:.3g} {part.label}" for weight, part in self.parts)

    @property
    def n(self) -> int | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The largest number of responses that a part draws, or None when a part has no finite number."""
        counts = [part.n for _, part in self.parts]
        return None if None in counts else max(count for count in counts if count is not None)

    def selection_weights(self, m: int) -> Array:
        """sum_i w_i times the weights of part i: the output that a user picked at random sees."""
        return np.asarray(sum(weight * part.selection_weights(m) for weight, part in self.parts), dtype=np.float64)

    @property
    def components(self) -> tuple[tuple[float, InferenceProcedure], ...]:
        """The pairs (weight, procedure)."""
        return self.parts

    def to_dict(self) -> dict[str, Any]:
        """See the base class."""
        return {
            "kind": "mixture",
            "parts": [{"weight": weight, "procedure": part.to_dict()} for weight, part in self.parts],
        }
