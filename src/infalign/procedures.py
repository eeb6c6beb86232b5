"""Inference-time procedures as distortions of a policy's rank distribution.

A rank-based procedure (Best-of-N, Worst-of-N, any order statistic, ...) sees a policy only through the CDF F of its
calibrated rewards: the procedure's output has CDF H(F). `InferenceProcedure.distortion` is H and
`InferenceProcedure.density` its derivative h (table of section 3; M8 and M9 need nothing else).

A procedure of your own is a frozen dataclass with two methods and a label:

    @dataclass(frozen=True)
    class Softened(InferenceProcedure):
        '''Best-of-2 for half of the requests, one sample for the others.'''

        label: ClassVar[str] = "Softened"

        def distortion(self, q):
            return 0.5 * np.asarray(q) ** 2 + 0.5 * np.asarray(q)

        def density(self, q):
            return np.asarray(q) + 0.5
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from operator import index
from typing import Any, Protocol, SupportsIndex, cast

import numpy as np
import numpy.typing as npt
from scipy import special as _scipy_special  # pyright: ignore[reportMissingTypeStubs]

from infalign.errors import InputError
from infalign.quadrature import unit_interval

Array = npt.NDArray[np.float64]


class _Special(Protocol):
    """The SciPy functions used here, with their types (SciPy ships none)."""

    betainc: Callable[[float, float, Array], Array]
    betaln: Callable[[Any, Any], Any]
    xlogy: Callable[[Any, Array], Array]
    xlog1py: Callable[[Any, Array], Array]


_special = cast(_Special, _scipy_special)


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
            mend="Use its distortion H instead, or a procedure that picks one of n responses by rank",
        )

    @property
    def components(self) -> tuple[tuple[float, InferenceProcedure], ...]:
        """The objectives (weight, procedure) whose weighted sum is maximised; one, unless this is a `Mixture`."""
        return ((1.0, self),)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description that `procedure_from_dict` reads back."""
        raise InputError(
            f"{type(self).__name__} cannot be stored", where="to_dict", mend="Define to_dict in your procedure"
        )


@dataclass(frozen=True)
class Standard(InferenceProcedure):
    """One sample of the policy: H(q) = q."""

    n = 1

    def distortion(self, q: npt.ArrayLike) -> Array:
        """H(q) = q."""
        return unit_interval(q, "distortion(q)").copy()

    def density(self, q: npt.ArrayLike) -> Array:
        """h(q) = 1."""
        return np.ones_like(unit_interval(q, "density(q)"))

    def density_slope(self, q: npt.ArrayLike) -> Array:
        """h'(q) = 0."""
        return np.zeros_like(unit_interval(q, "density_slope(q)"))

    @property
    def label(self) -> str:
        """The name in tables."""
        return "Standard"

    def selection_weights(self, m: int) -> Array:
        """Every sample is equally likely: 1/m each."""
        return _selection_weights(1, 1, m, self.label)

    def to_dict(self) -> dict[str, Any]:
        """See the base class."""
        return {"kind": "standard"}


@dataclass(frozen=True)
class BestOfN(InferenceProcedure):
    """The best of n responses: H(q) = q^n.

    Args:
        n: Number of responses drawn, at least 1.
    """

    n: int  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", whole_number(self.n, "n", "BestOfN"))

    def distortion(self, q: npt.ArrayLike) -> Array:
        """H(q) = q^n."""
        return unit_interval(q, "distortion(q)") ** self.n

    def density(self, q: npt.ArrayLike) -> Array:
        """h(q) = n q^(n-1)."""
        return self.n * unit_interval(q, "density(q)") ** (self.n - 1)

    def density_slope(self, q: npt.ArrayLike) -> Array:
        """h'(q) = n (n-1) q^(n-2)."""
        return self.n * (self.n - 1) * unit_interval(q, "density_slope(q)") ** max(self.n - 2, 0)

    @property
    def label(self) -> str:
        """The name in tables."""
        return f"Best-of-{self.n}"

    def selection_weights(self, m: int) -> Array:
        """M10: binom(i-1, n-1) / binom(m, n) for the i-th smallest."""
        return _selection_weights(self.n, self.n, m, self.label)

    def to_dict(self) -> dict[str, Any]:
        """See the base class."""
        return {"kind": "best-of-n", "n": self.n}


