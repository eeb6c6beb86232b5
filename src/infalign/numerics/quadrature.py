"""Integrals over [0, 1] of functions that gather all their mass at an end point.

Everything is done in the logit coordinate t = log(u / (1 - u)): equal steps in t are ever finer steps in u towards both
ends, so mass within 1e-15 of an end point is resolved with a few dozen elements, and 1 - u keeps its relative accuracy.
Each element carries Gauss-Legendre nodes; elements are halved until the integral asked for has settled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from infalign.errors import InputError

Array = npt.NDArray[np.float64]

ORDER = 10
"""Gauss-Legendre nodes per element."""

T_END = 46.0
"""The mesh covers t in [-T_END, T_END]; the two ends left out are 1e-20 long in u."""

_MAX_ELEMENTS = 40_000

_nodes, _weights = np.polynomial.legendre.leggauss(ORDER)
NODES: Array = np.asarray(_nodes, dtype=np.float64)
WEIGHTS: Array = np.asarray(_weights, dtype=np.float64)


def _cumulative_matrix() -> Array:
    """A[j, k]: integral from -1 to node j of the k-th Lagrange polynomial on the nodes."""
    values = np.polynomial.legendre.legvander(NODES, ORDER)
    projection = (WEIGHTS[:, None] * values[:, :ORDER]).T * (np.arange(ORDER)[:, None] + 0.5)
    integrals = np.empty((ORDER, ORDER))
    integrals[:, 0] = NODES + 1.0
    for degree in range(1, ORDER):
        upper = values[:, degree + 1]
        integrals[:, degree] = (upper - values[:, degree - 1]) / (2 * degree + 1)
    return np.asarray(integrals @ projection, dtype=np.float64)


CUMULATIVE: Array = _cumulative_matrix()


def _lagrange_projection() -> Array:
    """Maps values at the nodes to Legendre coefficients."""
    values = np.polynomial.legendre.legvander(NODES, ORDER - 1)
    return np.asarray((WEIGHTS[:, None] * values).T * (np.arange(ORDER)[:, None] + 0.5), dtype=np.float64)


PROJECTION: Array = _lagrange_projection()


def _left_half() -> Array:
    """Integrals from -1 to 0 of the Lagrange polynomials on the nodes."""
    x = np.polynomial.legendre.legvander((NODES - 1.0) / 2.0, ORDER - 1)
    return np.asarray(0.5 * WEIGHTS @ x @ PROJECTION, dtype=np.float64)


_LEFT_HALF: Array = _left_half()


@dataclass(frozen=True, eq=False)
class Mesh:
    """Elements in the logit coordinate with their Gauss nodes.

    Attributes:
        lefts: Shape (E,), where each element begins, in t.
        rights: Shape (E,), where it ends.
    """

    lefts: Array
    rights: Array

    @classmethod
    def from_edges(cls, edges: Array) -> Mesh:
        """Elements that touch, from their E + 1 edges."""
        return cls(edges[:-1], edges[1:])

    @property
    def edges(self) -> Array:
        """Shape (E + 1,); only for elements that touch."""
        return np.append(self.lefts, self.rights[-1])

    @cached_property
    def half(self) -> Array:
        """Half the element lengths in t, shape (E, 1)."""
        return 0.5 * (self.rights - self.lefts)[:, None]

    @cached_property
    def t(self) -> Array:
        """Nodes in t, shape (E, ORDER)."""
        return 0.5 * (self.lefts + self.rights)[:, None] + self.half * NODES

    @cached_property
    def u(self) -> Array:
        """Nodes in u, shape (E, ORDER)."""
        return expit(self.t)

    @cached_property
    def jacobian(self) -> Array:
        """Half element length times du/dt at the nodes: u (1 - u) without cancellation, shape (E, ORDER)."""
        return self.half * self.u * expit(-self.t)

    @cached_property
    def weights(self) -> Array:
        """Quadrature weights for integrals over u, shape (E, ORDER)."""
        return self.jacobian * WEIGHTS

    def integral(self, values: Array) -> float:
        """The integral over u of a function given at the nodes."""
        return float(np.sum(self.weights * values))

    def cumulative(self, values: Array) -> tuple[Array, Array]:
        """Integrals over u from 0, given a function at the nodes: at the nodes (E, ORDER) and at the edges (E + 1,)."""
        scaled = self.jacobian * values
        at_edges = np.concatenate([[0.0], np.cumsum(scaled @ WEIGHTS)])
        return at_edges[:-1, None] + scaled @ CUMULATIVE.T, at_edges


def unit_interval(values: npt.ArrayLike, where: str, hint: str = "Give calibrated rewards in [0, 1]") -> Array:
    """An argument as float64, any shape, refused unless every value lies in [0, 1].

    Raises:
        InputError: If a value is outside [0, 1], NaN or not a real number.
    """
    try:
        points = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"not an array of real numbers ({error})", where=where, hint=hint) from error
    if points.size and not (points.min() >= 0.0 and points.max() <= 1.0):
        raise InputError("values outside [0, 1], or NaN", where=where, hint=hint)
    return points


def expit(t: Array) -> Array:
    """1 / (1 + exp(-t)) without overflow."""
    small = np.exp(-np.abs(t))
    return np.where(t >= 0, 1.0, small) / (1.0 + small)


def logit(u: Array) -> Array:
    """log(u / (1 - u)), held within the mesh."""
    with np.errstate(divide="ignore"):
        return np.clip(np.log(u) - np.log1p(-u), -T_END, T_END)


def mesh_with_knots(knots: Array | None = None, spacing: float = 2.0) -> Mesh:
    """A uniform mesh in t, with an element edge at every knot.

    Args:
        knots: Points of [0, 1] where an integrand is not smooth.
        spacing: Longest element, in t.
    """
    edges = np.linspace(-T_END, T_END, int(np.ceil(2 * T_END / spacing)) + 1)
    if knots is not None and knots.size:
        inner = logit(np.asarray(knots, dtype=np.float64))
        inner = np.unique(inner[np.abs(inner) < T_END - 1e-9])
        merged = np.sort(np.concatenate([edges, inner]))
        # Where a uniform edge nearly falls on a knot, the knot stays.
        near = np.zeros(merged.shape, dtype=bool)
        near[1:-1] = np.minimum(np.diff(merged)[:-1], np.diff(merged)[1:]) < 1e-3 * spacing
        edges = merged[~near | np.isin(merged, inner)]
    return Mesh.from_edges(np.asarray(edges, dtype=np.float64))


def adapt(function: Callable[[Mesh], Array], mesh: Mesh, tolerance: float = 1e-13) -> tuple[Mesh, float]:
    """Halve elements until the integral of a function over [0, 1] has settled.

    Args:
        function: Gives the integrand at the nodes of a mesh, shape (E, ORDER); it must not be negative.
        mesh: Where to start.
        tolerance: Change of an element's integral, relative to the whole, below which it is not halved again.

    Returns:
        The mesh and the integral.

    Raises:
        InputError: If the integral does not settle.
    """
    first = mesh.jacobian * function(mesh)
    values, lefts, rights = first, mesh.lefts, mesh.rights
    edges = [mesh.rights[-1:]]
    elements, settled = lefts.size, 0.0
    while lefts.size:
        middles = 0.5 * (lefts + rights)
        halves = Mesh(np.stack([lefts, middles], 1).ravel(), np.stack([middles, rights], 1).ravel())
        finer = halves.jacobian * function(halves)
        parts = (finer @ WEIGHTS).reshape(-1, 2)
        both = parts.sum(axis=1)
        total = settled + float(both.sum())
        if not np.isfinite(total):
            raise InputError("the integrand is not finite", where="integral over [0, 1]")
        # The whole element tests the quadrature, its left half the polynomial that an `Antiderivative` evaluates.
        change = np.maximum(np.abs(both - values @ WEIGHTS), np.abs(parts[:, 0] - values @ _LEFT_HALF))
        done = change <= tolerance * max(total, 1e-300)
        settled += float(both[done].sum())
        edges.append(lefts[done])
        again = np.repeat(~done, 2)
        values, lefts, rights = finer[again], halves.lefts[again], halves.rights[again]
        elements += int((~done).sum())
        if elements > _MAX_ELEMENTS or (lefts.size and float((rights - lefts).min()) < 1e-12):
            raise InputError(
                "the integral did not settle",
                where="integral over [0, 1]",
                hint="The function has a jump or a singularity inside [0, 1]: give it as a knot or smooth it",
            )
    return Mesh.from_edges(np.sort(np.concatenate(edges))), settled


class Antiderivative:
    """The integral from 0 to u of a function given at the nodes of a mesh, evaluated anywhere.

    Args:
        mesh: Elements that touch.
        values: The function at the nodes, shape (E, ORDER).
    """

    def __init__(self, mesh: Mesh, values: Array) -> None:
        scaled = mesh.jacobian * values
        self.mesh = mesh
        self.at_edges: Array = np.concatenate([[0.0], np.cumsum(scaled @ WEIGHTS)])
        self._edges = mesh.edges
        self._coefficients = scaled @ PROJECTION.T

    def __call__(self, t: Array) -> Array:
        """The integral up to u = expit(t); any shape, t within the mesh."""
        flat = t.ravel()
        element = np.clip(np.searchsorted(self._edges, flat, side="right") - 1, 0, self._edges.size - 2)
        left, right = self._edges[element], self._edges[element + 1]
        x = (2.0 * flat - left - right) / (right - left)
        inside, _ = _integrated_series(self._coefficients[element], x)
        return (self.at_edges[element] + inside).reshape(t.shape)

    def inverse(self, levels: Array) -> Array:
        """Where the integral reaches given levels, in t, for a function that is not negative.

        Args:
            levels: Any shape, between 0 and the whole integral.
        """
        flat = levels.ravel()
        element = np.clip(np.searchsorted(self.at_edges, flat, side="left") - 1, 0, self._edges.size - 2)
        coefficients, wanted = self._coefficients[element], flat - self.at_edges[element]
        low, high = np.full(flat.shape, -1.0), np.full(flat.shape, 1.0)
        x = np.zeros(flat.shape)
        todo = np.arange(flat.size)
        # Newton within a shrinking bracket; a step out of the bracket halves it instead.
        for _ in range(60):
            at = x[todo]
            value, slope = _integrated_series(coefficients[todo], at)
            below = value < wanted[todo]
            low[todo], high[todo] = np.where(below, at, low[todo]), np.where(below, high[todo], at)
            newton = at - (value - wanted[todo]) / np.maximum(slope, 1e-300)
            inside = (newton > low[todo]) & (newton < high[todo])
            x[todo] = np.where(inside, newton, 0.5 * (low[todo] + high[todo]))
            todo = todo[np.abs(x[todo] - at) >= 1e-13]
            if not todo.size:
                break
        left, right = self._edges[element], self._edges[element + 1]
        return (0.5 * (left + right) + 0.5 * (right - left) * x).reshape(levels.shape)


def _integrated_series(coefficients: Array, x: Array) -> tuple[Array, Array]:
    """The integral from -1 to x of Legendre series, one per row, and the series at x."""
    # ∫ P_k from -1 to x is (P_{k+1} - P_{k-1}) / (2k+1), and x + 1 for k = 0.
    integral, value = coefficients[:, 0] * (x + 1.0), coefficients[:, 0].copy()
    before, current = np.ones_like(x), x
    for degree in range(1, ORDER):
        following = ((2 * degree + 1) * x * current - degree * before) / (degree + 1)
        integral += coefficients[:, degree] * (following - before) / (2 * degree + 1)
        value += coefficients[:, degree] * current
        before, current = current, following
    return integral, value
