"""Reward transforms Φ: increasing functions of the calibrated reward u in [0, 1].

KL-regularised RL on Φ(C) with coefficient β tilts the reference's ranks to the density exp(Φ(u)/β)/Z (M7). Only
differences of Φ/β matter: adding a constant to Φ, or scaling Φ and β together, changes nothing.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from infalign._io.files import write_text
from infalign.errors import InputError, StorageError
from infalign.numerics import quadrature

Array = npt.NDArray[np.float64]

_FORMAT = "infalign.transform"


class RewardTransform(ABC):
    """An increasing function Φ on [0, 1].

    Subclasses give `_value` and `to_dict`. Instances are immutable, hashable and picklable.
    """

    def __call__(self, u: npt.ArrayLike) -> Array:
        """Φ(u).

        Args:
            u: Calibrated rewards in [0, 1], any shape.

        Returns:
            Transformed rewards, same shape, float64.

        Raises:
            InputError: If a value is NaN or outside [0, 1].
        """
        hint = "Give calibrated rewards (RewardCalibrator.calibrate)"
        return self._value(quadrature.unit_interval(u, f"transform {self.label!r}", hint))

    @abstractmethod
    def _value(self, u: Array) -> Array:
        """Φ at points already known to lie in [0, 1]."""

    @property
    @abstractmethod
    def label(self) -> str:
        """A short name for tables and figures."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready description that `transform_from_dict` reads back."""

    @property
    def knots(self) -> Array:
        """Points inside [0, 1] where Φ is not smooth, for quadrature."""
        return np.empty(0)

    def log_partition(self, beta: float) -> float:
        """The logarithm of Z = ∫ exp(Φ(u)/β) du over [0, 1] (M7).

        Args:
            beta: KL coefficient, in units of Φ per nat.

        Raises:
            InputError: If beta is not a positive number.
        """
        beta = positive_beta(beta)
        top = float(self._value(np.array([1.0]))[0])
        _, integral = quadrature.adapt(
            lambda mesh: np.exp((self._value(mesh.u) - top) / beta),
            quadrature.mesh_with_knots(self.knots),
            rounding(top / beta),
        )
        return top / beta + math.log(integral)

    def save(self, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
        """Write the transform as JSON.

        Args:
            path: The file to write.
            about: JSON-ready notes stored beside it, such as the β it was made for; `load` ignores them.

        Raises:
            InputError: If the notes are not JSON-ready.
            StorageError: If the file cannot be written.
        """
        content: dict[str, Any] = {"format": _FORMAT, "version": 1, "transform": self.to_dict()}
        if about:
            content["about"] = dict(about)
        try:
            text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise InputError(f"the notes are not JSON-ready ({error})", where=str(path)) from error
        write_text(Path(path), text, parents=False)

    @staticmethod
    def load(path: str | Path) -> RewardTransform:
        """Read a transform that `save` wrote.

        Raises:
            StorageError: If the file cannot be read.
            InputError: If it does not hold a transform.
        """
        try:
            content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise StorageError(f"cannot read the transform ({error.strerror})", where=str(path)) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"not a JSON file ({error})", where=str(path)) from error
        if not isinstance(content, dict) or cast(dict[str, Any], content).get("format") != _FORMAT:
            raise InputError(
                "not a transform file", where=str(path), hint="Make one with `infalign plan --save` or transform.save"
            )
        fields = cast(dict[str, Any], content)
        if fields.get("version") != 1 or "transform" not in fields:
            raise InputError(f"unknown version {fields.get('version')!r} of the transform file", where=str(path))
        try:
            return transform_from_dict(fields["transform"])
        except InputError as error:
            raise InputError(f"{error.where}: {error.what}", where=str(path), hint=error.hint) from error


@dataclass(frozen=True)
class Identity(RewardTransform):
    """Φ(u) = u: calibrated RLHF, optimal for the standard win rate (section 4)."""

    def _value(self, u: Array) -> Array:
        return u.copy()

    @property
    def label(self) -> str:
        """The name in tables."""
        return "identity"

    def to_dict(self) -> dict[str, Any]:
        """See the base class."""
        return {"kind": "identity"}

    def log_partition(self, beta: float) -> float:
        """The integral of exp(u/β) is β (exp(1/β) - 1)."""
        beta = positive_beta(beta)
        return 1.0 / beta + math.log(beta) + math.log(-math.expm1(-1.0 / beta))


