"""The boundary value problem of M9, by Newton's method on Gauss collocation with an adaptive mesh.

M9 asks for a CDF F with F = 𝒢(F): take R = ∫ h(F) h0, then the CDF of the density exp(R/β)/Z. 𝒢 maps any function with
values in [0, 1] to a CDF, so Newton on F - 𝒢(F) always works with bounded quantities, however small β is. With
ψ = 𝒢(F) + D𝒢 δ - F - (𝒢(F) - F), the linearised problem is the two-point problem

    ψ' = f λ,  λ' = (∂_F R') (ψ + r) / β,  ψ(0) = ψ(1) = 0,  r = 𝒢(F) - F,

solved element by element (collocation) and across elements by a banded system; the step is δ = ψ + r.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from infalign.errors import InputError
from infalign.numerics.quadrature import CUMULATIVE, ORDER, WEIGHTS, Antiderivative, Mesh, adapt, expit, mesh_with_knots
from infalign.theory.winrate import Objective

Array = npt.NDArray[np.float64]

SMALLEST_BETA = 1e-7
"""Below it, rounding of R spoils R/β."""

_CDF_TOLERANCE = 1e-12
"""Largest discretisation error of F per element, where rounding allows it."""

_REWARD_TOLERANCE = 1e-11
"""Largest discretisation error of R per element, relative to its range or to 1."""

_NEWTON_TOLERANCE = 1e-12
_MAX_STEPS = 40
_MAX_ROUNDS = 40
_MAX_ELEMENTS = 4000


@dataclass(frozen=True, eq=False)
class Solution:
    """The optimal density on its own mesh.

    Attributes:
        objective: The win rate that was maximised.
        beta: KL coefficient.
        mesh: Elements that resolve the solution.
        reward_slope: R' at the nodes, shape (E, ORDER).
        density: f at the nodes.
        cdf: F at the nodes.
        log_partition: log ∫ exp(R/β) with R(0) = 0.
        kl: KL(π‖p) in nats.
        win_rate: W of the objective.
    """

    objective: Objective
    beta: float
    mesh: Mesh
    reward_slope: Array
    density: Array
    cdf: Array
    log_partition: float
    kl: float
    win_rate: float

    @property
    def value(self) -> float:
        """J = W - β KL."""
        return self.win_rate - self.beta * self.kl

    def cdf_at(self, t: Array) -> Array:
        """F at points given in the logit coordinate."""
        return np.clip(Antiderivative(self.mesh, self.density)(t), 0.0, 1.0)


@dataclass(frozen=True, eq=False)
class _Image:
    """What 𝒢 makes of F, at the nodes of the mesh."""

    slope: Array
    reward: Array
    density: Array
    cdf: Array
    log_partition: float
    log_peak: float
    residual: float


def solve(objective: Objective, beta: float, start: Solution | None = None) -> Solution:
    """The stationary density of W - β KL (M9).

    Args:
        objective: The win rate W.
        beta: KL coefficient, positive.
        start: A solution for a nearby β; the reference itself (F(u) = u) if None.

    Raises:
        InputError: If no solution is found: h jumps, or β is below about 1e-7.
    """
    closed_form = objective.against_one_sample and not objective.concave
    if closed_form:
        found = _solve_from(objective, beta, *_against_one_sample(objective, beta))
    elif start is None:
        found = _solve_from(objective, beta, _first_mesh(objective), lambda mesh: mesh.u)
    else:
        found = _solve_from(objective, beta, start.mesh, _cdf_function(start.mesh, start.density))
    if found is not None:
        return found
    # Newton did not converge from there: follow the solution down from a larger β, unless the start was the solution.
    followed = None if closed_form else _follow(objective, beta)
    if followed is None:
        raise InputError(
            f"no optimal transform was found for beta = {beta:g}",
            where="optimal_transform",
            hint="Use a larger beta; a procedure whose density h jumps or has no bound must be smoothed first",
        )
    return followed


def refine(objective: Objective, beta: float, start: Solution | tuple[Array, Array]) -> Solution | None:
    """The stationary density that Newton's method finds from a start; None if it does not converge.

    Args:
        objective: The win rate W.
        beta: KL coefficient, positive.
        start: A solution for another β, or F as edges in the logit coordinate and its values there.
    """
    if isinstance(start, Solution):
        return _solve_from(objective, beta, start.mesh, _cdf_function(start.mesh, start.density))
    edges, cdf = start
    for mesh in (_first_mesh(objective), Mesh.from_edges(edges)):
        found = _solve_from(objective, beta, mesh, lambda mesh: np.interp(mesh.t, edges, cdf))
        if found is not None:
            return found
    return None


def _against_one_sample(objective: Objective, beta: float) -> tuple[Mesh, Callable[[Mesh], Array]]:
    """The closed form of M9 where h0 = 1, as a start: f' = h(F) f/β, so f = f(0) + H(F)/β and du = dF/f.

    f(0) is the one number with ∫ dF/f = 1. Where it is below 1e-20 (Worst-of-N at a small β), u is measured from 1.
    """
    from scipy import optimize  # pyright: ignore[reportMissingTypeStubs]

    scipy_optimize: Any = optimize

    def inverse_density(lowest: float) -> Callable[[Mesh], Array]:
        return lambda mesh: 1.0 / (lowest + objective.weighted_distortion(mesh.u) / beta)

    def excess(log_lowest: float) -> float:
        return adapt(inverse_density(math.exp(log_lowest)), mesh_with_knots(), 1e-10)[1] - 1.0

    least = -46.0
    root = least if excess(least) <= 0 else scipy_optimize.brentq(excess, least, 1e-9, xtol=1e-8)
    mesh, total = adapt(inverse_density(math.exp(root)), mesh_with_knots())
    rank = Antiderivative(mesh, inverse_density(math.exp(root))(mesh))

    def cdf(mesh: Mesh) -> Array:
        below = total - expit(-mesh.t)
        return np.where(below > 0, expit(rank.inverse(np.clip(below, 0.0, total))), 0.0)

    fine, _ = adapt(  # R/β is what must be resolved
        lambda mesh: objective.reward_slope(cdf(mesh), objective.opponent_densities(mesh.u)),
        _first_mesh(objective),
        min(1e-8, max(1e-8 * beta, 1e-13)),
    )
    return fine, cdf


def _follow(objective: Objective, beta: float) -> Solution | None:
    """Continuation in β from where the problem is easy; None if it gets stuck."""
    mesh = _first_mesh(objective)
    # Where β exceeds the range of R, the solution is close to the reference. R at the reference is a first guess of
    # that range: an opponent weaker than the procedure lets R grow far beyond it.
    current = max(mesh.integral(objective.reward_slope(mesh.u, objective.opponent_densities(mesh.u))), beta)
    found = None
    for _ in range(8):
        found = _solve_from(objective, current, mesh, lambda mesh: mesh.u)
        if found is not None:
            break
        current *= 10.0
    factor = 10.0
    while found is not None and current > beta:
        target = max(current / factor, beta)
        following = _solve_from(objective, target, found.mesh, _cdf_function(found.mesh, found.density))
        if following is None:
            factor = factor**0.5
            if factor < 1.02:
                break
        else:
            found, current = following, target
            factor = min(factor**1.5, 10.0)
    return None if current > beta else found


def _solve_from(objective: Objective, beta: float, mesh: Mesh, cdf: Callable[[Mesh], Array]) -> Solution | None:
    """Newton on ever finer meshes; None if it does not converge."""
    for _ in range(_MAX_ROUNDS):
        opponents = objective.opponent_densities(mesh.u)
        image = _newton(objective, beta, mesh, opponents, cdf(mesh))
        if image is None:
            return None
        tolerance = max(_CDF_TOLERANCE, _noise(objective, beta, mesh, opponents, image))
        coarse = _unresolved(objective, beta, mesh, image, tolerance)
        if not coarse.any():
            return _finish(objective, beta, mesh, opponents, image)
        mesh, cdf = _halved(mesh, coarse), _cdf_function(mesh, image.density)
        if mesh.lefts.size > _MAX_ELEMENTS:
            return None
    return None


def _image(objective: Objective, beta: float, mesh: Mesh, opponents: list[Array], cdf: Array) -> _Image:
    """𝒢(F) and everything on the way."""
    slope = objective.reward_slope(cdf, opponents)
    reward, edges = mesh.cumulative(slope)
    # R increases; where a coarse mesh says otherwise the mesh is refined later.
    weight = np.exp(np.minimum(reward - edges[-1], 0.0) / beta)
    mass, mass_edges = mesh.cumulative(weight)
    total = float(mass_edges[-1])
    if not total > 0.0:
        raise InputError(
            f"for beta = {beta:g} all mass is closer to an end point than numbers can resolve",
            where="optimal_transform",
            hint="Use a larger beta",
        )
    image = np.clip(mass / total, 0.0, 1.0)
    return _Image(
        slope=slope,
        reward=reward,
        density=weight / total,
        cdf=image,
        log_partition=float(edges[-1]) / beta + float(np.log(total)),
        log_peak=-float(np.log(total)),
        residual=float(np.abs(image - cdf).max()),
    )


def _newton(objective: Objective, beta: float, mesh: Mesh, opponents: list[Array], cdf: Array) -> _Image | None:
    """Damped Newton for F = 𝒢(F) on a fixed mesh."""
    image = _image(objective, beta, mesh, opponents, cdf)
    for _ in range(_MAX_STEPS):
        converged = image.residual < _NEWTON_TOLERANCE
        try:
            step = _newton_step(objective, beta, mesh, opponents, cdf, image)
        except np.linalg.LinAlgError:
            return None
        length = 1.0
        while True:
            trial = np.clip(cdf + length * step, 0.0, 1.0)
            following = _image(objective, beta, mesh, opponents, trial)
            if following.residual < (1.0 - 0.1 * length) * image.residual:
                break
            if converged:
                return image
            length *= 0.5
            if length < 1e-3:
                noise = _noise(objective, beta, mesh, opponents, image)
                return image if image.residual < max(100 * _NEWTON_TOLERANCE, noise) else None
        if converged:
            # One step beyond the tolerance costs little and squares what is left: R is far more sensitive than F.
            return following
        cdf, image = trial, following
    return None


def _newton_step(
    objective: Objective, beta: float, mesh: Mesh, opponents: list[Array], cdf: Array, image: _Image
) -> Array:
    """The step δ = ψ + r of the linearised two-point problem (module docstring)."""
    residual = image.cdf - cdf
    by_density = CUMULATIVE * (mesh.jacobian * image.density)[:, None, :]
    growth = mesh.jacobian * objective.reward_slope_by_cdf(cdf, opponents) / beta
    by_growth = CUMULATIVE * growth[:, None, :]
    coupling = by_density @ by_growth
    elements = cdf.shape[0]

    # Inside an element: ψ at the nodes as an affine function of (ψ, λ) at its left edge.
    sides = np.empty((elements, ORDER, 3))
    sides[..., 0] = 1.0
    sides[..., 1] = by_density.sum(axis=2)
    sides[..., 2] = (coupling @ residual[..., None])[..., 0]
    inner = np.linalg.solve(np.eye(ORDER) - coupling, sides)
    moved = inner.copy()
    moved[..., 2] += residual
    slopes = by_growth @ moved
    slopes[..., 1] += 1.0
    across = np.empty((elements, 2, 3))
    across[:, 0] = ((WEIGHTS * mesh.jacobian * image.density)[:, None, :] @ slopes)[:, 0]
    across[:, 1] = ((WEIGHTS * growth)[:, None, :] @ moved)[:, 0]
    across[:, 0, 0] += 1.0
    across[:, 1, 1] += 1.0

    # Between elements: unknowns (ψ, λ) at every edge, ψ = 0 at both ends. Banded, two below and one above the diagonal.
    size = 2 * elements + 2
    band, right = np.zeros((4, size)), np.zeros(size)
    band[1, 0] = band[2, size - 2] = 1.0
    band[2, 0:-2:2], band[1, 1:-1:2], band[0, 2::2] = across[:, 0, 0], across[:, 0, 1], -1.0
    band[3, 0:-2:2], band[2, 1:-1:2], band[0, 3::2] = across[:, 1, 0], across[:, 1, 1], -1.0
    right[1:-1:2], right[2:-1:2] = -across[:, 0, 2], -across[:, 1, 2]
    edges = _solve_banded(band, right)
    psi = inner[..., 0] * edges[0:-2:2, None] + inner[..., 1] * edges[1:-1:2, None] + inner[..., 2]
    return psi + residual


def _solve_banded(band: Array, right: Array) -> Array:
    # Imported here: scipy.linalg is slow to load and only the solver needs it.
    from scipy import linalg  # pyright: ignore[reportMissingTypeStubs]

    scipy_linalg: Any = linalg
    return cast(Array, scipy_linalg.solve_banded((2, 1), band, right, overwrite_ab=True, check_finite=False))


def _noise(objective: Objective, beta: float, mesh: Mesh, opponents: list[Array], image: _Image) -> float:
    """What rounding alone does to F: F is known to a relative 1e-16, R' follows it, and R is divided by β."""
    sensitivity = mesh.integral(image.cdf * np.abs(objective.reward_slope_by_cdf(image.cdf, opponents)))
    return 8.0 * np.finfo(np.float64).eps * (1.0 + (sensitivity + float(image.reward[-1, -1])) / beta)


