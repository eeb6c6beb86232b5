"""The optimum of the channel at a KL, and the limit over KLs (M15, M18)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from infalign.errors import InputError
from infalign.procedures import InferenceProcedure
from infalign.theory.channel import SMALLEST_BETA, ChannelOptimum, check_predictability, ideal, of_solved
from infalign.theory.channel_solver import Solved, solve
from infalign.theory.winrate import Objective
from infalign.transforms import positive_number

Array = npt.NDArray[np.float64]

_LARGEST_BETA = 1e6
_KL_TOLERANCE = 1e-9
_FLAT_BETA = 2e-5
"""From there on the limit rises by less than that for every further nat."""


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

        Two different ones have the same β: between their KLs nothing is optimal.

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
            if high - low < 1e-12 or more <= less:
                break
            # The secant in log KL, held away from the ends of the bracket; every third step halves it.
            fraction = math.log(more / kl) / math.log(more / less) if step % 3 < 2 and less > 0 else 0.5
            width = high - low
            middle = low + min(max(fraction, 1e-4), 1.0 - 1e-4) * width
            if not low < middle < high:
                break
            found = self.at(math.exp(middle))
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
        for _ in range(3):
            beta = pair[0].problem.beta
            best = solve(self.objective, beta, self.predictability, pair, thorough=True)
            if best.value <= max(pair[0].value, pair[1].value) + 1e-9:
                return pair
            # Every neighbour was on a worse branch: forget them.
            self.known = {beta: best}
            pair = self.around(kl)
        self.thorough, self.known = True, {}
        return self.around(kl)


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
    kl = positive_number(kl, "kl_budget", "Give nats above 0")
    less, more = Path(Objective.of(procedure, opponent), predictability).checked(kl)
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
    from infalign.theory.plan import check_kls, limit

    if check_predictability(predictability) == 1.0:
        return limit(procedure, kls, opponent)
    wanted = check_kls(kls, "limit")
    path = Path(Objective.of(procedure, opponent), float(predictability))
    rates = {kl: _limit_at(path, kl) for kl in sorted(set(wanted.ravel().tolist()))}
    return np.array([rates[kl] for kl in wanted.ravel().tolist()]).reshape(wanted.shape)


def _limit_at(path: Path, kl: float) -> float:
    if kl < 1e-9:
        return path.at(_LARGEST_BETA).policy.win_rate(path.objective)
    try:
        less, more = path.checked(kl)
    except InputError:
        last = path.at(min(path.known))
        if last.policy.kl < kl and last.problem.beta <= _FLAT_BETA:
            return last.policy.win_rate(path.objective)
        raise
    # W + β (KL - KL(β)) is exact where the KL is met, and the envelope between two optima of one β.
    return max(one.value + one.problem.beta * kl for one in (less, more))
