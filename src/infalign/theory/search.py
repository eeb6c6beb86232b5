"""Where J = W - β KL has several stationary points (M18): which of them is the best.

On a grid the problem is a shortest path. F climbs from 0 to 1 while u does; in one cell of u a step from q to q' costs

    β Δq log(Δq/Δu) + the loss of the cell, ∫ H(F) h0 du,

so dynamic programming finds the best path on the grid among all there are, wherever J has other stationary points. The
path is a start that lies in the right basin. Newton's method (`solver`) then solves M9 from there to full accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from infalign.numerics.quadrature import T_END, Mesh, expit
from infalign.procedures import InferenceProcedure
from infalign.theory.solver import Solution, refine, solve
from infalign.theory.winrate import Objective

Array = npt.NDArray[np.float64]

_FINE_T = np.linspace(-T_END, T_END, 4001)
_QUANTILES = 40
_WORSE = 1e-9
_ALIKE = 0.05
"""Starts whose F differ by less, and solutions for nearby β, are of one basin."""

_ON_PATH = 0.01
_ASCENT_ROUNDS = (10, 40, 160)


class GlobalSearch:
    """The shortest path of one objective: its grid and tables do not depend on β.

    Args:
        objective: The win rate W.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        reach = 6.0 + np.log(max(2.0, *(side.n or 2 for _, *sides in objective.terms for side in sides)))
        middle, far = min(reach, 16.0), np.arange(min(reach, 16.0), 42.0, 0.8)
        terms = objective.terms
        self._t: Array = np.unique(
            np.concatenate(
                [[-T_END, T_END], np.arange(-middle, middle, 0.1), far, *_quantiles([term[2] for term in terms])]
            )
        )
        q_t = np.unique(np.concatenate([np.arange(-middle, middle, 0.1), *_quantiles([term[1] for term in terms])]))
        self._q: Array = np.concatenate([[0.0], expit(q_t), [1.0]])
        edges = expit(self._t)
        edges[0], edges[-1] = 0.0, 1.0
        self._log_widths = np.log(np.maximum(expit(-self._t[:-1]) - expit(-self._t[1:]), 1e-300))
        # Half the loss of a cell belongs to the level at its left edge, half to that at its right (trapezoidal rule).
        self._half_loss: Array = np.sum(
            [
                0.5 * weight * np.diff(opponent.distortion(edges))[:, None] * part.distortion(self._q)
                for weight, part, opponent in terms
            ],
            axis=0,
        )
        rise = self._q[:, None] - self._q
        with np.errstate(divide="ignore", invalid="ignore"):
            self._entropy: Array = np.where(rise > 0, rise * np.log(rise), np.where(rise == 0, 0.0, np.inf))

    def path(self, beta: float) -> tuple[Array, Array]:
        """The best F on the grid: edges in t, and F there."""
        entropy, levels = beta * self._entropy, np.arange(self._q.size)
        value = np.full(self._q.size, np.inf)
        value[0] = 0.0
        choice = np.empty((self._log_widths.size, self._q.size), dtype=np.intp)
        for cell, log_width in enumerate(self._log_widths):
            # β Δq log Δu is a difference of what q' pays and what q is given back.
            width, loss = beta * log_width * self._q, self._half_loss[cell]
            cost = entropy + (value + loss + width)
            choice[cell] = cost.argmin(axis=1)
            value = cost[levels, choice[cell]] + loss - width
        path = np.empty(choice.shape[0] + 1, dtype=np.intp)
        path[-1] = self._q.size - 1
        for cell in range(choice.shape[0] - 1, -1, -1):
            path[cell] = choice[cell, path[cell + 1]]
        return self._t, self._q[path]

    def solve(self, beta: float, near: Sequence[Solution] = ()) -> Solution:
        """The best stationary density of J at one β.

        Args:
            beta: KL coefficient.
            near: Solutions for other β to start from as well.

        Raises:
            InputError: If no solution is found.
        """
        found: list[Solution] = []
        for start in self._unlike(near, beta):
            solution = refine(self.objective, beta, start)
            found += [] if solution is None else [solution]
        found += self._from_path(beta, found)
        if not found:
            return solve(self.objective, beta)
        return max(found, key=lambda solution: solution.value)

    def _unlike(self, near: Sequence[Solution], beta: float) -> list[Solution]:
        """One start of each kind, the nearest in β."""
        kept: list[Solution] = []
        for start in sorted(near, key=lambda start: abs(np.log(start.beta / beta))):
            at_edges = start.cdf_at(self._t)
            if all(np.abs(other.cdf_at(self._t) - at_edges).max() > _ALIKE for other in kept):
                kept.append(start)
        return kept

    def _from_path(self, beta: float, found: Sequence[Solution]) -> list[Solution]:
        """What Newton's method finds from the path and from the reference; from the path's basin if it left it."""
        edges, cdf = self.path(beta)
        if any(np.abs(solution.cdf_at(edges) - cdf).max() < _ON_PATH for solution in found):
            return []
        mesh = Mesh.from_edges(edges)
        density = np.repeat((np.diff(cdf) / np.exp(self._log_widths))[:, None], mesh.t.shape[1], axis=1)
        least = _value(self.objective, beta, mesh, density)
        starts: list[Solution] = []
        solution = refine(self.objective, beta, (edges, cdf))
        if solution is not None:
            starts.append(solution)
        best = max((other.value for other in [*starts, *found]), default=-np.inf)
        logs = np.log(np.maximum(density, 1e-300))
        for rounds in _ASCENT_ROUNDS:
            if best >= least - _WORSE:
                break
            logs, least = _ascend(self.objective, beta, mesh, logs, rounds)
            at_edges = mesh.cumulative(np.exp(logs))[1]
            solution = refine(self.objective, beta, (edges, at_edges / at_edges[-1]))
            if solution is not None:
                starts.append(solution)
                best = max(best, solution.value)
        return starts


