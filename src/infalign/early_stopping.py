"""EarlyStopping: Best-of-N that stops drawing once a response is good enough.

Draw blocks of b responses, at most N in all; stop after the first block in which the best so far has reached the
quantile p of the policy. What comes out has the CDF H(q), with B_j the responses drawn before block j, b_j its size,

    H(q) = q^N                                              for q < p   (no block reached p: all N were drawn)
    H(q) = p^N + sum_j p^B_j (q^b_j - p^b_j)                for q >= p  (block j is the first that reached p)

because block j is drawn with probability p^B_j and ends below q >= p, but not below p, with q^b_j - p^b_j. Draws cost
sum_j b_j p^B_j on average, (1 - p^N) / (1 - p) in blocks of one. Beyond the paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
from scipy import special as _scipy_special  # pyright: ignore[reportMissingTypeStubs]

from infalign.errors import InputError
from infalign.procedures import InferenceProcedure, whole_number
from infalign.quadrature import unit_interval

Array = npt.NDArray[np.float64]


class _Special(Protocol):
    """The SciPy function used here, with its type (SciPy ships none)."""

    betaln: Callable[[Any, Any], Array]


_special = cast(_Special, _scipy_special)


@dataclass(frozen=True)
class EarlyStopping(InferenceProcedure):
    """The best of up to n responses, drawn until one of them reaches the quantile `stop_at`.

    As a distortion, `stop_at` is a quantile of the policy that is sampled. A decoder stops at a *calibrated reward*, a
    quantile of the reference: on the reference the two are the same; on a policy with the CDF F of calibrated rewards,
    stopping at the calibrated reward c is this procedure with `stop_at=F(c)`.

    Args:
        n: The most responses drawn, at least 1.
        stop_at: In [0, 1]. At 1 it is Best-of-n; at 0 only the first block is drawn.
        block: Responses drawn at the same time, at least 1 and at most n; the last block is what is left of n.
    """

    n: int = field()  # pyright: ignore[reportIncompatibleVariableOverride]
    stop_at: float
    block: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", whole_number(self.n, "n", "EarlyStopping"))
        object.__setattr__(self, "block", whole_number(self.block, "block", "EarlyStopping"))
        if self.block > self.n:
            raise InputError(
                f"a block of {self.block} is more than n = {self.n}", where="EarlyStopping", mend="Use 1 <= block <= n"
            )
        given = cast(object, self.stop_at)
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0.0 <= given <= 1.0:
            raise InputError(
                f"stop_at = {given!r} is not a number in [0, 1]",
                where="EarlyStopping",
                mend="Give a calibrated reward, such as 0.95",
            )
        object.__setattr__(self, "stop_at", float(given))

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Responses drawn in each block, if it comes to that; they sum to n."""
        whole, rest = divmod(self.n, self.block)
        return (self.block,) * whole + ((rest,) if rest else ())

    def distortion(self, q: npt.ArrayLike) -> Array:
        """H(q); see the module."""
        points = unit_interval(q, "distortion(q)")
        stopped = self.stop_at**self.n + sum(
            reached * (points**size - self.stop_at**size) for reached, size in self._terms
        )
        return np.asarray(np.where(points < self.stop_at, points**self.n, stopped), dtype=np.float64)

    def density(self, q: npt.ArrayLike) -> Array:
        """h(q): n q^(n-1) below `stop_at`, sum_j p^B_j b_j q^(b_j - 1) above; it jumps up between."""
        points = unit_interval(q, "density(q)")
        stopped = sum(reached * size * points ** (size - 1) for reached, size in self._terms)
        return np.asarray(np.where(points < self.stop_at, self.n * points ** (self.n - 1), stopped), dtype=np.float64)

    def density_slope(self, q: npt.ArrayLike) -> Array:
        """h'(q) on either side of the jump."""
        points = unit_interval(q, "density_slope(q)")
        stopped = sum(reached * size * (size - 1) * points ** max(size - 2, 0) for reached, size in self._terms)
        below = self.n * (self.n - 1) * points ** max(self.n - 2, 0)
        return np.asarray(np.where(points < self.stop_at, below, stopped), dtype=np.float64)

    @property
    def label(self) -> str:
        """The name in tables, such as "Best-of-8 stopped at 0.95"."""
        blocks = "" if self.block == 1 else f", blocks of {self.block}"
        return f"Best-of-{self.n} stopped at {self.stop_at:g}{blocks}"

    def selection_weights(self, m: int) -> Array:
        """Refused: which response comes out depends on the order in which they were drawn, not on ranks alone."""
        raise InputError(
            f"{self.label} stops by a quantile, so m ranks have no selection weights",
            where="selection_weights",
            mend="Use its distortion H, or decode with it and measure what comes out",
        )

    def to_dict(self) -> dict[str, Any]:
        """See the base class."""
        return {"kind": "early-stopping", "n": self.n, "stop_at": self.stop_at, "block": self.block}

    # --- what it saves and what it loses, on the reference itself -----------------------------------------------------

    def expected_draws(self, num_ref: int | None = None) -> float:
        """Responses drawn on average: sum_j b_j p^B_j.

        Args:
            num_ref: K, where the quantile is that of K reference rewards (M5): the threshold is then one of those
                rewards, and the average goes over where it may lie as well.
        """
        before, sizes = self._schedule()
        return float(sizes @ self._powers(before, num_ref))

    def win_rate(self, opponent: int = 1, num_ref: int | None = None) -> float:
        """The chance to beat Best-of-`opponent` of the same policy (M8 in closed form), for rewards without ties.

        Args:
            opponent: How many responses the other side draws: 1 is standard sampling.
            num_ref: As in `expected_draws`.
        """
        m = whole_number(opponent, "opponent", "win_rate")
        before, sizes = self._schedule()
        n = np.array([self.n], dtype=np.float64)

        def power(exponents: Array) -> Array:
            return self._powers(exponents, num_ref)

        # 1 - ∫ H(u) m u^(m-1) du: below p, then the constant p^N above it, then block by block.
        lost = (m / (n + m)) * power(n + m) + power(n) - power(n + m)
        by_block = (
            (m / (sizes + m)) * (power(before) - power(before + sizes + m))
            - power(before + sizes)
            + power(before + sizes + m)
        )
        return float(1.0 - lost[0] - by_block.sum())

    def loss(self, opponent: int = 1, num_ref: int | None = None) -> float:
        """Win rate given up against Best-of-n drawn to its end, n / (n + opponent); arguments as in `win_rate`."""
        return self.n / (self.n + opponent) - self.win_rate(opponent, num_ref)

    # --- inside -------------------------------------------------------------------------------------------------------

    @property
    def _terms(self) -> list[tuple[float, int]]:
        """Pairs (c, b) with H(q) = p^N + sum c (q^b - p^b) above p: blocks of one size are a geometric sum."""
        whole, rest = divmod(self.n, self.block)
        p, full = self.stop_at, whole * self.block
        if p == 0.0:
            reached = 1.0
        elif p == 1.0:
            reached = float(whole)
        else:
            reached = math.expm1(full * math.log(p)) / math.expm1(self.block * math.log(p))
        return [(reached, self.block)] + ([(p**full, rest)] if rest else [])

    def _schedule(self) -> tuple[Array, Array]:
        """Responses drawn before each block, and its size."""
        sizes = np.array(self.block_sizes, dtype=np.float64)
        return np.cumsum(sizes) - sizes, sizes

    def _powers(self, exponents: Array, num_ref: int | None) -> Array:
        """p^e, or its mean where p is the quantile of the reference reward that a calibrated reward must beat.

        A response reaches Ĉ >= stop_at if it beats the k-th smallest of the K references, k = ⌈K stop_at⌉, whose
        quantile is Beta(k, K - k + 1).
        """
        if num_ref is None:
            return self.stop_at**exponents
        num_ref = whole_number(num_ref, "num_ref", self.label)
        k = math.ceil(self.stop_at * num_ref - 1e-9)
        if k == 0:
            return np.where(exponents == 0, 1.0, 0.0)
        return np.exp(_special.betaln(k + exponents, num_ref - k + 1.0) - _special.betaln(k, num_ref - k + 1.0))
