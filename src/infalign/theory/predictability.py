"""A plan for a policy of limited predictability: M15 beside the named transforms, which N is worth it, and which K.

Everything here is the Gaussian channel of M14. It picks a good transform under other kinds of noise too; the level of
its win rates is a model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from infalign.errors import InputError
from infalign.numerics.quadrature import expit
from infalign.numerics.special import ndtr
from infalign.procedures import BestOfN, InferenceProcedure, Standard, WorstOfN
from infalign.theory.alternatives import beta_for_kl
from infalign.theory.channel import ChannelPolicy, channel_tilt, check_predictability, reward_of, tilt_by
from infalign.theory.channel_path import channel_optimum_at_kl
from infalign.theory.finite_k import check_num_ref
from infalign.transforms import Exponential, Identity, Log, RewardTransform, Tabulated

Array = npt.NDArray[np.float64]

USUAL = 0.6
"""What a small model has, about."""

SIZES = (4, 8, 16, 32, 64)
"""N that the table of gains is made for."""

COUNTS = (16, 32, 64, 128, 256, 512)
"""K that are tried for being enough."""

ENOUGH = 0.005
"""A K is enough if it loses no more win rate than this."""

_SMALLEST_BETA = 1e-8


@dataclass(frozen=True)
class GainAtN:
    """What aligning for a procedure of n responses brings to a policy of one predictability, at one KL.

    Attributes:
        procedure: Label.
        n: Responses drawn.
        limit: The best win rate (M15).
        identity: What identity reaches: a calibrated reward, aligned for single samples.
        gain: `limit` - `identity`.
        ideal_limit: The best win rate for a policy that tilts the rank itself (M9); None where that KL is out of its
            reach, as hardly anything is left to win.
        num_ref: The least K of `COUNTS` that loses at most `ENOUGH`; None if none of them does.
    """

    procedure: str
    n: int
    limit: float
    identity: float
    gain: float
    ideal_limit: float | None
    num_ref: int | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def normal_scores() -> Tabulated:
    """Φ(u) = the normal quantile of u, cut at 8: what a raw reward is that is Gaussian within every prompt."""
    z = np.linspace(-8.0, 8.0, 321)
    return Tabulated(np.concatenate([[0.0], ndtr(z), [1.0]]), np.concatenate([z[:1], z, z[-1:]]), name="normal scores")


def channel_tilt_at_kl(transform: RewardTransform, kl: float, predictability: float) -> ChannelPolicy:
    """Where RL on a transform leads a policy of limited predictability, at a KL met to 1e-6 relative or better.

    Raises:
        InputError: If the KL is out of reach; the message names the reachable range.
    """
    whose = f"the transform {transform.label!r} at a predictability of {predictability:g}"
    if predictability == 1.0:
        return _at_kl(lambda beta: channel_tilt(transform, beta, 1.0), kl, whose)
    reward = _remembered(reward_of(transform, predictability))
    return _at_kl(lambda beta: tilt_by(reward, beta, predictability), kl, whose)


def raw_tilt_at_kl(kl: float, predictability: float) -> ChannelPolicy:
    """A linear tilt of s: where a raw reward leads that is Gaussian within every prompt, with one scale; ρ below 1."""
    # E[Z | s] = ρ s, and a shift by m costs m²/2.
    return tilt_by(lambda s: predictability * s, predictability / math.sqrt(2.0 * kl), predictability)


def best_channel_exponent(
    procedure: InferenceProcedure, kl: float, predictability: float, opponent: InferenceProcedure | None = None
) -> float:
    """The t whose exponential transform wins most at a KL and predictability, to a few per cent.

    Args:
        procedure: What is done with the policy.
        kl: In nats.
        predictability: ρ.
        opponent: What is done with the reference; the same procedure if None.
    """

    def win(x: float) -> float:
        try:
            policy = channel_tilt_at_kl(Exponential(math.sinh(x)), kl, predictability)
        except InputError:  # too sharp a transform cannot spend this KL
            return -math.inf
        return policy.win_rate(procedure, opponent)

    grid = np.linspace(-5.0, 5.0, 9)
    wins = [win(float(x)) for x in grid]
    at = int(np.argmax(wins))
    low, high = float(grid[max(at - 1, 0)]), float(grid[min(at + 1, grid.size - 1)])
    golden = (math.sqrt(5.0) - 1.0) / 2.0
    for _ in range(6):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if win(left) >= win(right) else (left, high)
    t = math.sinh(0.5 * (low + high))
    return t if abs(t) >= 0.05 else 0.0


def named_channel_tilts(
    procedure: InferenceProcedure, kl: float, predictability: float, opponent: InferenceProcedure | None
) -> tuple[list[tuple[ChannelPolicy, RewardTransform, str, str]], dict[str, str]]:
    """The choices of the literature at a KL, for a policy of limited predictability.

    Returns:
        Quadruples (policy, transform, label, what it stands for), and a reason for each that cannot spend this KL.
    """
    t = best_channel_exponent(procedure, kl, predictability, opponent)
    paper = 10.0 if t >= 0 else -10.0
    named: list[tuple[RewardTransform, str, str]] = [
        (Identity(), "identity", "calibrated RLHF, QRPO"),
        (Log(), "log", "Best-of-n distillation"),
        (Exponential(paper), f"exponential, t={paper:g}", "the paper's, for N = 4"),
        (Exponential(t), f"exponential, t={t:.3g}", "the best at this KL"),
    ]
    found: list[tuple[ChannelPolicy, RewardTransform, str, str]] = []
    left_out: dict[str, str] = {}
    for transform, label, note in named:
        try:
            found.append((channel_tilt_at_kl(transform, kl, predictability), transform, label, note))
        except InputError as error:
            left_out[label] = str(error)
    found.append((raw_tilt_at_kl(kl, predictability), normal_scores(), "raw", "if Gaussian in each prompt"))
    return found, left_out


def with_num_ref(transform: RewardTransform, num_ref: int) -> Tabulated:
    """What a transform becomes on average over K reference rollouts: sum_b P(b | u) E[Φ(U) | b] (M17c).

    A policy sees its own text, not how the references of a prompt fell: it follows the mean over them. The reward of
    rank b is the posterior mean of Φ, U | b ~ Beta(b + 1, K - b + 1), and b | u is binomial.

    Args:
        transform: Φ, finite at 0.
        num_ref: K.
    """
    num_ref = check_num_ref(num_ref)
    x, w = np.polynomial.legendre.leggauss(600)
    t, half = 40.0 * x, 40.0 * w
    u = expit(t)
    log_density = _log_binomial(num_ref, t) + math.log(num_ref + 1.0)
    posterior = np.exp(log_density) * (half * u * expit(-t))
    by_rank = posterior @ transform(u) / posterior.sum(axis=1)
    table_t = np.concatenate([np.linspace(-20.0, 20.0, 401)])
    values = np.exp(_log_binomial(num_ref, table_t)).T @ by_rank
    points = np.concatenate([[0.0], expit(table_t), [1.0]])
    values = np.maximum.accumulate(np.concatenate([by_rank[:1], values, by_rank[-1:]]))
    return Tabulated(points, values, name=f"{transform.label}, {num_ref} references")


def enough_references(
    procedure: InferenceProcedure, transform: RewardTransform, kl: float, predictability: float, best: float
) -> int | None:
    """The least K of `COUNTS` that loses at most `ENOUGH` of the win rate at this KL; None if none does.

    Args:
        procedure: What is done with the policy.
        transform: The optimal one (M15).
        kl: In nats.
        predictability: ρ.
        best: The win rate with infinitely many references.
    """
    for count in COUNTS:
        try:
            policy = channel_tilt_at_kl(with_num_ref(transform, count), kl, predictability)
        except InputError:
            continue
        if best - policy.win_rate(procedure) <= ENOUGH:
            return count
    return None


def gains_by_n(
    family: type[BestOfN] | type[WorstOfN], kl: float, predictability: float, sizes: Sequence[int] = SIZES
) -> tuple[GainAtN, ...]:
    """What aligning for Best-of-N or Worst-of-N brings, for several N.

    Args:
        family: `BestOfN` or `WorstOfN`.
        kl: In nats.
        predictability: ρ.
        sizes: N; those that cannot spend this KL are left out.

    Raises:
        InputError: If the predictability is out of range.
    """
    predictability = check_predictability(predictability)
    identity = channel_tilt_at_kl(Identity(), kl, predictability)
    found: list[GainAtN] = []
    for n in sizes:
        procedure = family(n)
        try:
            optimum = channel_optimum_at_kl(procedure, kl, predictability)
        except InputError:
            continue
        with_identity = identity.win_rate(procedure)
        found.append(
            GainAtN(
                procedure=procedure.label,
                n=n,
                limit=optimum.win_rate,
                identity=with_identity,
                gain=optimum.win_rate - with_identity,
                ideal_limit=_unless_unreachable(lambda p=procedure: channel_optimum_at_kl(p, kl, 1.0).win_rate),
                num_ref=enough_references(procedure, optimum.transform, kl, predictability, optimum.win_rate),
            )
        )
    return tuple(found)


def usual_gain(
    procedure: InferenceProcedure, kl: float, opponent: InferenceProcedure | None
) -> dict[str, float] | None:
    """Limit and identity at a KL for the predictability that a small model has, about; None if out of reach."""
    try:
        best = channel_optimum_at_kl(procedure, kl, USUAL, opponent)
        identity = channel_tilt_at_kl(Identity(), kl, USUAL)
    except InputError:
        return None
    rates = {"limit": best.win_rate, "identity": identity.win_rate(procedure, opponent)}
    return {"predictability": USUAL, **rates, "standard_win_rate": identity.win_rate(Standard())}


def _log_binomial(num_ref: int, t: Array) -> Array:
    """The logarithm of P(b | u) for b = 0..K and u = expit(t), shape (K + 1, len(t))."""
    from infalign.numerics.special import gammaln

    b = np.arange(num_ref + 1.0)[:, None]
    # log u and log(1 - u) from t, exact at both ends.
    log_u, log_v = -np.logaddexp(0.0, -t), -np.logaddexp(0.0, t)
    choose = gammaln(num_ref + 1.0) - gammaln(b + 1.0) - gammaln(num_ref - b + 1.0)
    return choose + b * log_u + (num_ref - b) * log_v


def _remembered(reward: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The same function, computed once for each array of scores: it does not depend on β."""
    known: dict[bytes, Array] = {}

    def looked_up(s: Array) -> Array:
        key = s.tobytes()
        if key not in known:
            known[key] = reward(s)
        return known[key]

    return looked_up


def _at_kl(make: Callable[[float], ChannelPolicy], kl: float, whose: str) -> ChannelPolicy:
    made: dict[float, ChannelPolicy] = {}

    def kl_of(beta: float) -> float:
        made[beta] = make(beta)
        return made[beta].kl

    beta = beta_for_kl(kl_of, kl, _SMALLEST_BETA, whose)
    return made.get(beta) or make(beta)


def _unless_unreachable(compute: Callable[[], float]) -> float | None:
    try:
        return compute()
    except InputError:
        return None