def _quantiles(sides: Sequence[InferenceProcedure]) -> list[Array]:
    """Where the distortions rise, in t: a narrow procedure gets its grid points there."""
    levels = np.linspace(0.0, 1.0, max(_QUANTILES // len(sides), 10) + 2)[1:-1]
    return [
        np.interp(levels, side.distortion(expit(_FINE_T)), _FINE_T)
        for i, side in enumerate(sides)
        if side not in sides[:i]
    ]


def _value(objective: Objective, beta: float, mesh: Mesh, density: Array) -> float:
    """J of a density given at the nodes."""
    cdf, edges = mesh.cumulative(density)
    density, cdf = density / edges[-1], np.clip(cdf / edges[-1], 0.0, 1.0)
    loss = mesh.integral(objective.loss_density(cdf, objective.opponent_densities(mesh.u)))
    kl = mesh.integral(np.where(density > 0, density * np.log(np.maximum(density, 1e-300)), 0.0))
    return 1.0 - loss - beta * kl


def _ascend(objective: Objective, beta: float, mesh: Mesh, logs: Array, rounds: int) -> tuple[Array, float]:
    """Mirror ascent on J: log f moves towards R/β, by a part that shrinks until J grows. It cannot leave its basin."""
    opponents = objective.opponent_densities(mesh.u)
    value, part = _value(objective, beta, mesh, np.exp(logs)), 0.5
    for _ in range(rounds):
        cdf, edges = mesh.cumulative(np.exp(logs))
        reward, _ = mesh.cumulative(objective.reward_slope(np.clip(cdf / edges[-1], 0.0, 1.0), opponents))
        while True:
            trial = (1.0 - part) * logs + part * reward / beta
            trial = trial - trial.max()
            trial = trial - np.log(mesh.integral(np.exp(trial)))
            following = _value(objective, beta, mesh, np.exp(trial))
            if following >= value or part < 1e-4:
                break
            part *= 0.5
        if following <= value + 1e-14:
            break
        logs, value, part = trial, following, min(1.5 * part, 1.0)
    return logs, value
