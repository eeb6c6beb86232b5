"""The optimum of the channel at a KL, and the limit over KLs (M15, M18)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from infalign.errors import InputError
from infalign.procedures import InferenceProcedure, Standard, WorstOfN
from infalign.theory.beta_for_kl import checked_kl
from infalign.theory.channel import SMALLEST_BETA, ChannelOptimum, check_predictability, ideal, of_solved
from infalign.theory.channel_solver import Solved, solve
from infalign.theory.envelope import FLAT_BETA
from infalign.theory.winrate import Objective
from infalign.transforms import positive_number

Array = npt.NDArray[np.float64]

_LARGEST_BETA = 1e6
_MILD_BETA = 1e3
_KL_TOLERANCE = 1e-9
_TINY_KL = 1e-9
_SMALLEST_KL = 1e-10


@dataclass
class Path:
    """Optima of one problem at several β; each serves the next as a start.

    Attributes:
        objective: The win rate.
        predictability: ρ.
        known: Optima by β.
        thorough: Whether every β is started from shapes of all kinds (M18), not just from its neighbours.
    """

    objective: Objective
    predictability: float
    known: dict[float, Solved] = field(default_factory=dict[float, Solved])
    thorough: bool = False

    def at(self, beta: float) -> Solved:
        """The optimum at a β."""
        if beta not in self.known:
            near = sorted(self.known, key=lambda other: abs(math.log(other / beta)))
            sides = [[b for b in near if (b > beta) == side][:1] for side in (True, False)]
            # An optimum that came first at smaller β may still be the best here, so both neighbours are tried (M18).
            starts = near[:1] if self.objective.concave else [b for side in sides for b in side]
            near_enough = [self.known[b] for b in starts if abs(math.log(b / beta)) < math.log(30.0)]
            self.known[beta] = solve(self.objective, beta, self.predictability, near_enough, thorough=self.thorough)
        return self.known[beta]

    def around(self, kl: float) -> tuple[Solved, Solved]:
        """Optima on either side of a KL, less of it and more: one and the same where the KL is met.

        Between two different ones of the same β nothing is optimal.

        Raises:
            InputError: If the KL is out of reach, with the reachable range.
        """
        low, high = self._bracket(kl)  # in log β: KL falls
        at_low, at_high = self.at(math.exp(low)), self.at(math.exp(high))
        fraction = None
        for step in range(100):
            more, less = at_low.policy.kl, at_high.policy.kl
            for solved in (at_low, at_high):
                if abs(solved.policy.kl - kl) <= _KL_TOLERANCE * kl:
                    return solved, solved
            if high - low < 1e-10 or more <= less:
                break
            # The secant in log KL, held away from the ends of the bracket; every third step halves it.
            fraction = math.log(more / kl) / math.log(more / less) if step < 12 and step % 3 < 2 and less > 0 else 0.5
            width = high - low
            middle = low + min(max(fraction, 1e-4), 1.0 - 1e-4) * width
            if not low < middle < high:
                break
            try:
                found = self.at(math.exp(middle))
            except InputError:  # only where β is hardly resolved any more
                break
            if found.policy.kl >= kl:
                low, at_low = middle, found
            else:
                high, at_high = middle, found
        if abs(at_low.policy.kl / at_high.policy.kl - 1.0) < 1e-6:
            return at_low, at_low
        return at_high, at_low

    def _bracket(self, kl: float) -> tuple[float, float]:
        near = min(self.known, key=lambda b: abs(math.log(max(self.known[b].policy.kl, 1e-300) / kl)), default=0.3)
        low = high = math.log(near)
        while self.at(math.exp(high)).policy.kl > kl:
            low, high = high, high + math.log(4.0)
            if high > math.log(_LARGEST_BETA):
                raise self._out_of_reach(kl, f"at least {self.at(math.exp(low)).policy.kl:.3g}")
        step = math.log(4.0)
        while self.at(math.exp(low)).policy.kl < kl:
            if low <= math.log(SMALLEST_BETA) + 1e-9:
                raise self._out_of_reach(kl, f"at most {self.at(math.exp(low)).policy.kl:.4g}")
            ahead = max(low - step, math.log(SMALLEST_BETA))
            try:
                self.at(math.exp(ahead))
            except InputError as error:
                if step < 0.3:
                    most = self.at(math.exp(low)).policy.kl
                    raise self._out_of_reach(kl, f"at most {most:.4g}") from error
                step /= 2
                continue
            low, high = ahead, low
        return low, high

    def _out_of_reach(self, kl: float, reach: str) -> InputError:
        return InputError(
            f"a KL of {kl:g} nats is out of reach at a predictability of {self.predictability:g}",
            where="kl_budget",
            hint=f"The reachable KL is {reach} nats",
        )

    def checked(self, kl: float) -> tuple[Solved, Solved]:
        """`around` a KL, after a search from shapes of all kinds where there may be several optima (M18)."""
        pair = self.around(kl)
        if self.objective.concave:
            return pair
        if not self.thorough:
            best = solve(self.objective, pair[0].problem.beta, self.predictability, pair, thorough=True)
            # Both sides of a jump must be as good as the best, or the jump is elsewhere.
            if best.value > min(one.value for one in pair) + 1e-8:
                self.thorough, self.known = True, {}
                pair = self.around(kl)
        return pair


def channel_optimum_at_kl(
    procedure: InferenceProcedure, kl: float, predictability: float, opponent: InferenceProcedure | None = None
) -> ChannelOptimum:
    """The optimum of the channel (M15) that spends a given KL, to 1e-9 relative.

    Args:
        procedure: What is done with the aligned policy.
        kl: KL(π‖p) in nats per response.
        predictability: ρ.
        opponent: What is done with the reference; the same procedure if None.

    Raises:
        InputError: If the KL is out of reach or falls in a gap between two optima; the message names the range.
    """
    if check_predictability(predictability) == 1.0:
        from infalign.theory.plan import optimum_at_kl

        return ideal(optimum_at_kl(procedure, kl, opponent))
    kl = checked_kl(kl, _SMALLEST_KL)
    less, more = Path(Objective.of(procedure, opponent), predictability).checked(kl)
    if less is not more and less.problem.beta > more.problem.beta * (1 + 1e-9):
        raise InputError(
            f"a KL of {kl:g} nats cannot be met at a predictability of {predictability:g}: rounding is in the way",
            where="kl_budget",
            hint=f"Use {less.policy.kl:.4g} nats or less",
        )
    if less is not more:
        raise InputError(
            f"no single policy is the best at {kl:g} nats: at beta = {less.problem.beta:.4g} the optimum jumps from "
            f"{less.policy.kl:.4g} to {more.policy.kl:.4g} nats",
            where="kl_budget",
            hint="Use a KL outside this gap",
        )
    return of_solved(procedure, opponent, less)


def channel_limit(
    procedure: InferenceProcedure, kls: npt.ArrayLike, predictability: float, opponent: InferenceProcedure | None = None
) -> Array:
    """The best win rate at each KL for a policy of limited predictability (M15), the concave envelope over β (M18).

    Args:
        procedure: What is done with the policy.
        kls: KLs in nats, at least 0, any shape.
        predictability: ρ.
        opponent: What is done with the reference; the same procedure if None.

    Returns:
        Win rates, same shape. Beyond the largest KL that is numerically reachable the win rate there is returned if the
        limit rises by less than 2e-5 for every further nat.

    Raises:
        InputError: If a KL is out of reach where the limit still rises.
    """
    from infalign.theory.frontier import checked_kls
    from infalign.theory.plan import limit

    if check_predictability(predictability) == 1.0:
        return limit(procedure, kls, opponent)
    wanted = checked_kls(kls, "limit")
    path = Path(Objective.of(procedure, opponent), float(predictability))
    rates = {kl: _limit_at(path, kl) for kl in sorted(set(wanted.ravel().tolist()))}
    return np.array([rates[kl] for kl in wanted.ravel().tolist()]).reshape(wanted.shape)


def _limit_at(path: Path, kl: float) -> float:
    if kl < _TINY_KL:  # W rises with sqrt(KL) there; the KL itself is lost in rounding
        unaligned = path.objective.reference_win_rate
        return unaligned + (_limit_at(path, _TINY_KL) - unaligned) * math.sqrt(kl / _TINY_KL)
    try:
        less, more = path.checked(kl)
    except InputError:
        if not path.known:
            raise
        last = path.at(min(path.known))
        if last.policy.kl < kl and last.problem.beta <= FLAT_BETA:
            return last.policy.win_rate(path.objective)
        raise
    return _envelope(less, more, kl)


def _envelope(less: Solved, more: Solved, kl: float) -> float:
    """W at a KL: max J + β KL is above it for every β, exact where the KL is met, and between two optima of one β."""
    return min(one.value + one.problem.beta * kl for one in (less, more))


def channel_frontier(
    procedure: InferenceProcedure,
    predictability: float,
    max_kl: float,
    num_points: int = 24,
    opponent: InferenceProcedure | None = None,
) -> tuple[Array, Array, Array]:
    """The best win rate at each KL for a policy of limited predictability, as a curve to interpolate.

    Args:
        procedure: What is done with the policy.
        predictability: ρ, below 1.
        max_kl: Largest KL wanted, in nats.
        num_points: About how many points, about evenly spaced in sqrt(KL).
        opponent: What is done with the reference; the same procedure if None.

    Returns:
        KLs from 0 to `max_kl` or as far as the solver goes, win rates there, and β, the slope of the curve.
    """
    objective = Objective.of(procedure, opponent)
    # Worst-of-N has had one optimum wherever it was looked for: a few looks are enough.
    sides = [side for _, *both in objective.terms for side in both]
    alike = len(objective.terms) == 1 and all(isinstance(side, WorstOfN | Standard) for side in sides)
    path = Path(objective, check_predictability(predictability), thorough=not (alike or objective.concave))
    points = _curve(path, max_kl, num_points)
    if alike and _overlooked(path):
        path = Path(path.objective, path.predictability, thorough=True)
        points = _curve(path, max_kl, num_points)
    kl, win_rate, beta = np.array(points).T
    return kl, win_rate, beta


def _overlooked(path: Path) -> bool:
    """Whether a search from shapes of all kinds finds something better than the path, at some of its β (M18)."""
    betas = sorted(path.known)
    for beta in betas[1 :: max(len(betas) // 6, 1)]:
        known = path.known[beta]
        if solve(path.objective, beta, path.predictability, [known], thorough=True).value > known.value + 1e-8:
            return True
    return False


def _curve(path: Path, max_kl: float, num_points: int) -> list[tuple[float, float, float]]:
    """Points (KL, W, β) of the limit from the reference on."""
    furthest = math.sqrt(positive_number(max_kl, "max_kl", "Give nats above 0"))
    spacing = furthest / (num_points - 1)
    near_reference = path.at(_MILD_BETA).policy
    points = [(0.0, path.objective.reference_win_rate, math.inf)]
    # Near KL = 0, sqrt(KL) = c/β; from there on the step in log β follows the slope of sqrt(KL) seen last.
    log_beta = math.log(_MILD_BETA * math.sqrt(near_reference.kl) / (0.3 * spacing))
    for _ in range(4 * num_points):
        try:
            solved = path.at(max(math.exp(log_beta), SMALLEST_BETA))
        except InputError:
            break
        x, before = math.sqrt(solved.policy.kl), math.sqrt(points[-1][0])
        if x > before:
            if x - before > 3.0 * spacing:
                points += _between(path, before, x, spacing)
            points.append((solved.policy.kl, solved.policy.win_rate(path.objective), solved.problem.beta))
        if x >= furthest * (1 - 1e-12) or log_beta <= math.log(SMALLEST_BETA):
            break
        slope = x if len(points) < 3 else (x - before) / max(math.log(points[-2][2] / points[-1][2]), 1e-12)
        # A step that lands on the end is aimed a little beyond it.
        log_beta -= min(min(spacing, 1.02 * (furthest - x) + 1e-6) / max(slope, 1e-9), 1.5)
    return points


def _between(path: Path, low: float, high: float, spacing: float) -> list[tuple[float, float, float]]:
    """Points of the limit where the KL jumps as β falls: the envelope of the optima on either side."""
    found: list[tuple[float, float, float]] = []
    pair: tuple[Solved, Solved] | None = None
    for x in np.arange(low + spacing, high - 0.5 * spacing, spacing):
        kl = float(x * x)
        if pair is None or not pair[0].policy.kl <= kl <= pair[1].policy.kl:
            pair = path.around(kl)
        less, more = pair
        found.append((kl, _envelope(less, more, kl), more.problem.beta))
    return found
