"""Before any model is trained: what the best alignment for a procedure reaches at a KL budget.

And what the usual choices of reward leave on the table (sections 4 and 5).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from infalign.errors import InputError
from infalign.procedures import BestOfN, InferenceProcedure, Standard, WorstOfN, check_is_procedure
from infalign.theory.alternatives import named_tilts
from infalign.theory.at_kl import solution_at_kl
from infalign.theory.beta_for_kl import check_moves, checked_kl
from infalign.theory.channel import ChannelPolicy
from infalign.theory.envelope import Envelope, envelope_of
from infalign.theory.finite_k import FiniteKPrediction, check_num_ref, finite_k_prediction
from infalign.theory.frontier import Frontier, checked_kls, frontier
from infalign.theory.levels import LevelOptima
from infalign.theory.optimal import OptimalTransform, optimal_transform
from infalign.theory.tilt import TiltedPolicy
from infalign.theory.winrate import Objective
from infalign.transforms import RewardTransform

if TYPE_CHECKING:
    from infalign.theory.predictability import GainAtN

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Option:
    """One choice of reward transform, with the β that spends the plan's KL.

    Attributes:
        label: Its name in tables.
        transform: Φ.
        beta: KL coefficient, in units of Φ per nat.
        kl: KL(π‖p) of the policy it leads to, in nats per response.
        win_rate: The procedure on that policy against its opponent on the reference (M8).
        standard_win_rate: One sample of that policy against one sample of the reference.
        other_win_rates: Win rates under other procedures asked for, by their label, each against itself.
        tilt: The policy that it leads to.
        note: What it stands for.
    """

    label: str
    transform: RewardTransform
    beta: float
    kl: float
    win_rate: float
    standard_win_rate: float
    tilt: TiltedPolicy | ChannelPolicy = field(repr=False)
    other_win_rates: dict[str, float] = field(default_factory=dict[str, float])
    note: str = ""

    def to_dict(self, *, with_transform: bool = True) -> dict[str, Any]:
        """JSON-ready; the transform's table can be left out."""
        content: dict[str, Any] = {
            "label": self.label,
            "beta": self.beta,
            "kl": self.kl,
            "win_rate": self.win_rate,
            "standard_win_rate": self.standard_win_rate,
            "other_win_rates": dict(self.other_win_rates),
            "note": self.note,
        }
        if with_transform:
            content["transform"] = self.transform.to_dict()
        return content


@dataclass(frozen=True, eq=False)
class Plan:
    """The recommendation of `plan`.

    Attributes:
        procedure: What will be done with the aligned policy.
        opponent: What is done with the reference; None if it is the same procedure.
        best: The optimal transform.
        alternatives: The named transforms at the same KL.
        finite_k: What is left when calibration uses K reference rollouts per prompt, for every K asked for.
        left_out: Named transforms that cannot spend this KL, with the reason.
        limit: The limit at this KL. It lies above `best` where the optimum jumps over this KL as β falls (M18).
        predictability: ρ, how well the policy can tell the reward from its own text; 1 in the idealised theory.
        idealised: With a predictability below 1, what the idealised theory (M9) has at the same KL; None if it is out
            of reach.
    """

    procedure: InferenceProcedure
    opponent: InferenceProcedure | None
    best: Option
    alternatives: tuple[Option, ...]
    finite_k: tuple[FiniteKPrediction, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict[str, str])
    limit: float = math.nan
    predictability: float = 1.0
    idealised: Option | None = None

    @cached_property
    def frontier(self) -> Frontier:
        """The best win rate at each KL, to twice this plan's KL or as far as the solver goes."""
        if self.predictability < 1.0:
            from infalign.theory.channel_path import channel_frontier

            return Frontier(
                *channel_frontier(self.procedure, self.predictability, 2.0 * self.best.kl, opponent=self.opponent)
            )
        return frontier(self.procedure, max_kl=2.0 * self.best.kl, opponent=self.opponent)

    @cached_property
    def by_n(self) -> tuple[GainAtN, ...]:
        """What several N would gain at this KL and predictability; empty unless this is Best-of-N or Worst-of-N."""
        if (
            self.predictability == 1.0
            or self.opponent is not None
            or not isinstance(self.procedure, BestOfN | WorstOfN)
        ):
            return ()
        from infalign.theory.predictability import gains_by_n

        return gains_by_n(type(self.procedure), self.best.kl, self.predictability)

    @cached_property
    def usual(self) -> dict[str, float] | None:
        """Of an idealised plan: limit and identity at its KL for the predictability that a small model has, about."""
        if self.predictability != 1.0:
            return None
        from infalign.theory.predictability import usual_gain

        return usual_gain(self.procedure, self.best.kl, self.opponent)

    def to_dict(self, *, with_transforms: bool = True) -> dict[str, Any]:
        """JSON-ready. The best option's fields are repeated at the top level."""
        content: dict[str, Any] = {
            "procedure": self.procedure.to_dict(),
            "opponent": None if self.opponent is None else self.opponent.to_dict(),
            "beta": self.best.beta,
            "kl": self.best.kl,
            "win_rate": self.best.win_rate,
            "standard_win_rate": self.best.standard_win_rate,
            "limit": self.limit,
            "best": self.best.to_dict(with_transform=with_transforms),
            "alternatives": [option.to_dict(with_transform=with_transforms) for option in self.alternatives],
            "frontier": {
                "kl": self.frontier.kl.tolist(),
                "win_rate": self.frontier.win_rate.tolist(),
                "beta": [None, *self.frontier.beta[1:].tolist()],
            },
        }
        if self.predictability < 1.0:
            content["predictability"] = self.predictability
            ideal = self.idealised
            content["idealised"] = None if ideal is None else ideal.to_dict(with_transform=with_transforms)
            content["by_n"] = [gain.to_dict() for gain in self.by_n]
        if self.left_out:
            content["left_out"] = dict(self.left_out)
        if self.finite_k:
            content["finite_k"] = [prediction.to_dict() for prediction in self.finite_k]
        return content