@dataclass(frozen=True)
class WorstOfN(InferenceProcedure):
    """The worst of n responses, as an attacker who tries n times gets it: H(q) = 1 - (1-q)^n.

    Args:
        n: Number of responses drawn, at least 1.
    """

    n: int  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", whole_number(self.n, "n", "WorstOfN"))

    def distortion(self, q: npt.ArrayLike) -> Array:
        """H(q) = 1 - (1-q)^n."""
        return -np.expm1(_special.xlog1py(float(self.n), -unit_interval(q, "distortion(q)")))

    def density(self, q: npt.ArrayLike) -> Array:
        """h(q) = n (1-q)^(n-1)."""
        return self.n * (1.0 - unit_interval(q, "density(q)")) ** (self.n - 1)

    def density_slope(self, q: npt.ArrayLike) -> Array:
        """h'(q) = -n (n-1) (1-q)^(n-2)."""
        return -self.n * (self.n - 1) * (1.0 - unit_interval(q, "density_slope(q)")) ** max(self.n - 2, 0)

    @property
    def label(self) -> str:
        """The name in tables."""
        return f"Worst-of-{self.n}"

    def selection_weights(self, m: int) -> Array:
        """M10 mirrored: binom(m-i, n-1) / binom(m, n) for the i-th smallest."""
        return _selection_weights(1, self.n, m, self.label)

    def to_dict(self) -> dict[str, Any]:
        """See the base class."""
        return {"kind": "worst-of-n", "n": self.n}


@dataclass(frozen=True)
class OrderStatistic(InferenceProcedure):
    """The k-th smallest of n responses: H(q) = I_q(k, n-k+1). k = n is Best-of-n, k = 1 is Worst-of-n.

    Args:
        k: Which response, counted from the worst, in 1..n.
        n: Number of responses drawn, at least 1.
    """

    k: int
    n: int  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", whole_number(self.n, "n", "OrderStatistic"))
        object.__setattr__(self, "k", whole_number(self.k, "k", "OrderStatistic"))
        if self.k > self.n:
            raise InputError(f"k = {self.k} is more than n = {self.n}", where="OrderStatistic", mend="Use 1 <= k <= n")

    def distortion(self, q: npt.ArrayLike) -> Array:
        """H(q) = I_q(k, n-k+1), the regularised incomplete beta function."""
        return _special.betainc(float(self.k), float(self.n - self.k + 1), unit_interval(q, "distortion(q)"))

    def density(self, q: npt.ArrayLike) -> Array:
        """h(q), the Beta(k, n-k+1) density."""
        return _beta_density(float(self.k), float(self.n - self.k + 1), unit_interval(q, "density(q)"))

    def density_slope(self, q: npt.ArrayLike) -> Array:
        """h'(q) = n (b(k-1) - b(k)), the difference of the Beta densities of the k-1-th and k-th of n-1."""
        points = unit_interval(q, "density_slope(q)")
        slope = np.zeros_like(points)
        if self.k > 1:
            slope += self.n * _beta_density(self.k - 1.0, self.n - self.k + 1.0, points)
        if self.k < self.n:
            slope -= self.n * _beta_density(float(self.k), float(self.n - self.k), points)
        return slope

    @property
    def label(self) -> str:
        """The name in tables, such as "3rd of 5"."""
        suffix = "th" if self.k % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(self.k % 10, "th")
        return f"{self.k}{suffix} of {self.n}"

    def selection_weights(self, m: int) -> Array:
        """M10: binom(i-1, k-1) binom(m-i, n-k) / binom(m, n) for the i-th smallest."""
        return _selection_weights(self.k, self.n, m, self.label)

    def to_dict(self) -> dict[str, Any]:
        """See the base class."""
        return {"kind": "order-statistic", "k": self.k, "n": self.n}


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
                    f"{part!r} is not a pair", where="Mixture", mend="Give pairs such as (0.5, BestOfN(4))"
                ) from error
            check_is_procedure(procedure, "Mixture")
            if not (math.isfinite(weight) and weight > 0):
                raise InputError(f"weight {weight!r} is not positive", where="Mixture", mend="Leave that part out")
            flat += [(weight * inner, component) for inner, component in procedure.components]
        total = math.fsum(weight for weight, _ in flat)
        if not flat or abs(total - 1.0) > 1e-6:
            raise InputError(f"the weights sum to {total:g}", where="Mixture", mend="Make them sum to 1")
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


def procedure_from_dict(description: Mapping[str, Any]) -> InferenceProcedure:
    """Read back what `InferenceProcedure.to_dict` wrote.

    Args:
        description: A mapping with "kind" (standard, best-of-n, worst-of-n, order-statistic, mixture, fitted,
            early-stopping) and that kind's own fields (n; k and n; parts; weights and num_samples; n, stop_at,
            block, num_ref).

    Raises:
        InputError: If the kind is unknown or a field is missing, unknown or out of range.
    """
    given = cast(object, description)  # from a file, it may be anything
    if not isinstance(given, Mapping):
        raise InputError(f"{description!r} does not describe a procedure", where="procedure", mend="Give a mapping")
    fields = dict(description)
    kind = fields.pop("kind", None)
    try:
        match kind:
            case "standard":
                return Standard(**fields)
            case "best-of-n":
                return BestOfN(**fields)
            case "worst-of-n":
                return WorstOfN(**fields)
            case "order-statistic":
                return OrderStatistic(**fields)
            case "mixture":
                parts = fields.pop("parts")
                if fields:
                    raise TypeError(f"unknown field {sorted(fields)[0]!r}")
                return Mixture((part["weight"], procedure_from_dict(part["procedure"])) for part in parts)
            case "fitted":
                # By name: these live one layer above this module.
                return cast(InferenceProcedure, import_module("infalign.fitted_procedure").FittedProcedure(**fields))
            case "early-stopping":
                return cast(InferenceProcedure, import_module("infalign.early_stopping").EarlyStopping(**fields))
            case _:
                pass
    except InputError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"the description of a {kind} procedure does not fit: {error}",
            where="procedure",
            mend="Give exactly the fields that its to_dict writes",
        ) from error
    raise InputError(
        f"unknown procedure kind {kind!r}",
        where="procedure",
        mend="Use one of standard, best-of-n, worst-of-n, order-statistic, mixture, fitted, early-stopping",
    )


