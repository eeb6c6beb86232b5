"""Procedures that draw n responses and return one of them by rank: one sample, the best, the worst, the k-th."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from infalign._io.wording import counted
from infalign.errors import InputError
from infalign.numerics import special
from infalign.numerics.quadrature import Array, unit_interval
from infalign.procedures.base import InferenceProcedure, whole_number


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
        return -np.expm1(special.xlog1py(float(self.n), -unit_interval(q, "distortion(q)")))

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
            raise InputError(f"k = {self.k} is more than n = {self.n}", where="OrderStatistic", hint="Use 1 <= k <= n")

    def distortion(self, q: npt.ArrayLike) -> Array:
        """H(q) = I_q(k, n-k+1), the regularised incomplete beta function."""
        return special.betainc(float(self.k), float(self.n - self.k + 1), unit_interval(q, "distortion(q)"))

    def density(self, q: npt.ArrayLike) -> Array:
        """h(q), the Beta(k, n-k+1) density."""
        return special.beta_density(float(self.k), float(self.n - self.k + 1), unit_interval(q, "density(q)"))

    def density_slope(self, q: npt.ArrayLike) -> Array:
        """h'(q) = n (b(k-1) - b(k)), the difference of the Beta densities of the k-1-th and k-th of n-1."""
        points = unit_interval(q, "density_slope(q)")
        slope = np.zeros_like(points)
        if self.k > 1:
            slope += self.n * special.beta_density(self.k - 1.0, self.n - self.k + 1.0, points)
        if self.k < self.n:
            slope -= self.n * special.beta_density(float(self.k), float(self.n - self.k), points)
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


def _selection_weights(k: int, n: int, m: int, label: str) -> Array:
    """M10 for the k-th smallest of n: binom(i-1, k-1) binom(m-i, n-k) / binom(m, n), i = 1..m.

    Built from the ratio of neighbours, w_{i+1} / w_i = i (m-i-n+k) / ((i-k+1) (m-i)), in logarithms: exact to a few
    units in the last place for any m, where binomial coefficients would overflow.
    """
    m = whole_number(m, "m", f"selection_weights of {label}")
    if m < n:
        raise InputError(
            f"{counted(m, 'sample is', 'samples are')} fewer than the {n} that {label} draws",
            where="selection_weights",
            hint=f"Give at least {n} samples per prompt, or a smaller n",
        )
    first, last = k, m - n + k
    i = np.arange(first, last, dtype=np.float64)
    steps = np.log(i) + np.log(m - i - n + k) - np.log(i - k + 1) - np.log(m - i)
    logs = np.concatenate([[0.0], np.cumsum(steps)])
    weights = np.zeros(m)
    weights[first - 1 : last] = np.exp(logs - logs.max())
    return weights / weights.sum()
