"""The limit for a reward with few levels, where many responses are tied.

The reference puts mass p_l on level l and P_l up to and including it; the policy puts m_l there, and F_l up to and
including it. Ties share the win, so level l is worth v_l, the mean of H0 at P_{l-1} and P_l, and

    W = Σ_l v_l (H(F_l) - H(F_{l-1})),   J = W - β Σ_l m_l log(m_l / p_l).

J is stationary where log(m_l / p_l) = R_l / β - const with R_{l+1} - R_l = h(F_l) (v_{l+1} - v_l) (M17). Given the
mass of the highest level the others follow one by one, downwards; the total must be 1: one equation for one number.
With several prompts each has its own levels, and one β for all maximises the mean of J: the limit is that at a mean KL.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from infalign.errors import InputError
from infalign.numerics.quadrature import expit
from infalign.theory.winrate import Objective

Array = npt.NDArray[np.float64]

SMALLEST_BETA = 1e-4
_SCAN = np.linspace(-40.0, 45.0, 400)
_STEPS = 80
_PARTS = 64
_HALVINGS = 12


def level_masses(ref_rewards_PK: npt.ArrayLike) -> Array:
    """The levels of every prompt's reference rewards.

    A reward that occurs more than once, under any prompt, is a level of its own. One that does not is taken for a piece
    of a continuous reward: its mass is split into many small levels.

    Args:
        ref_rewards_PK: (P, K) rewards of reference responses.

    Returns:
        (P, L) masses from the lowest level to the highest; rows sum to 1 and end in zeros where they have fewer levels.

    Raises:
        InputError: If it is not a table of finite numbers.
    """
    rewards_PK = np.asarray(ref_rewards_PK, dtype=np.float64)
    if rewards_PK.ndim != 2 or not rewards_PK.size or not np.isfinite(rewards_PK).all():
        raise InputError("not a (P, K) table of finite rewards", where="level_masses")
    num_ref = rewards_PK.shape[1]
    values, counts = np.unique(rewards_PK, return_counts=True)
    repeated = values[counts > 1]
    parts = np.full(-(-_PARTS // num_ref), 1.0 / -(-_PARTS // num_ref))
    top = np.append(0.5 ** np.arange(1, _HALVINGS + 1), 0.5**_HALVINGS)
    rows: list[Array] = []
    for rewards_K in rewards_PK:
        levels, times = np.unique(rewards_K, return_counts=True)
        tied = np.isin(levels, repeated)
        pieces = [np.ones(1) if atom else parts for atom in tied]
        if not tied[-1]:
            pieces[-1] = top
        rows.append(np.concatenate([count * piece for count, piece in zip(times, pieces, strict=True)]) / num_ref)
    longest = max(row.size for row in rows)
    return np.stack([np.pad(row, (0, longest - row.size)) for row in rows])


@dataclass(frozen=True, eq=False)
class LevelOptimum:
    """The best policy over levels at one β, averaged over prompts: mean KL in nats, mean W."""

    beta: float
    kl: float
    win_rate: float


class LevelOptima:
    """The optima of one objective over given levels, for `infalign.theory.envelope.Envelope`.

    Args:
        objective: The win rate W.
        levels: Masses from the lowest level to the highest, (L,) or one row for each prompt, (P, L); 0 for no level.

    Raises:
        InputError: If a mass is negative or not finite, or a row does not sum to 1.
    """

    smallest_beta = SMALLEST_BETA

    def __init__(self, objective: Objective, levels: npt.ArrayLike) -> None:
        try:
            masses = np.atleast_2d(np.asarray(levels, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise InputError(
                "not a table of numbers with equally many levels for every prompt",
                where="levels",
                hint="Give (L,) or (P, L) masses; fill rows that have fewer levels with zeros",
            ) from error
        if masses.ndim != 2 or not masses.size or not (np.isfinite(masses).all() and masses.min() >= 0):
            raise InputError("a mass is negative or not finite", where="levels", hint="Give (L,) or (P, L) masses")
        if np.abs(masses.sum(axis=1) - 1.0).max() > 1e-6:
            raise InputError("the masses of a prompt do not sum to 1", where="levels")
        # Levels without mass go to the front, so that the last one is the highest of every row.
        lasting = masses.shape[1] - np.argmax(masses[:, ::-1] > 0, axis=1)
        masses = np.stack([np.roll(row, -last) for row, last in zip(masses, lasting, strict=True)])
        rows, counts = np.unique(masses, axis=0, return_counts=True)
        self.objective = objective
        self.smooth = objective.concave
        self._share: Array = counts / counts.sum()
        self._mass: Array = rows / rows.sum(axis=1, keepdims=True)
        edges = np.clip(np.cumsum(self._mass, axis=1), 0.0, 1.0)
        edges[:, -1] = 1.0
        edges = np.concatenate([np.zeros((len(rows), 1)), edges], axis=1)
        heights = [opponent.distortion(edges) for *_, opponent in objective.terms]
        self._values = [0.5 * (height[:, 1:] + height[:, :-1]) for height in heights]
        self._log_mass = np.log(np.maximum(self._mass, 1e-300))

    @property
    def reference_win_rate(self) -> float:
        """W of the reference itself."""
        return self._measured(self._mass)[1]

    @property
    def end(self) -> tuple[float, float]:
        """KL and W of the policy that always gives the best response of a prompt."""
        policy = np.zeros_like(self._mass)
        policy[:, -1] = 1.0
        return self._measured(policy)

    def solve(self, beta: float, near: object = ()) -> LevelOptimum:
        """The best policy at one β; `near` is not needed."""
        structures = len(self._mass)
        if self.smooth:
            top = self._root(beta, np.full(structures, _SCAN[0]), np.full(structures, _SCAN[-1]))
            return LevelOptimum(beta, *self._measured(self._policy(beta, top)))
        excess = self._excess(beta, np.broadcast_to(_SCAN[:, None], (_SCAN.size, structures)))
        order = np.cumsum((excess[:-1] < 0) != (excess[1:] < 0), axis=0)
        best, best_value = self._mass, np.full(structures, -np.inf)
        for which in range(1, max(int(order.max()), 1) + 1):
            at = np.where(order[-1] >= which, np.argmax(order >= which, axis=0), _SCAN.size - 2)
            policy = self._policy(beta, self._root(beta, _SCAN[at], _SCAN[at + 1]))
            kl, win_rate = self._per_prompt(policy)
            better = win_rate - beta * kl > best_value
            best = np.where(better[:, None], policy, best)
            best_value = np.where(better, win_rate - beta * kl, best_value)
        return LevelOptimum(beta, *self._measured(best))

    def _logs(self, beta: float, top: Array) -> Array:
        """Log masses of all levels, (..., S, L), given the highest's: p + (1 - p) expit(top)."""
        highest = self._mass[:, -1]
        above_p = (1.0 - highest) * expit(top)
        ratio = np.log1p(above_p / highest)
        below = (1.0 - highest) * expit(-top)
        logs = np.empty((*top.shape, self._mass.shape[1]))
        logs[..., -1] = self._log_mass[:, -1] + ratio
        for level in range(self._mass.shape[1] - 2, -1, -1):
            for (weight, part, _), values in zip(self.objective.terms, self._values, strict=True):
                rise = weight / beta * (values[:, level + 1] - values[:, level])
                ratio = ratio - part.density(below) * rise
            logs[..., level] = self._log_mass[:, level] + ratio
            below = np.clip(below - np.exp(logs[..., level]), 0.0, 1.0)
        return logs

    def _excess(self, beta: float, top: Array) -> Array:
        """Log of the mass that the lower levels get over the mass that is left for them."""
        logs = self._logs(beta, top)[..., :-1]
        lower = np.exp(logs).sum(axis=-1) if logs.shape[-1] else np.zeros(top.shape)
        left = (1.0 - self._mass[:, -1]) * expit(-top)
        return np.log(np.maximum(lower, 1e-300)) - np.log(np.maximum(left, 1e-300))

    def _root(self, beta: float, low: Array, high: Array) -> Array:
        """Where the excess is 0: false position, with bisection where that is slow; the end if it never is."""
        low, high = low.copy(), high.copy()
        at_low, at_high = self._excess(beta, low), self._excess(beta, high)
        for step in range(_STEPS):
            width = np.where(at_high == at_low, 1.0, at_high - at_low)
            share = np.clip(-at_low / width, 0.01, 0.99) if step % 3 < 2 else np.full(low.shape, 0.5)
            middle = low + share * (high - low)
            value = self._excess(beta, middle)
            left = (value < 0) == (at_low < 0)
            low, at_low = np.where(left, middle, low), np.where(left, value, at_low)
            high, at_high = np.where(left, high, middle), np.where(left, at_high, value)
            if (high - low).max() < 1e-13 or np.minimum(np.abs(at_low), np.abs(at_high)).max() < 1e-13:
                break
        return np.where(np.abs(at_low) < np.abs(at_high), low, high)

    def _policy(self, beta: float, top: Array) -> Array:
        """Masses (S, L), normalised."""
        policy = np.where(self._mass > 0, np.exp(self._logs(beta, top)), 0.0)
        return policy / policy.sum(axis=1, keepdims=True)

    def _per_prompt(self, policy: Array) -> tuple[Array, Array]:
        ratio = np.where(policy > 0, np.log(np.maximum(policy, 1e-300)) - self._log_mass, 0.0)
        kl = (policy * ratio).sum(axis=1)
        edges = np.clip(np.cumsum(policy, axis=1), 0.0, 1.0)
        edges = np.concatenate([np.zeros((len(policy), 1)), edges], axis=1)
        edges[:, -1] = 1.0
        win_rate = sum(
            weight * (values * np.diff(part.distortion(edges), axis=1)).sum(axis=1)
            for (weight, part, _), values in zip(self.objective.terms, self._values, strict=True)
        )
        return np.maximum(kl, 0.0), np.asarray(win_rate)

    def _measured(self, policy: Array) -> tuple[float, float]:
        """Mean KL and W over prompts."""
        kl, win_rate = self._per_prompt(policy)
        return float(self._share @ kl), float(self._share @ win_rate)
