"""EarlyStopping: Best-of-N that stops drawing once a response is good enough.

Draw blocks of b responses, at most N in all; stop after the first block in which the best so far has reached the
quantile p of the policy. With B_j the responses drawn before block j and b_j its size, what comes out has the CDF

    H(q) = q^N                                          for q < p   (only if no block reached p: all N were drawn)
    H(q) = p^N + sum_j p^B_j (q^b_j - p^b_j)            for q >= p  (block j is the first that reached p)

because block j is drawn with probability p^B_j and ends below q >= p, but not below p, with q^b_j - p^b_j. Draws cost
sum_j b_j p^B_j on average, (1 - p^N) / (1 - p) in blocks of one.

Where the quantile is read off K reference rewards (M5), p is that of the k-th smallest of them, k = ⌈K stop_at⌉, and so
Beta(k, K - k + 1). With I_q(a) the CDF of Beta(a, K - k + 1) and m_e = E p^e, all of the above is averaged over p:

    H(q) = q^N (1 - I_q(k)) + m_N I_q(k + N) + sum_j [q^b_j m_B_j I_q(k + B_j) - m_(B_j + b_j) I_q(k + B_j + b_j)]

Beyond the paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from infalign._io.wording import counted
from infalign.errors import InputError
from infalign.numerics import special
from infalign.numerics.quadrature import Array, unit_interval
from infalign.procedures.base import InferenceProcedure, whole_number


@dataclass(frozen=True)
class EarlyStopping(InferenceProcedure):
    """The best of up to n responses, drawn until one of them reaches the quantile `stop_at`.

    As a distortion, `stop_at` is a quantile of the policy that is sampled. A decoder stops at a *calibrated reward*, a
    quantile of the reference: on the reference the two are the same; on a policy with the CDF F of calibrated rewards,
    stopping at the calibrated reward c is this procedure with `stop_at=F(c)`.

    Args:
        n: The most responses drawn, at least 1.
        stop_at: In [0, 1]. At 0 only the first block is drawn; at 1, with the exact quantile, all of them.
        block: Responses drawn at the same time, at least 1 and at most n; the last block is what is left of n.
        num_ref: K, where the quantile is found with K reference rewards, as a decoder finds it; None for the exact one.
            Where the threshold truly lies is then uncertain, which also smooths the jump of h that the solver of M9
            could not take.
    """

    n: int = field()  # pyright: ignore[reportIncompatibleVariableOverride]
    stop_at: float
    block: int = 1
    num_ref: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", whole_number(self.n, "n", "EarlyStopping"))
        object.__setattr__(self, "block", whole_number(self.block, "block", "EarlyStopping"))
        if self.num_ref is not None:
            object.__setattr__(self, "num_ref", whole_number(self.num_ref, "num_ref", "EarlyStopping"))
        if self.block > self.n:
            raise InputError(
                f"a block of {self.block} is more than n = {self.n}", where="EarlyStopping", hint="Use 1 <= block <= n"
            )
        given = cast(object, self.stop_at)
        if isinstance(given, bool) or not isinstance(given, int | float) or not 0.0 <= given <= 1.0:
            raise InputError(
                f"stop_at = {given!r} is not a number in [0, 1]",
                where="EarlyStopping",
                hint="Give a calibrated reward, such as 0.95",
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
        passed = self._passed(points, self.n)
        out = points**self.n * (1.0 - self._passed(points, 0)) + self._power(self.n) * passed
        for size, before, count in self._terms:
            # All blocks of one size at once where p is known; one by one where it is not.
            out = out + points**size * self._power(before, count, size) * self._passed(points, before)
            out = out - self._power(before + size, count, size) * self._passed(points, before + size)
        return np.clip(out, 0.0, 1.0)

    def density(self, q: npt.ArrayLike) -> Array:
        """h(q): n q^(n-1) below the threshold, sum_j p^B_j b_j q^(b_j - 1) above; it jumps up between."""
        points = unit_interval(q, "density(q)")
        out = self.n * points ** (self.n - 1) * (1.0 - self._passed(points, 0))
        for size, before, count in self._terms:
            reached = self._power(before, count, size) * self._passed(points, before)
            out = out + size * points ** (size - 1) * reached
        return np.asarray(out, dtype=np.float64)

    def density_slope(self, q: npt.ArrayLike) -> Array:
        """h'(q); without `num_ref` on either side of the jump."""
        points = unit_interval(q, "density_slope(q)")
        # The density of the threshold: where it passes q, the rest of the draws is no longer made.
        threshold = self._threshold_density(points)
        out = self.n * (self.n - 1) * points ** max(self.n - 2, 0) * (1.0 - self._passed(points, 0))
        out = out - self.n * points ** (self.n - 1) * threshold
        for size, before, count in self._terms:
            reached = self._power(before, count, size) * self._passed(points, before)
            out = out + size * (size - 1) * points ** max(size - 2, 0) * reached
            out = out + size * points ** (size - 1 + before) * threshold
        return np.asarray(out, dtype=np.float64)

    @property
    def label(self) -> str:
        """The name in tables, such as "Best-of-8 stopped at 0.95"."""
        blocks = "" if self.block == 1 else f", blocks of {self.block}"
        references = "" if self.num_ref is None else f", {counted(self.num_ref, 'reference')}"
        return f"Best-of-{self.n} stopped at {self.stop_at:g}{blocks}{references}"

    def selection_weights(self, m: int) -> Array:
        """Refused: which response comes out depends on the order in which they were drawn, not on ranks alone."""
        raise InputError(
            f"{self.label} stops by a quantile, so m ranks have no selection weights",
            where="selection_weights",
            hint="Use its distortion H, or decode with it and measure what comes out",
        )

    def to_dict(self) -> dict[str, Any]:
        """See the base class."""
        described = {"kind": "early-stopping", "n": self.n, "stop_at": self.stop_at, "block": self.block}
        return described if self.num_ref is None else {**described, "num_ref": self.num_ref}

    # --- what it saves and what it loses, on the reference itself -----------------------------------------------------

    @property
    def expected_draws(self) -> float:
        """Responses drawn on average: sum_j b_j E p^B_j."""
        return float(sum(size * self._power(before, count, size) for size, before, count in self._terms))

    def win_rate(self, opponent: int = 1) -> float:
        """The chance to beat Best-of-`opponent` of the same policy (M8 in closed form), for rewards without ties.

        Args:
            opponent: How many responses the other side draws: 1 is standard sampling.
        """
        m = whole_number(opponent, "opponent", "win_rate")
        # ∫ H(u) m u^(m-1) du: below p, then the constant p^N above it, then block by block.
        lost = self._power(self.n) - self.n / (self.n + m) * self._power(self.n + m)
        for size, before, count in self._terms:
            lost += m / (size + m) * (self._power(before, count, size) - self._power(before + size + m, count, size))
            lost -= self._power(before + size, count, size) - self._power(before + size + m, count, size)
        return 1.0 - lost

    def loss(self, opponent: int = 1) -> float:
        """Win rate given up against Best-of-n drawn to its end, n / (n + opponent)."""
        return self.n / (self.n + opponent) - self.win_rate(opponent)

    # --- inside -------------------------------------------------------------------------------------------------------

    @property
    def _terms(self) -> list[tuple[int, int, int]]:
        """Triples (size, draws before, how many such blocks follow each other): what the sums over j run over."""
        whole, rest = divmod(self.n, self.block)
        if self.num_ref is None:
            blocks = [(self.block, 0, whole)]
        else:
            blocks = [(self.block, j * self.block, 1) for j in range(whole)]
        return blocks + ([(rest, whole * self.block, 1)] if rest else [])

    @property
    def _beta(self) -> tuple[float, float] | None:
        """Parameters of the threshold's distribution; None where it is known."""
        if self.num_ref is None:
            return None
        k = math.ceil(self.stop_at * self.num_ref - 1e-9)
        return None if k == 0 else (float(k), self.num_ref - k + 1.0)

    def _power(self, exponent: int, count: int = 1, step: int = 1) -> float:
        """E p^e, summed over the exponents e, e + step, ... of `count` blocks."""
        if self._beta is not None:
            a, b = self._beta
            return math.exp(special.betaln(a + exponent, b) - special.betaln(a, b))
        p = self.stop_at
        if p == 0.0:
            return float(exponent == 0)
        if p == 1.0:
            return float(count)
        series = 1.0 if count == 1 else math.expm1(count * step * math.log(p)) / math.expm1(step * math.log(p))
        return p**exponent * series

    def _passed(self, q: Array, exponent: int) -> Array:
        """E[p^e; p <= q] / E p^e."""
        if self._beta is None:
            return np.asarray(q >= self.stop_at, dtype=np.float64)
        a, b = self._beta
        return special.betainc(a + exponent, b, q)

    def _threshold_density(self, q: Array) -> Array:
        if self._beta is None:
            return np.zeros_like(q)
        a, b = self._beta
        return special.beta_density(a, b, q)
