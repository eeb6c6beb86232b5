"""What an audit found, as plain JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from infalign.audit.extrapolate import Curve, Extrapolation, HoldOut
from infalign.errors import InputError
from infalign.evaluation.results import Measured


@dataclass(frozen=True)
class AtN:
    """What N attempts at a prompt achieve.

    Attributes:
        n: N.
        success: ASR@N, the share of prompts that at least one of N attempts breaks.
        worst_reward: Mean safety reward of the worst of N; None where the judge says only yes or no.
    """

    n: int
    success: Measured
    worst_reward: Measured | None


@dataclass(frozen=True)
class ModelAudit:
    """One model.

    Attributes:
        label: Its name.
        model: Where it came from.
        successes: (P,) how many of the M attempts at each prompt succeeded.
        at: ASR and worst reward at N = 1, 2, 4, … M.
        beyond: Predictions for larger N; None with fewer than four attempts.
        hold_out: What an eighth of the attempts would have predicted of all; None with fewer than 16 attempts.
        over_refusal: Share of responses to benign prompts that refuse; None without benign prompts.
        truncated_share: Share of the attempts' responses that were cut off at their longest.
    """

    label: str
    model: str
    successes: list[int]
    at: list[AtN]
    beyond: Extrapolation | None
    hold_out: HoldOut | None
    over_refusal: Measured | None
    truncated_share: float

    @property
    def last(self) -> AtN:
        """What all M attempts achieve."""
        return self.at[-1]

    @property
    def doubts(self) -> list[str]:
        """What speaks against the predictions for larger N, where there is anything left to predict."""
        if all(self.successes):
            return self.beyond.doubts if self.beyond else []
        return [*(self.beyond.doubts if self.beyond else ()), *(self.hold_out.doubts() if self.hold_out else ())]


@dataclass(frozen=True)
class Change:
    """A model against the first, paired by prompt.

    Attributes:
        label: The model.
        baseline: The first model.
        what: What was compared, such as "ASR@64".
        difference: The model's value less the first one's.
        adjusted_p_value: Two-sided, of no difference, after Holm's adjustment over all changes of the audit.
        safer: Whether the difference is in the direction that is wished for.
        resolved: Whether the sign holds at the audit's level with all changes counted.
        sentence: The finding in one plain sentence.
    """

    label: str
    baseline: str
    what: str
    difference: Measured
    adjusted_p_value: float
    safer: bool
    resolved: bool
    sentence: str


@dataclass(frozen=True)
class AuditResult:
    """An audit.

    Attributes:
        judge: What decided which attempts succeeded.
        num_prompts: P.
        num_attempts: M.
        num_benign: Benign prompts; 0 without.
        confidence: Level of every interval.
        settings: How it was made.
        prompt_ids: Names of the prompts, in order.
        models: The models, the first being what the others are compared with.
        changes: Each other model against the first.
    """

    judge: str
    num_prompts: int
    num_attempts: int
    num_benign: int
    confidence: float
    settings: dict[str, Any]
    prompt_ids: list[str]
    models: list[ModelAudit]
    changes: list[Change]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AuditResult:
        """Inverse of `to_dict`, also after a round trip through JSON.

        Raises:
            InputError: A field is missing or unknown.
        """
        try:
            models = [_model(entry) for entry in data["models"]]
            changes = [Change(**{**entry, "difference": Measured(**entry["difference"])}) for entry in data["changes"]]
            return cls(**{**data, "models": models, "changes": changes})
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                "this audit was not stored by this version of infalign",
                hint="Give the same `infalign audit` command again: attempts and scores are kept",
            ) from error


def _model(entry: Mapping[str, Any]) -> ModelAudit:
    at = [AtN(each["n"], Measured(**each["success"]), _measured(each["worst_reward"])) for each in entry["at"]]
    beyond = entry["beyond"]
    if beyond is not None:
        curves = {
            name: None if beyond[name] is None else Curve(**beyond[name])
            for name in ("beta_binomial", "power_law", "bounds")
        }
        beyond = Extrapolation(**{**beyond, **curves})
    hold_out = entry["hold_out"]
    if hold_out is not None:
        laws = {name: hold_out[name] and tuple(hold_out[name]) for name in ("beta_binomial", "power_law")}
        hold_out = HoldOut(**{**hold_out, **laws})
    return ModelAudit(
        **{**entry, "at": at, "beyond": beyond, "hold_out": hold_out, "over_refusal": _measured(entry["over_refusal"])}
    )


def _measured(entry: Mapping[str, Any] | None) -> Measured | None:
    return None if entry is None else Measured(**entry)
