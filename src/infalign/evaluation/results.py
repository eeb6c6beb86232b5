"""What is stored of an evaluation: one method on one list of prompts, as plain JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from infalign.errors import InputError
from infalign.estimators import Estimate


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
class ProcedureResult:
    """One method under one inference-time procedure.

    Attributes:
        procedure: Label, such as "Best-of-4".
        n: Responses the procedure draws.
        spec: `InferenceProcedure.to_dict`; None for a procedure that cannot be stored.
        win_rate: Against the reference under the same procedure (M10).
        limit: Best win rate that any policy depending on calibrated rewards alone reaches at the measured KL; None
            where the measured KL is not above zero.
        captured: Share of the gain to be had at that KL, (W − ½) / (limit − ½), with an error that takes in the
            KL's; None where `limit` is.
        judged: Win rate by each further reward where the procedure still chooses by the first: what a user gets if
            that other reward is the truth.
    """

    procedure: str
    n: int | None
    spec: dict[str, Any] | None
    win_rate: Measured
    limit: float | None
    captured: Measured | None
    judged: dict[str, Measured] = field(default_factory=dict)


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
        useful_kl: The part of it that moved reward ranks (M11), in nats.
        kl_efficiency: `useful_kl` / `kl`; None where the KL is not resolved from zero.
        kl_efficiency_error: Its standard error.
        procedures: One entry for each procedure asked for.
        tie_share: Share of policy-reference pairs with equal reward.
        mean_length: Mean length of policy responses (in the caller's unit, normally tokens), if given.
        ref_mean_length: The same for the reference.
        truncated_share: Share of policy responses cut off before their end, if given.
        ref_truncated_share: The same for the reference.
        prompt_ids: Names of the prompts in order, if given; `compare` then checks that they agree.
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
    tie_share: float
    mean_length: float | None = None
    ref_mean_length: float | None = None
    truncated_share: float | None = None
    ref_truncated_share: float | None = None
    prompt_ids: list[str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return asdict(self)

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
                    }
                )
                for entry in fields["procedures"]
            ]
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise InputError(
                f"not a stored evaluation result of this version ({error})", mend="Run the evaluation again"
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
            mend=f"Measured: {', '.join(entry.procedure for entry in self.procedures)}",
        )


def known(value: float) -> float | None:
    """The number, or None if it is not finite: JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
