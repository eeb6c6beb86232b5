"""The reward choices of the literature, placed in the picture of M7: what each leaves on the table at the same KL."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from infalign.errors import InputError
from infalign.procedures import BestOfN, InferenceProcedure
from infalign.quadrature import Antiderivative, adapt, expit, mesh_with_knots
from infalign.theory.tilt import TiltedPolicy
from infalign.transforms import Exponential, Identity, Log, RewardTransform, Tabulated

Array = npt.NDArray[np.float64]

_SMALLEST_BETA = 1e-10
_LARGEST_BETA = 1e8


def beta_for_kl(kl_of: Callable[[float], float], kl: float, smallest: float, whose: str) -> float:
    """The β whose KL is the one asked for, to 1e-10 relative or better.

    Args:
        kl_of: The KL as a function of β; it must decrease.
        kl: The KL asked for, in nats.
        smallest: Smallest β to try.
        whose: What has this KL, for the error message.

    Raises:
        InputError: If the KL is not a positive number or out of reach; the message names the reachable range.
    """
    from scipy import optimize  # pyright: ignore[reportMissingTypeStubs]

    scipy_optimize: Any = optimize
    kl = float(kl)
    if not (math.isfinite(kl) and kl > 0):
        raise InputError(f"{kl!r} is not a positive finite number", where="kl_budget", mend="Give nats above 0")
    known: dict[float, float] = {}

    def gap(log_beta: float) -> float:
        beta = math.exp(log_beta)
        if beta not in known:
            known[beta] = kl_of(beta)
        return math.log(max(known[beta], 1e-300) / kl)

    low = high = math.log(0.3)
    step = math.log(4.0)
    reach = ""
    try:
        while gap(high) > 0:
            low, high = high, high + step
            if high > math.log(_LARGEST_BETA):
                reach = f"at least {known[math.exp(low)]:.3g}"
                break
        while not reach and gap(low) < 0:
            if low <= math.log(smallest) + 1e-9:
                reach = f"at most {known[math.exp(low)]:.4g}"
                break
            low, high = max(low - step, math.log(smallest)), low
    except InputError:
        reach = f"at most {max(known.values()):.4g}" if known else "none"
    if reach:
        raise InputError(
            f"a KL of {kl:g} nats is out of reach for {whose}",
            where="kl_budget",
            mend=f"The reachable KL is {reach} nats (beta from {smallest:g} to {_LARGEST_BETA:g})",
        )
    if low == high:
        return math.exp(low)
    root = float(scipy_optimize.brentq(gap, low, high, xtol=1e-11, rtol=1e-12))
    gap(root)
    return math.exp(root)


def tilt_at_kl(transform: RewardTransform, kl: float) -> TiltedPolicy:
    """The tilt by a transform that spends a given KL, to 1e-10 relative or better.

    Raises:
        InputError: If the KL is out of reach; the message names the reachable range.
    """
    beta = beta_for_kl(
        lambda beta: TiltedPolicy(transform, beta).kl, kl, _SMALLEST_BETA, f"the transform {transform.label!r}"
    )
    return TiltedPolicy(transform, beta)


def top_of_group_at_kl(procedure: BestOfN, kl: float) -> TiltedPolicy:
    """Where the reward "1 for the best of a group of n of the policy's own samples" settles, at a given KL.

    A response at rank u of such a group is the best with probability F(u)^(n-1): the reward moves with the policy, and
    its sum over a group is always 1, so it has no objective that RL could increase. It does have a fixed point,
    f ∝ exp(F^(n-1)/β), with a closed form: the quantile function is ∫_0^p exp(-q^(n-1)/β) dq, normalised, and
    KL = 1/(n β) + log ∫ exp(-q^(n-1)/β) dq. Unlike M9 it never looks at the opponent.

    Args:
        procedure: Best-of-n with n >= 2.
        kl: The KL asked for, in nats.

    Raises:
        InputError: If n is 1 (the reward is constant) or the KL is out of reach.
    """
    power = procedure.n - 1
    if power < 1:
        raise InputError("the best of a group of one has a constant reward", where="top_of_group_at_kl")

    def kl_of(beta: float) -> float:
        _, integral = adapt(lambda mesh: np.exp(-(mesh.u**power) / beta), mesh_with_knots())
        return 1.0 / (procedure.n * beta) + math.log(integral)

    beta = beta_for_kl(kl_of, kl, 1e-4, f"the top-1-of-{procedure.n} reward")
    mesh, total = adapt(lambda mesh: np.exp(-(mesh.u**power) / beta), mesh_with_knots(None, 0.5))
    quantile = Antiderivative(mesh, np.exp(-(mesh.u**power) / beta))
    t = np.linspace(-34.0, 34.0, 3000)
    p = expit(t)
    # Near u = 1 the distance to the end is what keeps its digits: integrate from there too.
    u = quantile(t) / total
    keep = np.concatenate([[True], np.diff(np.maximum.accumulate(u)) > 1e-15 * u[1:]]) & (u > 0) & (u < 1 - 1e-15)
    u, p = np.concatenate([[0.0], u[keep], [1.0]]), np.concatenate([[0.0], p[keep], [1.0]])
    return TiltedPolicy(Tabulated(u, p**power, name=f"top-1-of-{procedure.n}"), beta)


def named_tilts(
    procedure: InferenceProcedure, kl: float, opponent: InferenceProcedure | None
) -> tuple[list[tuple[TiltedPolicy, str, str]], dict[str, str]]:
    """Every choice of the literature at a KL.

    Args:
        procedure: What is done with the policy.
        kl: The KL that each may spend, in nats.
        opponent: What is done with the reference; the same procedure if None.

    Returns:
        Triples (tilt, label, what it stands for), and a reason for each choice that cannot spend this KL, by label.
    """
    t = best_exponent(procedure, kl, opponent)
    paper = 10.0 if t > 0 else -10.0
    makers: list[tuple[Callable[[], TiltedPolicy], str, str]] = [
        (lambda: tilt_at_kl(Identity(), kl), "identity", "calibrated RLHF, QRPO"),
        (lambda: tilt_at_kl(Log(), kl), "log", "Best-of-n distillation"),
        (lambda: tilt_at_kl(Exponential(paper), kl), f"exponential, t={paper:g}", "the paper's, for N = 4"),
        (lambda: tilt_at_kl(Exponential(t), kl), f"exponential, t={t:.3g}", "the best at this KL"),
    ]
    if isinstance(procedure, BestOfN) and procedure.n > 1:
        label = f"top-1-of-{procedure.n}"
        makers.append((lambda: top_of_group_at_kl(procedure, kl), label, "group reward, self-play"))
    tilts: list[tuple[TiltedPolicy, str, str]] = []
    left_out: dict[str, str] = {}
    for make, label, note in makers:
        try:
            tilts.append((make(), label, note))
        except InputError as error:
            left_out[label] = str(error)
    return tilts, left_out


def best_exponent(procedure: InferenceProcedure, kl: float, opponent: InferenceProcedure | None = None) -> float:
    """The t whose exponential transform wins most at a KL.

    Args:
        procedure: What is done with the policy.
        kl: In nats.
        opponent: What is done with the reference; the same procedure if None.
    """
    from scipy import optimize  # pyright: ignore[reportMissingTypeStubs]

    scipy_optimize: Any = optimize

    def loss(s: float) -> float:
        try:
            return -tilt_at_kl(Exponential(math.sinh(s)), kl).win_rate(procedure, opponent)
        except InputError:  # too sharp a transform cannot spend this KL
            return 0.0

    # In s = asinh(t), from -60 to 60 for small n; a larger n has its features at t of the order of n.
    largest = math.asinh(60.0 * max(1.0, (procedure.n or 1) / 8.0))
    grid = np.linspace(-largest, largest, 11)
    losses = [loss(float(s)) for s in grid]
    at = int(np.argmin(losses))
    low, high = float(grid[max(at - 1, 0)]), float(grid[min(at + 1, grid.size - 1)])
    best: Any = scipy_optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-3})
    return math.sinh(float(best.x))
