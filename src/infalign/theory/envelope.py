"""The limit at a KL: the concave envelope min over β of max J(β) + β KL (M18).

The optimum at β is a point (KL, W) of the envelope, and its slope there is β. Between two such points the envelope lies
above their chord and below both tangents. Where the optimum moves smoothly with β the curve is interpolated; where it
jumps from one density to another the envelope is the chord, and no β has its optimum in between.

The points come from a fixed ladder of β, and an interval of it is divided by a rule that looks at its two ends alone.
So the limit at one KL does not depend on what else is asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np

from infalign.errors import InputError
from infalign.theory.search import GlobalSearch
from infalign.theory.solver import SMALLEST_BETA, Solution, solve
from infalign.theory.winrate import Objective

_TOP_KL = 1e-8
_ERROR = 3e-7
_CHORD = 1e-10
_MAX_SPLITS = 40
FLAT_BETA = 2e-5  # from there on the limit rises by less than that for every further nat


@dataclass(frozen=True, eq=False)
class Point:
    """One point of the envelope: β is the slope there. The reference itself has no solution, and β infinite."""

    kl: float
    win_rate: float
    beta: float
    slope: float
    solution: Solution | None = None

    @property
    def x(self) -> float:
        """sqrt(KL), in which the curve is smooth down to 0; `slope` is dW/dx."""
        return math.sqrt(self.kl)


class Optimum(Protocol):
    """The best policy at one β."""

    @property
    def kl(self) -> float:
        """KL(π‖p) in nats."""
        ...

    @property
    def win_rate(self) -> float:
        """W."""
        ...


class Optima(Protocol):
    """What an envelope is the envelope of."""

    @property
    def smooth(self) -> bool:
        """Whether the optimum is known to move smoothly with β."""
        ...

    @property
    def smallest_beta(self) -> float:
        """Where the ladder ends."""
        ...

    @property
    def reference_win_rate(self) -> float:
        """W of the reference itself."""
        ...

    @property
    def end(self) -> tuple[float, float] | None:
        """KL and W of the limit of small β, if there is one."""
        ...

    def solve(self, beta: float, near: Sequence[Solution] = ()) -> Optimum:
        """The optimum at one β; `near` are optima at other β to start from."""
        ...


class Densities:
    """The optima of one objective over all densities of the calibrated reward.

    Args:
        objective: The win rate W.
    """

    smallest_beta = SMALLEST_BETA
    end = None

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.smooth = objective.unique
        self._search = None if objective.unique else GlobalSearch(objective)
        self.reference_win_rate = objective.reference_win_rate

    def solve(self, beta: float, near: Sequence[Solution] = ()) -> Solution:
        """The optimum at one β."""
        if self._search is not None:
            return self._search.solve(beta, near)
        return solve(self.objective, beta, min(near, key=lambda s: abs(math.log(s.beta / beta)), default=None))


class Envelope:
    """The limit, with the optima computed so far.

    Args:
        optima: Gives the optimum at each β.
    """

    def __init__(self, optima: Optima) -> None:
        self.optima = optima
        self._found: dict[float, Point] = {}
        self._ladder: list[Point] = []
        self._complete = False

    def win_rate(self, kl: float) -> float:
        """The limit at one KL in nats; the value at the end of the reach for KLs beyond it."""
        return self.value_and_slope(kl)[0]

    def value_and_slope(self, kl: float) -> tuple[float, float]:
        """The limit at one KL and its slope there, β."""
        left, right, straight = self.enclosing(kl)
        if kl > right.kl and right.beta > FLAT_BETA and self.optima.end is None:
            raise InputError(
                f"no optimum was found beyond {right.kl:.4g} nats, where the limit still rises",
                where="limit",
                hint="A procedure whose density h jumps must be fitted first, with FittedProcedure.from_ranks",
            )
        # Two points that differ by rounding alone have nothing between them.
        if kl >= right.kl or right.kl - left.kl <= 1e-12:
            return right.win_rate, right.beta
        chord = (right.win_rate - left.win_rate) / (right.kl - left.kl)
        if straight:
            return left.win_rate + chord * (kl - left.kl), chord
        x, step = math.sqrt(kl), 1e-3 * (right.x - left.x)
        low, high = max(x - step, left.x), min(x + step, right.x)
        rise = _interpolated(left, right, high) - _interpolated(left, right, low)
        return _interpolated(left, right, x), rise / (high * high - low * low)

    def enclosing(self, kl: float) -> tuple[Point, Point, bool]:
        """Two points around a KL, so near that the curve between them can be interpolated, and whether it is straight.

        A straight piece that is longer than rounding is a jump of the optimum. Beyond the reach both are the end.
        """
        left, right = self.rungs(kl)
        for _ in range(_MAX_SPLITS):
            if right.kl - left.kl <= 1e-12 or kl >= right.kl:
                break
            if self.optima.smooth and self._error(left, right) < _ERROR:
                break
            middle = self._between(left, right)
            if middle is None:
                return left, right, True
            agrees = not self.optima.smooth and _agrees(left, middle, right)
            left, right = (left, middle) if kl <= middle.kl else (middle, right)
            if agrees and self._error(left, right) < _ERROR:
                break
        return left, right, False

    def rungs(self, kl: float) -> tuple[Point, Point]:
        """The two neighbours on the ladder that enclose a KL."""
        while not self._complete and (len(self._ladder) < 2 or self._ladder[-1].kl < kl):
            self._climb()
        above = next((i for i, point in enumerate(self._ladder) if point.kl >= kl and i), len(self._ladder) - 1)
        return self._ladder[above - 1], self._ladder[above]

    def at(self, beta: float, *near: Point) -> Point:
        """The optimum at one β, starting from those at other β as well."""
        if beta not in self._found:
            optimum = self.optima.solve(beta, [point.solution for point in near if point.solution is not None])
            solution = optimum if isinstance(optimum, Solution) else None
            slope = 2.0 * math.sqrt(optimum.kl) * beta
            self._found[beta] = Point(optimum.kl, optimum.win_rate, beta, slope, solution)
        return self._found[beta]

    def _climb(self) -> None:
        """One more rung: the reference, a β at which the policy is nearly it, then half the β each time."""
        if not self._ladder:
            top = self._nearly_reference()
            reference = Point(0.0, self.optima.reference_win_rate, math.inf, top.slope)
            self._ladder = [reference, top]
            return
        last = self._ladder[-1]
        # As long as the policy hardly moves, sqrt(KL) is proportional to 1/β.
        beta = max(last.beta * min(0.5, max(last.x / 0.05, 0.1)), self.optima.smallest_beta)
        try:
            following = self.at(beta, last)
        except InputError:
            self._complete = True
            return
        self._complete = beta <= self.optima.smallest_beta
        # A rung that the next one's density beats at its own β was not the optimum there.
        while len(self._ladder) > 2 and _better(following, self._ladder[-1]):
            stale = self._ladder.pop()
            self._found.pop(stale.beta)
            self._ladder.append(self.at(stale.beta, self._ladder[-1], following))
            if _better(following, self._ladder[-1]):
                self._ladder.pop()
        if following.kl > self._ladder[-1].kl:
            self._ladder.append(following)
        elif not self._complete:  # the optimum no longer moves: go on with half of this β
            self._ladder[-1] = replace(self._ladder[-1], beta=min(self._ladder[-1].beta, beta))
        if self._complete and self.optima.end is not None and self.optima.end[0] > self._ladder[-1].kl:
            self._ladder.append(Point(*self.optima.end, beta=0.0, slope=0.0))

    def _nearly_reference(self) -> Point:
        beta = 4.0
        for _ in range(40):
            point = self.at(beta)
            if point.kl <= _TOP_KL:
                return point
            beta *= min(max(point.x / math.sqrt(0.5 * _TOP_KL), 2.0), 1e3)
        raise InputError("no optimum near the reference was found", where="limit", hint="Smooth the procedure")

    def _between(self, left: Point, right: Point) -> Point | None:
        """The optimum at a β between; None if the chord is the envelope."""
        chord = (right.win_rate - left.win_rate) / (right.kl - left.kl)
        inside = right.beta < chord < left.beta
        if self.optima.smooth:
            beta = math.sqrt(left.beta * right.beta) if math.isfinite(left.beta) else 4.0 * right.beta
            return self.at(beta, left, right)
        if not inside:
            return None
        # Where the optimum jumps, the chord's slope is where the two are equally good.
        middle = self.at(chord, left, right)
        above = middle.win_rate - chord * middle.kl - (left.win_rate - chord * left.kl)
        return middle if above > _CHORD and left.kl < middle.kl < right.kl else None

    def _error(self, left: Point, right: Point) -> float:
        """How far two interpolations of fourth order, W in sqrt(KL) and J in log β, are apart."""
        if right.beta == 0.0:
            return 0.0
        if not math.isfinite(left.beta):
            return 0.0 if right.kl <= 2.0 * _TOP_KL else math.inf
        width = math.log(right.beta / left.beta)
        values = (left.win_rate - left.beta * left.kl, right.win_rate - right.beta * right.kl)
        slopes = (-width * left.beta * left.kl, -width * right.beta * right.kl)  # dJ/dlog β = -β KL
        largest = 0.0
        for s in (0.2, 0.5, 0.8):
            beta = left.beta * math.exp(s * width)
            rise = values[1] - values[0]
            value = values[0] + rise * s * s * (3.0 - 2.0 * s) + s * (1.0 - s) * (slopes[0] * (1.0 - s) - slopes[1] * s)
            slope = (
                6.0 * rise * s * (1.0 - s) + slopes[0] * (1.0 - s) * (1.0 - 3.0 * s) - slopes[1] * s * (2.0 - 3.0 * s)
            )
            kl = -slope / (width * beta)
            if not left.kl < kl < right.kl:
                return math.inf
            largest = max(largest, abs(_interpolated(left, right, math.sqrt(kl)) - (value + beta * kl)))
        return largest


def envelope_of(objective: Objective) -> Envelope:
    """The envelope of an objective. It is kept with what was computed of it, if its procedures can be hashed."""
    try:
        hash(objective)
    except TypeError:
        return Envelope(Densities(objective))
    return _kept(objective)


@lru_cache(maxsize=8)
def _kept(objective: Objective) -> Envelope:
    return Envelope(Densities(objective))


def forget() -> None:
    """Drop all envelopes that are kept."""
    _kept.cache_clear()


def _better(one: Point, other: Point) -> bool:
    """Whether a policy beats another at the other's β."""
    return one.win_rate - other.beta * one.kl > other.win_rate - other.beta * other.kl + _CHORD


def _agrees(left: Point, middle: Point, right: Point) -> bool:
    """Whether a point lies where its neighbours' interpolation says: then so does what is between them."""
    return abs(_interpolated(left, right, middle.x) - middle.win_rate) < 4.0 * _ERROR


def _interpolated(left: Point, right: Point, x: float) -> float:
    """Cubic Hermite interpolation in x = sqrt(KL), kept between the chord in KL and the two tangents."""
    width = right.x - left.x
    s = (x - left.x) / width
    cubic = (
        left.win_rate
        + (right.win_rate - left.win_rate) * s * s * (3.0 - 2.0 * s)
        + width * s * (1.0 - s) * (left.slope * (1.0 - s) - right.slope * s)
    )
    kl = x * x
    chord = left.win_rate + (right.win_rate - left.win_rate) * (kl - left.kl) / (right.kl - left.kl)
    tangents = right.win_rate + right.beta * (kl - right.kl)
    if math.isfinite(left.beta):
        tangents = min(tangents, left.win_rate + left.beta * (kl - left.kl))
    return float(np.clip(cubic, chord, max(tangents, chord)))
