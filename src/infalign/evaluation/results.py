"""What is stored of an evaluation: one method on one list of prompts, as plain JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from infalign.errors import InputError
from infalign.estimators import Estimate, moved
from infalign.evaluation.reshaped import ReshapedRecord


@dataclass(frozen=True)
class Measured:
    """An estimate as plain JSON; see `infalign.estimators.Estimate`. A number that cannot be known is None."""

    estimate: float
    standard_error: float | None
    low: float | None
    high: float | None
    per_prompt: list[float]

    @classmethod
    def of(cls, estimate: Estimate) -> Measured:
        """Plain form of an estimate."""
        low, high = estimate.confidence_interval
        return cls(
            estimate.estimate, known(estimate.standard_error), known(low), known(high), estimate.per_prompt.tolist()
        )


@dataclass(frozen=True)
class TiedLimit:
    """The limit for a reward with ties, as a curve: KLs in nats from 0, and the best win rate at each."""

    kls: list[float]
    win_rates: list[float]


@dataclass(frozen=True)
class ProcedureResult:
    """One method under one inference-time procedure.

    Attributes:
        procedure: Label, such as "Best-of-4".
        n: Responses the procedure draws.
        spec: `InferenceProcedure.to_dict`; None for a procedure that cannot be stored.
        win_rate: Against the reference under the same procedure (M10).
        limit: Best win rate that any policy depending on calibrated rewards alone reaches at the measured KL; None
            where the measured KL is not above zero. Where the reference's responses tie so often that it makes more
            than half a point, it is the limit for its reward levels as they are.
        captured: Share of the gain to be had at that KL, (W − ½) / (limit − ½), with an error that takes in the
            KL's; None where `limit` is, or where the policy has not moved.
        judged: Win rate by each further reward where the procedure still chooses by the first: what a user gets if
            that other reward is the truth.
        limit_without_ties: What `limit` would be for a continuous reward; None where `limit` is, and in evaluations
            that were stored before ties were taken into account.
        tied_limit: The limit with ties at every KL, where `limit` is with ties.
        predictable_limit: The limit at the measured KL for a policy that tells the reward from its own text as well as
            `Evaluation.predictability` says (Gaussian model, M15); None where that is not known.
    """

    procedure: str
    n: int | None
    spec: dict[str, Any] | None
    win_rate: Measured
    limit: float | None
    captured: Measured | None
    judged: dict[str, Measured] = field(default_factory=dict)
    limit_without_ties: float | None = None
    tied_limit: TiedLimit | None = None
    predictable_limit: float | None = None


@dataclass(frozen=True)
class Predictability:
    """How well a policy tells the reward from its own text: ρ of the Gaussian channel (M14).

    Attributes:
        estimate: ρ, from the policy's standard win rate at its KL; None where they do not show it.
        standard_error: From the jackknife over prompts; None where it is not known.
        low: Lower end of its interval.
        high: Upper end.
        policy: Label of the policy it is from.
        identity: Whether that policy is taken to be aligned with identity.
        reason: Why there is no estimate, or no error.
    """

    estimate: float | None
    standard_error: float | None
    low: float | None
    high: float | None
    policy: str
    identity: bool
    reason: str | None = None


@dataclass(frozen=True)
class Band:
    """Estimates with the ends of their intervals, one for each place on a curve; None where there is no interval."""

    estimate: list[float]
    low: list[float | None]
    high: list[float | None]

    @classmethod
    def of(cls, estimates: Sequence[Estimate]) -> Band:
        """Plain form of estimates."""
        ends = [estimate.confidence_interval for estimate in estimates]
        return cls(
            [estimate.estimate for estimate in estimates],
            [known(low) for low, _ in ends],
            [known(high) for _, high in ends],
        )


@dataclass(frozen=True)
class OverN:
    """Win rate of one family of procedures against N, all from one set of samples.

    Attributes:
        n: Each N.
        win_rate: Judged by the reward that procedures choose by.
        judged: By each further reward, the choice unchanged.
    """

    n: list[int]
    win_rate: Band
    judged: dict[str, Band]


@dataclass(frozen=True)
class LengthBucket:
    """Standard win rate of the policy's responses of like length, against all of the reference's.

    Attributes:
        shortest: Least length in the bucket.
        longest: Largest length in the bucket.
        share: Share of the policy's responses in it.
        win_rate: Their win rate.
    """

    shortest: float
    longest: float
    share: float
    win_rate: Measured


@dataclass(frozen=True)
class WorsePrompts:
    """Prompts on which the policy does worse than the reference under standard sampling, and what chance alone gives.

    A prompt's win rate is estimated from few samples, so some prompts look worse that are not.

    Attributes:
        share: Share of prompts whose estimated win rate is below one half; one half itself counts one half.
        by_chance_unchanged: What `share` would be on average if the policy were the reference.
        by_chance_alike: What `share` would be if every prompt had the same win rate, the mean one. More than this means
            that prompts differ in what alignment did to them.
        clearly: Share of prompts worse beyond their own noise (one-sided Mann-Whitney test of each prompt).
        clearly_by_chance: What `clearly` would be at most, on average, if no prompt were worse.
    """

    share: Measured
    by_chance_unchanged: float
    by_chance_alike: float
    clearly: Measured
    clearly_by_chance: float


@dataclass(frozen=True)
class Diagnostics:
    """Ways in which a win can be less than it seems; what was not given, or cannot be known, is None or empty.

    Attributes:
        worse: Prompts that got worse.
        length_matched: Standard win rate among pairs of about equal length; None also if no pair is.
        by_length: Standard win rate by length of the policy's response.
        distinct: Distinct word bigrams as a share of all, per prompt.
        ref_distinct: The same for the reference.
        self_similarity: Overlap of the word bigrams of two responses to a prompt.
        ref_self_similarity: The same for the reference.
        finish_reasons: Share of the policy's responses by how they ended.
        ref_finish_reasons: The same for the reference.
    """

    worse: WorsePrompts
    length_matched: Measured | None = None
    by_length: list[LengthBucket] = field(default_factory=list)
    distinct: Measured | None = None
    ref_distinct: Measured | None = None
    self_similarity: Measured | None = None
    ref_self_similarity: Measured | None = None
    finish_reasons: dict[str, float] = field(default_factory=dict)
    ref_finish_reasons: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Diagnostics:
        """Inverse of `dataclasses.asdict`."""
        fields = dict(data)
        worse = fields["worse"]
        fields["worse"] = WorsePrompts(
            **{**worse, "share": Measured(**worse["share"]), "clearly": Measured(**worse["clearly"])}
        )
        for name in ("length_matched", "distinct", "ref_distinct", "self_similarity", "ref_self_similarity"):
            fields[name] = None if fields[name] is None else Measured(**fields[name])
        fields["by_length"] = [
            LengthBucket(**{**bucket, "win_rate": Measured(**bucket["win_rate"])}) for bucket in fields["by_length"]
        ]
        return cls(**fields)


@dataclass(frozen=True)
class MethodResult:
    """Everything measured about one method on one list of prompts.

    Attributes:
        label: The method's name.
        reward: Name of the reward that judged it.
        num_prompts: P.
        num_samples: G, policy responses per prompt.
        num_ref_samples: K, reference responses per prompt.
        confidence: Level of every interval.
        kl: Sequence-level KL(policy ‖ reference) in nats.
        useful_kl: The part of it that moved reward ranks (M11), in nats; errs low, so its interval has no upper end.
        kl_efficiency: `useful_kl` / `kl`, which errs low; None where the policy has not moved.
        kl_efficiency_error: Its standard error, of what is estimated and not of the truth above it.
        procedures: One entry for each procedure asked for.
        over_n: Curves of "best-of-n" and "worst-of-n".
        diagnostics: Length, variety, and prompts that got worse.
        tie_share: Share of policy-reference pairs with equal reward.
        mean_length: Mean length of policy responses (in the caller's unit, normally tokens), if given.
        ref_mean_length: The same for the reference.
        truncated_share: Share of policy responses cut off before their end, if it is known how they ended.
        ref_truncated_share: The same for the reference.
        prompt_ids: Names of the prompts in order, if given; `compare` then checks that they agree.
        series: What the results of one curve share: a method of which there are several checkpoints or several KLs.
        step: Training step, of a checkpoint.
        kl_efficiency_at_least: What the KL efficiency is at least, at `confidence`; None where it is.
        reshaped: How the policy was made of two models, if it was, and what was predicted of it.
    """

    label: str
    reward: str
    num_prompts: int
    num_samples: int
    num_ref_samples: int
    confidence: float
    kl: Measured
    useful_kl: Measured
    kl_efficiency: float | None
    kl_efficiency_error: float | None
    procedures: list[ProcedureResult]
    over_n: dict[str, OverN]
    diagnostics: Diagnostics
    tie_share: float
    mean_length: float | None = None
    ref_mean_length: float | None = None
    truncated_share: float | None = None
    ref_truncated_share: float | None = None
    prompt_ids: list[str] | None = None
    series: str | None = None
    step: int | None = None
    kl_efficiency_at_least: float | None = None
    reshaped: ReshapedRecord | None = None

    @property
    def moved(self) -> bool:
        """Whether the policy can be told from the reference; see `infalign.estimators.moved`."""
        return moved(self.kl.estimate, self.kl.low)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return asdict(self) | {"reshaped": None if self.reshaped is None else self.reshaped.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MethodResult:
        """Inverse of `to_dict`.

        Args:
            data: What `to_dict` returned, also after a round trip through JSON.

        Raises:
            InputError: If a field is missing or unknown.
        """
        try:
            fields = dict(data)
            fields["kl"] = Measured(**fields["kl"])
            fields["useful_kl"] = Measured(**fields["useful_kl"])
            fields["procedures"] = [
                ProcedureResult(
                    **{
                        **entry,
                        "win_rate": Measured(**entry["win_rate"]),
                        "captured": None if entry["captured"] is None else Measured(**entry["captured"]),
                        "judged": {name: Measured(**value) for name, value in entry.get("judged", {}).items()},
                        "tied_limit": None if (tied := entry.get("tied_limit")) is None else TiedLimit(**tied),
                    }
                )
                for entry in fields["procedures"]
            ]
            fields["over_n"] = {
                family: OverN(
                    curve["n"],
                    Band(**curve["win_rate"]),
                    {name: Band(**band) for name, band in curve["judged"].items()},
                )
                for family, curve in fields["over_n"].items()
            }
            fields["diagnostics"] = Diagnostics.from_dict(fields["diagnostics"])
            made = fields.get("reshaped")
            fields["reshaped"] = None if made is None else ReshapedRecord.from_dict(made)
            return cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                "these results were not stored by this version of infalign", hint="Evaluate again"
            ) from error

    def of(self, procedure: str) -> ProcedureResult:
        """The entry of one procedure.

        Args:
            procedure: Its label.

        Raises:
            InputError: If it was not measured.
        """
        for entry in self.procedures:
            if entry.procedure == procedure:
                return entry
        raise InputError(
            f"{self.label} was not measured under {procedure}",
            hint=f"Measured: {', '.join(entry.procedure for entry in self.procedures)}",
        )


def known(value: float) -> float | None:
    """The number, or None if it is not finite: JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
