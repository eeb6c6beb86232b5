"""`infalign.plan` for a policy of limited predictability (M15)."""

from __future__ import annotations

from collections.abc import Sequence

from infalign.errors import InputError
from infalign.procedures import InferenceProcedure, Standard
from infalign.theory.beta_for_kl import check_moves
from infalign.theory.channel import ChannelPolicy, channel_optimum
from infalign.theory.channel_path import channel_optimum_at_kl
from infalign.theory.finite_k import FiniteKPrediction
from infalign.theory.plan import Option, Plan, optimum_at_kl
from infalign.theory.predictability import channel_tilt_at_kl, named_channel_tilts, with_num_ref
from infalign.transforms import RewardTransform


def plan_in_channel(
    procedure: InferenceProcedure,
    beta: float | None,
    kl_budget: float | None,
    predictability: float,
    opponent: InferenceProcedure | None,
    counts: Sequence[int],
    others: Sequence[InferenceProcedure],
) -> Plan:
    """See `infalign.plan`; exactly one of beta and kl_budget is given, and the rest is checked."""
    if beta is not None:
        optimum = channel_optimum(procedure, beta, predictability, opponent)
        check_moves(optimum.kl, optimum.beta)
    else:
        assert kl_budget is not None
        optimum = channel_optimum_at_kl(procedure, kl_budget, predictability, opponent)

    def option(policy: ChannelPolicy, transform: RewardTransform, label: str, note: str) -> Option:
        return Option(
            label=label,
            transform=transform,
            beta=policy.beta,
            kl=policy.kl,
            win_rate=policy.win_rate(procedure, opponent),
            standard_win_rate=policy.win_rate(Standard()),
            tilt=policy,
            other_win_rates={other.label: policy.win_rate(other) for other in others},
            note=note,
        )

    best = option(optimum.policy, optimum.transform, "optimal", f"the limit at predictability {predictability:g} (M15)")
    named, left_out = named_channel_tilts(procedure, optimum.kl, predictability, opponent)
    return Plan(
        procedure=procedure,
        opponent=opponent,
        best=best,
        alternatives=tuple(option(*one) for one in named),
        finite_k=tuple(_with_references(best, procedure, opponent, count, predictability) for count in counts),
        left_out=left_out,
        predictability=optimum.predictability,
        idealised=_idealised(procedure, opponent, optimum.kl, others),
    )


def _with_references(
    best: Option, procedure: InferenceProcedure, opponent: InferenceProcedure | None, count: int, predictability: float
) -> FiniteKPrediction:
    """Exact in the channel: a policy that sees only its own text follows the mean over the references (M17c)."""
    policy = channel_tilt_at_kl(with_num_ref(best.transform, count), best.kl, predictability)
    win_rate = policy.win_rate(procedure, opponent)
    return FiniteKPrediction(
        num_ref=count,
        beta=policy.beta,
        kl=policy.kl,
        kl_standard_error=0.0,
        win_rate=win_rate,
        win_rate_standard_error=0.0,
        win_rate_lost=best.win_rate - win_rate,
        num_prompts=0,
    )


def _idealised(
    procedure: InferenceProcedure,
    opponent: InferenceProcedure | None,
    kl: float,
    others: Sequence[InferenceProcedure],
) -> Option | None:
    try:
        ideal = optimum_at_kl(procedure, kl, opponent)
    except InputError:
        return None
    return Option(
        label="idealised",
        transform=ideal.transform,
        beta=ideal.beta,
        kl=ideal.kl,
        win_rate=ideal.win_rate,
        standard_win_rate=ideal.standard_win_rate,
        tilt=ideal.tilt,
        other_win_rates={other.label: ideal.tilt.win_rate(other) for other in others},
        note="if the policy could tilt the rank itself (M9)",
    )