def _unresolved(
    objective: Objective, beta: float, mesh: Mesh, image: _Image, tolerance: float
) -> npt.NDArray[np.bool_]:
    """Which elements change when they are halved: F by more than the tolerance, or R by as much as matters."""
    halves = _halved(mesh, np.ones(mesh.lefts.size, dtype=bool))
    cdf_function, reward_function = Antiderivative(mesh, image.density), Antiderivative(mesh, image.slope)
    cdf, reward = cdf_function(halves.t), reward_function(halves.t)
    slope = objective.reward_slope(np.clip(cdf, 0.0, 1.0), objective.opponent_densities(halves.u))
    density = np.exp(np.minimum(reward - reward_function.at_edges[-1], 0.0) / beta + image.log_peak)

    def change(coarse_at_nodes: Array, coarse: Antiderivative, fine: Array) -> Array:
        at_nodes, at_edges = halves.cumulative(fine)
        drift = (coarse_at_nodes - at_nodes).reshape(mesh.lefts.size, -1)
        return np.abs(drift - (coarse.at_edges - at_edges[::2])[:-1, None]).max(axis=1)

    # An error of R shifts log f on one side of it against the other: it matters as far as both sides carry mass.
    edges = np.clip(cdf_function.at_edges, 0.0, 1.0)
    carried = np.minimum(edges[1:], 1.0 - edges[:-1])
    reward_error = change(reward, reward_function, slope)
    return (
        (change(cdf, cdf_function, density) > tolerance)
        | (reward_error * carried > tolerance * beta)
        | (reward_error > _REWARD_TOLERANCE * max(1.0, float(image.reward[-1, -1])))
    )