def check_procedure(procedure: InferenceProcedure) -> None:
    """Check that a procedure is a distortion: H(0) = 0, H(1) = 1, H increasing, h its derivative, any shape of array.

    Meant for procedures of your own; the solver calls it for you.

    Raises:
        InputError: If one of these does not hold, with the place where it fails.
    """
    where = f"procedure {procedure.label!r}"
    grid = np.linspace(0.0, 1.0, 1025)
    try:
        distortion = np.asarray(procedure.distortion(grid), dtype=np.float64)
        density = np.asarray(procedure.density(grid), dtype=np.float64)
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"distortion or density failed on an array: {error}", where=where) from error
    if distortion.shape != grid.shape or density.shape != grid.shape:
        raise InputError("distortion and density must return one value per point", where=where, mend="Vectorise them")
    if not (np.isfinite(distortion).all() and np.isfinite(density).all()):
        raise InputError("distortion or density is not finite everywhere on [0, 1]", where=where)
    for point, value in ((0.0, distortion[0]), (1.0, distortion[-1])):
        if abs(value - point) > 1e-9:
            raise InputError(f"H({point:g}) is {value:.6g}", where=where, mend=f"It must be {point:g}")
    steps = np.diff(distortion)
    if (steps < -1e-12).any() or (density < 0).any():
        worst = grid[int(np.argmin(steps))] if (steps < -1e-12).any() else grid[int(np.argmin(density))]
        raise InputError(f"the distortion decreases near q = {worst:.4g}", where=where, mend="H must be increasing")
    # h against H on every cell: a wrong derivative would silently give a wrong optimum. The cell average of h lies
    # between its least and greatest value there; sampling inside the cell leaves room for a curved h.
    points = grid[:-1, None] + np.linspace(0.0, 1.0, 9) / 1024
    inner = np.asarray(procedure.density(points), dtype=np.float64)
    if inner.shape != points.shape:
        raise InputError("density does not keep the shape of a matrix", where=where, mend="Use NumPy functions only")
    room = 1e-6 + 0.02 * np.abs(inner).max(axis=1) + (inner.max(axis=1) - inner.min(axis=1))
    gap = np.abs(steps * 1024 - inner.mean(axis=1))
    if (gap > room).any():
        cell = int(np.argmax(gap - room))
        raise InputError(
            f"density is not the derivative of distortion near q = {grid[cell]:.4g} "
            f"(h is about {inner[cell].mean():.4g}, H grows at {steps[cell] * 1024:.4g})",
            where=where,
            mend="Correct one of the two",
        )


def check_is_procedure(value: object, where: str) -> None:
    """Refuse what is not an instance of `InferenceProcedure`, such as a name or a class.

    Raises:
        InputError: If it is not.
    """
    if not isinstance(value, InferenceProcedure):
        raise InputError(f"{value!r} is not a procedure", where=where, mend="Give one, such as infalign.BestOfN(4)")


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


def _beta_density(a: float, b: float, q: Array) -> Array:
    """The Beta(a, b) density in logarithms, so that large a and b neither over- nor underflow on the way."""
    return np.exp(_special.xlogy(a - 1.0, q) + _special.xlog1py(b - 1.0, -q) - _special.betaln(a, b))


def _selection_weights(k: int, n: int, m: int, label: str) -> Array:
    """M10 for the k-th smallest of n: binom(i-1, k-1) binom(m-i, n-k) / binom(m, n), i = 1..m.

    Built from the ratio of neighbours, w_{i+1} / w_i = i (m-i-n+k) / ((i-k+1) (m-i)), in logarithms: exact to a few
    units in the last place for any m, where binomial coefficients would overflow.
    """
    m = whole_number(m, "m", f"selection_weights of {label}")
    if m < n:
        raise InputError(
            f"{m} samples are fewer than the {n} that {label} draws",
            where="selection_weights",
            mend=f"Give at least {n} samples per prompt, or a smaller n",
        )
    first, last = k, m - n + k
    i = np.arange(first, last, dtype=np.float64)
    steps = np.log(i) + np.log(m - i - n + k) - np.log(i - k + 1) - np.log(m - i)
    logs = np.concatenate([[0.0], np.cumsum(steps)])
    weights = np.zeros(m)
    weights[first - 1 : last] = np.exp(logs - logs.max())
    return weights / weights.sum()