@dataclass(frozen=True)
class Log(RewardTransform):
    """Φ(u) = log u: with β = 1/(n-1) the tilted policy is the Best-of-n distribution (BOND, vBoN, BoNBoN).

    Φ(0) = -inf: a response that loses to every reference sample gets no mass. With a finite number of reference
    rollouts use the rank-conditional tilt (M6), which is finite.
    """

    def _value(self, u: Array) -> Array:
        with np.errstate(divide="ignore"):
            return np.log(u)

    @property
    def label(self) -> str:
        """The name in tables."""
        return "log"

    def to_dict(self) -> dict[str, Any]:
        """See the base class."""
        return {"kind": "log"}

    def log_partition(self, beta: float) -> float:
        """The integral of u^(1/β) is β/(1+β)."""
        return -math.log1p(1.0 / positive_beta(beta))


@dataclass(frozen=True)
class Exponential(RewardTransform):
    """Φ(u) = (exp(t u) - 1)/(exp(t) - 1): from 0 to 1, steep at the top for t > 0, at the bottom for t < 0.

    An affine image of the paper's sign(t) exp(t u), with β divided by |exp(t) - 1| (section 4). Tends to the identity
    as t tends to 0 and does not overflow for large t of either sign.

    Args:
        t: Any finite number; the paper takes about 10 for Best-of-4 and about -10 for Worst-of-4.
    """

    t: float

    def __post_init__(self) -> None:
        try:
            t = math.nan if isinstance(self.t, str) else float(self.t)
        except (TypeError, ValueError):
            t = math.nan
        if not math.isfinite(t):
            raise InputError(f"t = {self.t!r} is not a finite number", where="Exponential")
        object.__setattr__(self, "t", t)

    def _value(self, u: Array) -> Array:
        if abs(self.t) < 1e-300:
            return u.copy()
        if self.t > 0:
            return np.exp(self.t * (u - 1.0)) * (np.expm1(-self.t * u) / math.expm1(-self.t))
        return np.expm1(self.t * u) / math.expm1(self.t)

    @property
    def label(self) -> str:
        """The name in tables."""
        return f"exponential, t={self.t:.4g}"

    def to_dict(self) -> dict[str, Any]:
        """See the base class."""
        return {"kind": "exponential", "t": self.t}


@dataclass(frozen=True, eq=False, repr=False)
class Tabulated(RewardTransform):
    """Φ through given points, monotone in between.

    Without slopes the interpolation is shape-preserving cubic (PCHIP); with slopes it is the cubic Hermite interpolant,
    which the optimal transform uses because it knows Φ' exactly (M9).

    Args:
        u: Shape (m,), strictly increasing from 0 to 1, m >= 2.
        value: Shape (m,), finite, not decreasing.
        slope: Shape (m,), Φ' at the points, at least 0; must be compatible with monotonicity.
        name: The label in tables.

    Raises:
        InputError: If the points do not describe an increasing function on [0, 1].
    """

    u: Array
    value: Array
    slope: Array | None
    name: str

    def __init__(
        self, u: npt.ArrayLike, value: npt.ArrayLike, slope: npt.ArrayLike | None = None, *, name: str = "tabulated"
    ) -> None:
        object.__setattr__(self, "u", _frozen(u))
        object.__setattr__(self, "value", _frozen(value))
        object.__setattr__(self, "slope", None if slope is None else _frozen(slope))
        object.__setattr__(self, "name", str(name))
        columns = [self.u, self.value] + ([] if self.slope is None else [self.slope])
        if self.u.ndim != 1 or self.u.size < 2 or any(column.shape != self.u.shape for column in columns):
            raise InputError("u, value and slope must be vectors of one length, at least 2", where="Tabulated")
        if not all(np.isfinite(column).all() for column in columns):
            raise InputError("a value is not finite", where="Tabulated")
        if self.u[0] != 0.0 or self.u[-1] != 1.0 or (np.diff(self.u) <= 0).any():
            raise InputError("u must increase strictly from 0 to 1", where="Tabulated")
        steps = np.diff(self.value)
        if (steps < 0).any():
            at = float(self.u[int(np.argmin(steps))])
            raise InputError(f"the values decrease after u = {at:.6g}", where="Tabulated", hint="Φ must be increasing")
        if self.slope is not None:
            # De Boor and Swartz: a cubic Hermite piece is monotone if both end slopes lie in [0, 3 secant].
            limit = 3.0 * steps / np.diff(self.u) * (1 + 1e-9) + 1e-300
            if (self.slope < 0).any() or (self.slope[:-1] > limit).any() or (self.slope[1:] > limit).any():
                raise InputError(
                    "a slope is negative or more than three times the secant beside it",
                    where="Tabulated",
                    hint="Leave the slopes out, or give more points",
                )

    @cached_property
    def _interpolant(self) -> Callable[[Array], Array]:
        # Imported here: scipy.interpolate is slow to load and most transforms do without.
        from scipy import interpolate  # pyright: ignore[reportMissingTypeStubs]

        scipy_interpolate: Any = interpolate
        if self.slope is None:
            return cast(Callable[[Array], Array], scipy_interpolate.PchipInterpolator(self.u, self.value))
        return cast(Callable[[Array], Array], scipy_interpolate.CubicHermiteSpline(self.u, self.value, self.slope))

    def _value(self, u: Array) -> Array:
        return np.clip(np.asarray(self._interpolant(u), dtype=np.float64), self.value[0], self.value[-1])

    @property
    def label(self) -> str:
        """The name in tables."""
        return self.name

    @property
    def knots(self) -> Array:
        """The points of the table."""
        return self.u

    def to_dict(self) -> dict[str, Any]:
        """See the base class."""
        content: dict[str, Any] = {
            "kind": "tabulated",
            "name": self.name,
            "u": self.u.tolist(),
            "value": self.value.tolist(),
        }
        if self.slope is not None:
            content["slope"] = self.slope.tolist()
        return content

    def _key(self) -> tuple[bytes, ...]:
        return (self.u.tobytes(), self.value.tobytes(), b"" if self.slope is None else self.slope.tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tabulated) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"Tabulated({self.name!r}, {self.u.size} points, from {self.value[0]:.6g} to {self.value[-1]:.6g})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: item for name, item in self.__dict__.items() if name != "_interpolant"}