def plan(
    procedure: InferenceProcedure,
    beta: float | None = None,
    kl_budget: float | None = None,
    *,
    opponent: InferenceProcedure | None = None,
    num_ref: int | Sequence[int] = (),
    others: InferenceProcedure | Sequence[InferenceProcedure] = (),
    seed: int = 0,
    predictability: float = 1.0,
) -> Plan:
    """Find the optimal transform for a procedure, at a β or at a KL budget, beside the named transforms at the same KL.

    Args:
        procedure: What will be done with the aligned policy.
        beta: KL coefficient, in units of win rate per nat. Give this or `kl_budget`.
        kl_budget: KL(π‖p) to spend, in nats per response; met to 1e-6 relative or better.
        opponent: What is done with the reference; the same procedure if None.
        num_ref: Also predict what is left with so many reference rollouts per prompt (M6); one number or several.
        others: Procedures whose win rates are wanted too, each against itself; one or several.
        seed: Of the simulation behind `num_ref`.
        predictability: ρ, the correlation of what the policy can tell about its own text with the reward (M14). Below 1
            the plan is that of M15: mostly another β; its level is a Gaussian model's.

    Raises:
        InputError: If neither or both of beta and kl_budget are given, one is out of range, or the budget is out of
            reach; the message names the reachable range. Also if what is given is no procedure or no number.
    """
    if (beta is None) == (kl_budget is None):
        raise InputError(
            "give exactly one of beta and kl_budget",
            where="plan",
            hint="On the command line --beta is the coefficient and --kl the budget in nats",
        )
    # Everything is checked before anything is computed.
    counts = [check_num_ref(count) for count in (num_ref if isinstance(num_ref, Iterable) else [num_ref])]
    others = (others,) if isinstance(others, InferenceProcedure) else tuple(others)
    for other in others:
        check_is_procedure(other, "others")
    if predictability != 1.0:
        from infalign.theory.channel_plan import plan_in_channel

        return plan_in_channel(procedure, beta, kl_budget, predictability, opponent, counts, others)
    unique = Objective.of(procedure, opponent).unique
    named = None
    if beta is not None:
        optimum = optimal_transform(procedure, beta, opponent)
        check_moves(optimum.kl, optimum.beta)
    elif unique:
        optimum = optimum_at_kl(procedure, cast(float, kl_budget), opponent)
    else:  # inside a jump the named transforms are starts too, so that none of them can be better
        kl = checked_kl(cast(float, kl_budget))
        named = named_tilts(procedure, kl, opponent)
        optimum = optimum_at_kl(procedure, kl, opponent, [tilt.transform for tilt, *_ in named[0]])
    tilts, left_out = named_tilts(procedure, optimum.kl, opponent) if named is None else named
    highest, note = _limit_of(optimum)
    best = _option(optimum.tilt, "optimal", procedure, opponent, others, note, known=optimum)
    alternatives = [_option(tilt, label, procedure, opponent, others, note) for tilt, label, note in tilts]
    finite_k = tuple(finite_k_prediction(optimum, count, seed=seed) for count in counts)
    return Plan(procedure, opponent, best, tuple(alternatives), finite_k, left_out, highest)


