"""What a procedure is: a map of CDFs on [0, 1]."""

from __future__ import annotations

from abc import ABC, abstractmethod
from operator import index
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from infalign.errors import InputError
from infalign.numerics.quadrature import Array, unit_interval


class InferenceProcedure(ABC):
    """What happens between the policy and the user, as a map of CDFs on [0, 1].

    Subclasses give `distortion` and `density`; those that draw a finite number of responses and return one of them by
    rank also give `n` and `selection_weights`. Instances are immutable, hashable and picklable.

    Attributes:
        n: The number of responses that the procedure draws, or None when it is not a finite number.
    """

    # A plain attribute and not a property, so that a dataclass field of the same name can take its place.
    n: int | None = None

    @abstractmethod
    def distortion(self, q: npt.ArrayLike) -> Array:
        """H(q): the CDF of the procedure's output where the policy's CDF is q (section 3). Any shape, float64."""

    @abstractmethod
    def density(self, q: npt.ArrayLike) -> Array:
        """h(q), the derivative of `distortion`. Any shape, float64."""

    def density_slope(self, q: npt.ArrayLike) -> Array:
        """h'(q), used only to speed the solver of M9 up; by default a central difference of `density`."""
        points = unit_interval(q, "density_slope(q)")
        step = 1e-6
        low, high = np.maximum(points - step, 0.0), np.minimum(points + step, 1.0)
        return (self.density(high) - self.density(low)) / (high - low)

    @property
    def label(self) -> str:
        """A short name for tables and figures, such as "Best-of-4"."""
        return type(self).__name__

    def selection_weights(self, m: int) -> Array:
        """Probability that each of m distinct samples is the output of the procedure on a random n-subset (M10).

        Args:
            m: The number of samples of one prompt, at least `n`.

        Returns:
            Shape (m,): entry i - 1 belongs to the i-th smallest sample. Sums to 1.

        Raises:
            InputError: If m < n, or the procedure draws no finite number of responses.
        """
        raise InputError(
            f"{self.label} has no finite number of responses, so it has no selection weights",
            where="selection_weights",
            hint="Use its distortion H instead, or a procedure that picks one of n responses by rank",
        )

    @property
    def components(self) -> tuple[tuple[float, InferenceProcedure], ...]:
        """The objectives (weight, procedure) whose weighted sum is maximised; one, unless this is a `Mixture`."""
        return ((1.0, self),)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description that `procedure_from_dict` reads back."""
        raise InputError(
            f"{type(self).__name__} cannot be stored", where="to_dict", hint="Define to_dict in your procedure"
        )


def check_is_procedure(value: object, where: str) -> None:
    """Refuse what is not an instance of `InferenceProcedure`, such as a name or a class.

    Raises:
        InputError: If it is not.
    """
    if not isinstance(value, InferenceProcedure):
        raise InputError(f"{value!r} is not a procedure", where=where, hint="Give one, such as infalign.BestOfN(4)")


def whole_number(value: SupportsIndex, name: str, where: str) -> int:
    """The argument as an int.

    Raises:
        InputError: If it is not a whole number of at least 1 (True and 4.0 are not).
    """
    try:
        number = index(value)
    except TypeError as error:
        raise InputError(f"{name} = {value!r} is not a whole number", where=where) from error
    if isinstance(value, bool) or number < 1:
        raise InputError(f"{name} = {value!r} is not a whole number of at least 1", where=where)
    return number