def _halved(mesh: Mesh, which: npt.NDArray[np.bool_]) -> Mesh:
    edges = mesh.edges
    return Mesh.from_edges(np.sort(np.concatenate([edges, 0.5 * (mesh.lefts + mesh.rights)[which]])))


def _cdf_function(mesh: Mesh, density: Array) -> Callable[[Mesh], Array]:
    cdf = Antiderivative(mesh, density)
    return lambda other: np.clip(cdf(other.t), 0.0, 1.0)


def _first_mesh(objective: Objective) -> Mesh:
    """A mesh that resolves R' at the reference, so that a narrow peak of the procedure is not overlooked."""
    mesh, _ = adapt(
        lambda mesh: objective.reward_slope(mesh.u, objective.opponent_densities(mesh.u)), mesh_with_knots(), 1e-6
    )
    return mesh


def _finish(objective: Objective, beta: float, mesh: Mesh, opponents: list[Array], image: _Image) -> Solution:
    density = image.density
    logs = image.reward / beta - image.log_partition
    kl = mesh.integral(np.where(density > 0, density * logs, 0.0) - density + 1.0)
    return Solution(
        objective=objective,
        beta=beta,
        mesh=mesh,
        reward_slope=objective.reward_slope(image.cdf, opponents),
        density=density,
        cdf=image.cdf,
        log_partition=image.log_partition,
        kl=max(kl, 0.0),  # rounding alone can make it negative, where the policy is the reference
        win_rate=1.0 - mesh.integral(objective.loss_density(image.cdf, opponents)),
    )