def _limit_of(optimum: OptimalTransform) -> tuple[float, str]:
    """The limit at an optimum's KL, and what the optimum is in words."""
    if optimum.unique:
        return optimum.win_rate, "the limit (M9)"
    highest = max(envelope_of(optimum.solution.objective).win_rate(optimum.kl), optimum.win_rate)
    if highest - optimum.win_rate < 2e-6:
        return highest, "the limit (M9)"
    return highest, f"the best found at this KL; the limit is {highest:.4f} (M18)"


def optimum_at_kl(
    procedure: InferenceProcedure,
    kl: float,
    opponent: InferenceProcedure | None = None,
    transforms: Sequence[RewardTransform] = (),
) -> OptimalTransform:
    """The optimal transform that spends a given KL, to 1e-9 relative or better.

    Where the optimum jumps over this KL as β falls (M18), it is the best transform found for policies of this KL: it is
    not the optimum of W - β KL for any β, and the limit lies above it.

    Args:
        procedure: What is done with the policy.
        kl: In nats.
        opponent: What is done with the reference; the same procedure if None.
        transforms: Further shapes to start from in that case.

    Raises:
        InputError: If the KL is out of reach; the message names the reachable range.
    """
    objective = Objective.of(procedure, opponent)
    solution = solution_at_kl(objective, kl, f"the optimal transform of {procedure.label}", transforms)
    return OptimalTransform(procedure, opponent, solution.beta, solution)


def limit(
    procedure: InferenceProcedure,
    kls: npt.ArrayLike,
    opponent: InferenceProcedure | None = None,
    predictability: float = 1.0,
    *,
    levels: npt.ArrayLike | None = None,
) -> Array:
    """The theoretical limit: the best win rate at each KL (section 5).

    It is the concave envelope, the least of max J(β) + β KL over β (M18): no policy that depends on a response through
    its calibrated reward alone lies above it. Where the optimum jumps as β falls, no single policy reaches it inside
    the jump; one end of the jump on some prompts and the other end on the rest does.

    Args:
        procedure: What is done with the policy.
        kls: KLs in nats, at least 0, any shape.
        opponent: What is done with the reference; the same procedure if None.
        levels: For a reward with ties: what the reference puts on each reward level, from the lowest to the highest.
            (L,) masses, or (P, L) with a row for each prompt; the limit is then that of the mean win rate at a mean KL.
            `infalign.theory.levels.level_masses` makes them from rewards. No ties if None.
        predictability: ρ, the correlation of what the policy can tell about its own text with the reward (M14, M15).

    Returns:
        Win rates, same shape, to about 1e-6, each by itself: what else is asked makes no difference. Beyond the largest
        KL that is numerically reachable (β = 1e-7) the win rate at that KL is returned: too small, but by less than
        1e-7 for every nat beyond it, because the curve is concave with slope β. (Worst-of-64 reaches 0.30 nats and has
        won all but 2e-9 there.)

    Raises:
        InputError: If a KL is negative or not finite, the levels are not masses, or no optimum is found where the
            limit still rises.
    """
    if predictability != 1.0:
        from infalign.theory.channel_path import channel_limit

        if levels is not None:
            raise InputError(
                "a limit is either for reward levels or for a predictability below 1",
                where="limit",
                hint="Give one of levels and predictability",
            )
        return channel_limit(procedure, kls, predictability, opponent)
    wanted = checked_kls(kls, "limit")
    objective = Objective.of(procedure, opponent)
    envelope = envelope_of(objective) if levels is None else Envelope(LevelOptima(objective, levels))
    return np.array([envelope.win_rate(float(kl)) for kl in wanted.ravel()]).reshape(wanted.shape)


def _option(
    tilt: TiltedPolicy,
    label: str,
    procedure: InferenceProcedure,
    opponent: InferenceProcedure | None,
    others: Sequence[InferenceProcedure],
    note: str,
    known: OptimalTransform | None = None,
) -> Option:
    return Option(
        label=label,
        transform=tilt.transform,
        tilt=tilt,
        beta=tilt.beta,
        kl=tilt.kl if known is None else known.kl,
        win_rate=tilt.win_rate(procedure, opponent) if known is None else known.win_rate,
        standard_win_rate=tilt.win_rate(Standard()),
        other_win_rates={other.label: tilt.win_rate(other) for other in others},
        note=note,
    )