def transform_from_dict(description: Mapping[str, Any]) -> RewardTransform:
    """Read back what `RewardTransform.to_dict` wrote.

    Args:
        description: A mapping with "kind" (identity, log, exponential, tabulated) and that kind's own fields (t; u,
            value, slope and name).

    Raises:
        InputError: If the kind is unknown or a field is missing, unknown or out of range.
    """
    given = cast(object, description)  # from a file, it may be anything
    if not isinstance(given, Mapping):
        raise InputError(f"{description!r} does not describe a transform", where="transform", hint="Give a mapping")
    fields = dict(description)
    kind = fields.pop("kind", None)
    kinds: dict[str, Callable[..., RewardTransform]] = {
        "identity": Identity,
        "log": Log,
        "exponential": Exponential,
        "tabulated": Tabulated,
    }
    if not isinstance(kind, str) or kind not in kinds:
        raise InputError(f"unknown transform kind {kind!r}", where="transform", hint=f"Use one of {', '.join(kinds)}")
    try:
        return kinds[kind](**fields)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the description of a transform of kind {kind!r} does not fit: {error}",
            where="transform",
            hint="Give exactly the fields that its to_dict writes",
        ) from error


def check_is_transform(value: object, where: str) -> None:
    """Refuse what is not an instance of `RewardTransform`, such as a name or a class.

    Raises:
        InputError: If it is not.
    """
    if not isinstance(value, RewardTransform):
        raise InputError(f"{value!r} is not a transform", where=where, hint="Give one, such as infalign.Identity()")


def positive_beta(beta: float) -> float:
    """The KL coefficient as a float.

    Raises:
        InputError: If it is not a positive finite number.
    """
    return positive_number(beta, "beta", "Use a KL coefficient above 0")


def positive_number(value: float, where: str, hint: str) -> float:
    """The argument as a float.

    Raises:
        InputError: If it is not a positive finite number (text is not a number).
    """
    try:
        number = math.nan if isinstance(value, str | bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise InputError(f"{where} = {value!r} is not a positive finite number", where=where, hint=hint)
    return number


def rounding(top: float) -> float:
    """The relative accuracy to ask of integrals of exp(Φ/β): rounding of Φ(1)/β, `top`, sets its floor."""
    return max(1e-13, 8.0 * float(np.finfo(np.float64).eps) * abs(top))


def _frozen(values: npt.ArrayLike) -> Array:
    """A read-only float64 copy."""
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"not an array of real numbers ({error})", where="Tabulated") from error
    array.flags.writeable = False
    return array
