"""The β at which a family of policies spends a given KL."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from infalign.errors import InputError
from infalign.transforms import positive_number

_LARGEST_BETA = 1e8

SMALLEST_KL = 1e-11
"""Below it, rounding keeps a KL from being met to 1e-6 relative."""


def checked_kl(kl: float, smallest: float = SMALLEST_KL) -> float:
    """A KL budget that can be met.

    Args:
        kl: In nats.
        smallest: The least that is not lost in rounding.

    Raises:
        InputError: If it is not a positive number, or too small.
    """
    kl = positive_number(kl, "kl_budget", "Give nats above 0")
    if kl < smallest:
        raise InputError(
            f"a KL of {kl:g} nats is lost in rounding", where="kl_budget", hint=f"Give {smallest:g} nats or more"
        )
    return kl


def check_moves(kl: float, beta: float) -> None:
    """Refuse a beta so large that the policy does not leave the reference.

    Args:
        kl: KL of its policy, in nats.
        beta: The coefficient.

    Raises:
        InputError: If the KL is lost in rounding.
    """
    if kl < SMALLEST_KL:
        raise InputError(
            f"beta = {beta:g} leaves the policy at the reference: its KL is below {SMALLEST_KL:g} nats",
            where="beta",
            hint="Use a smaller beta",
        )


def beta_for_kl(kl_of: Callable[[float], float], kl: float, smallest: float, whose: str) -> float:
    """The β whose KL is the one asked for, to 1e-10 relative or to its rounding (about 1e-17 nats).

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
    kl = checked_kl(kl)
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
        if not known:
            raise
        reach = f"at most {max(known.values()):.4g}"
    if reach:
        raise InputError(
            f"a KL of {kl:g} nats is out of reach for {whose}",
            where="kl_budget",
            hint=f"The reachable KL is {reach} nats (beta from {smallest:g} to {_LARGEST_BETA:g})",
        )
    if low == high:
        return math.exp(low)
    missed = f"a KL of {kl:g} nats cannot be met to 1e-6 for {whose}: rounding is in the way"
    try:
        root = float(scipy_optimize.brentq(gap, low, high, xtol=1e-11, rtol=1e-12))
        error = abs(gap(root))
    except InputError as failure:
        raise InputError(missed, where="kl_budget", hint="Use a smaller KL") from failure
    if error > 1e-6:
        raise InputError(missed, where="kl_budget", hint="Use a smaller KL")
    return math.exp(root)
