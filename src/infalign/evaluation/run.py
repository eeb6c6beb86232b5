"""What one aligned model achieved, and how methods differ: orchestration over arrays, no model in sight.

`measure` reduces one method's rewards and log ratios on held-out prompts to a `MethodResult` that is plain JSON;
`compare` pairs such results prompt by prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from infalign.errors import InputError, MismatchError
from infalign.estimators import (
    Difference,
    Estimate,
    difference_estimate,
    efficiency_of,
    holm,
    mean_estimate,
    sequence_kl,
    useful_kl,
    win_rates,
)
from infalign.procedures import InferenceProcedure
from infalign.theory.plan import limit


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
            estimate.estimate, _known(estimate.standard_error), _known(low), _known(high), estimate.per_prompt.tolist()
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
            where the measured KL is not above zero, or beyond the KLs for which the limit can be computed.
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


@dataclass(frozen=True)
class Comparison:
    """A method against the baseline under one procedure, paired by prompt.

    Attributes:
        method: Label of the method.
        baseline: Label of the baseline.
        procedure: Label of the procedure.
        difference: Win rate of the method less that of the baseline, each at its own KL.
        p_value: Two-sided, of no difference.
        adjusted_p_value: The same after Holm's adjustment over all comparisons made together.
        kl: KL of the method.
        baseline_kl: KL of the baseline.
        matched: The least favourable difference to the side ahead once the side with more KL is brought back to the
            other's KL; see `matched_difference`.
        resolved: Whether the sign holds at the stated level in the whole family of comparisons, both as
            measured and at matched KL.
        sentence: The finding in one plain sentence.
    """

    method: str
    baseline: str
    procedure: str
    difference: Measured
    p_value: float
    adjusted_p_value: float
    kl: float
    baseline_kl: float
    matched: Measured
    resolved: bool
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form."""
        return asdict(self)


def measure(
    label: str,
    rewards_PG: ArrayLike,
    ref_rewards_PK: ArrayLike,
    log_ratios_PG: ArrayLike,
    procedures: Sequence[InferenceProcedure],
    *,
    reward: str = "reward",
    judges: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    lengths_PG: ArrayLike | None = None,
    ref_lengths_PK: ArrayLike | None = None,
    truncated_PG: ArrayLike | None = None,
    ref_truncated_PK: ArrayLike | None = None,
    prompt_ids: Sequence[str] | None = None,
    confidence: float = 0.95,
) -> MethodResult:
    """Measure one method on held-out prompts from fresh responses of policy and reference.

    Args:
        label: The method's name.
        rewards_PG: (P, G) rewards of policy responses.
        ref_rewards_PK: (P, K) rewards of reference responses, never those that calibrated the training reward.
        log_ratios_PG: (P, G) log π − log p of the policy responses, summed over the response, end token included, in
            nats; or the sum of exact per-token KLs.
        procedures: Procedures to judge by, each with n at most min(G, K).
        reward: Name of the reward, by which procedures choose.
        judges: Further rewards that training never saw, name → (P, G) and (P, K) scores of the same responses.
        lengths_PG: (P, G) lengths of policy responses.
        ref_lengths_PK: (P, K) lengths of reference responses.
        truncated_PG: (P, G) True where a policy response was cut off before its end.
        ref_truncated_PK: (P, K) the same for the reference.
        prompt_ids: P names.
        confidence: Level of every interval.

    Raises:
        InputError: If arrays do not fit together, a value is missing, or there are fewer samples than some n.
    """
    rewards_PG, ref_rewards_PK = np.asarray(rewards_PG, np.float64), np.asarray(ref_rewards_PK, np.float64)
    log_ratios_PG = np.asarray(log_ratios_PG, np.float64)
    rates = win_rates(rewards_PG, ref_rewards_PK, procedures, confidence=confidence)
    for name, array, like in (
        ("log_ratios_PG", log_ratios_PG, rewards_PG),
        ("lengths_PG", lengths_PG, rewards_PG),
        ("truncated_PG", truncated_PG, rewards_PG),
        ("ref_lengths_PK", ref_lengths_PK, ref_rewards_PK),
        ("ref_truncated_PK", ref_truncated_PK, ref_rewards_PK),
    ):
        if array is not None and np.shape(array) != like.shape:
            raise InputError(
                f"one value for each response is needed, {like.shape}, not {np.shape(array)}", where=f"{label}: {name}"
            )
    if prompt_ids is not None and len(prompt_ids) != len(rewards_PG):
        raise InputError(f"{len(prompt_ids)} names for {len(rewards_PG)} prompts", where=f"{label}: prompt_ids")
    judged = {
        name: win_rates(rewards_PG, ref_rewards_PK, procedures, judged_by=scores, confidence=confidence)
        for name, scores in (judges or {}).items()
    }
    kl = sequence_kl(log_ratios_PG, confidence=confidence)
    useful = useful_kl(rewards_PG, ref_rewards_PK, confidence=confidence)
    # A ratio to a KL that may be zero says nothing.
    efficiency = efficiency_of(useful, kl) if kl.confidence_interval[0] > 0 else None
    return MethodResult(
        label=label,
        reward=reward,
        num_prompts=rewards_PG.shape[0],
        num_samples=rewards_PG.shape[1],
        num_ref_samples=ref_rewards_PK.shape[1],
        confidence=confidence,
        kl=Measured.of(kl),
        useful_kl=Measured.of(useful),
        kl_efficiency=None if efficiency is None else efficiency.efficiency,
        kl_efficiency_error=None if efficiency is None else _known(efficiency.standard_error),
        procedures=[
            _procedure_result(
                procedure, rates[i], kl, {name: Measured.of(values[i]) for name, values in judged.items()}
            )
            for i, procedure in enumerate(procedures)
        ],
        tie_share=_tie_share(rewards_PG, ref_rewards_PK),
        mean_length=_mean(lengths_PG),
        ref_mean_length=_mean(ref_lengths_PK),
        truncated_share=_mean(truncated_PG),
        ref_truncated_share=_mean(ref_truncated_PK),
        prompt_ids=None if prompt_ids is None else [str(name) for name in prompt_ids],
    )


def compare(results: Sequence[MethodResult], *, baseline: str) -> list[Comparison]:
    """Every other method against the baseline, under each procedure, paired by prompt.

    Args:
        results: Methods measured on the same prompts with the same reward.
        baseline: Label of the one to compare with.

    Returns:
        One comparison for each other method and each procedure of the baseline; Holm's adjustment runs over them all.

    Raises:
        InputError: If there is no such baseline, labels repeat, or a procedure was not measured for all.
        MismatchError: If prompts or rewards differ.
    """
    labels = [result.label for result in results]
    if len(set(labels)) != len(labels):
        raise InputError(f"two results share a name: {', '.join(labels)}", mend="Give each method its own label")
    if baseline not in labels:
        raise InputError(
            f"no result is named {baseline!r}", where="baseline", mend=f"Choose one of {', '.join(labels)}"
        )
    base = results[labels.index(baseline)]
    found: list[tuple[MethodResult, str, Difference, Difference]] = []
    for result in results:
        if result is base:
            continue
        _check_paired(result, base)
        for entry in base.procedures:
            ours = result.of(entry.procedure).win_rate
            difference = difference_estimate(
                np.subtract(ours.per_prompt, entry.win_rate.per_prompt), confidence=base.confidence
            )
            matched = matched_difference(
                ours.per_prompt,
                entry.win_rate.per_prompt,
                result.kl.per_prompt,
                base.kl.per_prompt,
                confidence=base.confidence,
            )
            found.append((result, entry.procedure, difference, matched))
    adjusted = holm([difference.p_value for _, _, difference, _ in found])
    adjusted_matched = holm([matched.p_value for _, _, _, matched in found])
    comparisons: list[Comparison] = []
    for (result, procedure, difference, matched), p, p_matched in zip(found, adjusted, adjusted_matched, strict=True):
        level = 1 - base.confidence
        resolved = p < level and p_matched < level and difference.estimate * matched.estimate > 0
        comparisons.append(
            Comparison(
                method=result.label,
                baseline=baseline,
                procedure=procedure,
                difference=Measured.of(difference),
                p_value=difference.p_value,
                adjusted_p_value=p,
                kl=result.kl.estimate,
                baseline_kl=base.kl.estimate,
                matched=Measured.of(matched),
                resolved=resolved,
                sentence=_sentence(result, base, procedure, difference, matched, p, resolved),
            )
        )
    return comparisons


def matched_difference(
    wins_P: ArrayLike, base_wins_P: ArrayLike, kls_P: ArrayLike, base_kls_P: ArrayLike, *, confidence: float = 0.95
) -> Difference:
    """Difference of two win rates at the smaller of the two KLs, as unfavourable to the side ahead as can be.

    The frontier of a method passes through (KL 0, win rate ½), where the policy is the reference. If it rises and is
    concave in between, as the ideal frontier of a concave objective does, then bringing a method back from its KL to
    a smaller one leaves its win rate between the chord from that point and the measured value. Of the two ends the one
    worse for the side ahead is taken: the chord if that side has more KL, else the measured difference.
    The error takes in those of both win rates and both KLs, paired by prompt, to first order.

    Args:
        wins_P: (P,) per-prompt win rates of the method.
        base_wins_P: (P,) those of the baseline.
        kls_P: (P,) per-prompt KL of the method, in nats.
        base_kls_P: (P,) that of the baseline.
        confidence: Level of the interval.

    Raises:
        InputError: If a value is not finite.
    """
    wins_P, base_wins_P = np.asarray(wins_P, np.float64), np.asarray(base_wins_P, np.float64)
    kls_P, base_kls_P = np.asarray(kls_P, np.float64), np.asarray(base_kls_P, np.float64)
    win, base_win, kl, base_kl = (float(x.mean()) for x in (wins_P, base_wins_P, kls_P, base_kls_P))
    if win >= base_win and kl > base_kl > 0:
        return difference_estimate(_on_chord(wins_P, kls_P, base_kls_P) - base_wins_P, confidence=confidence)
    if win < base_win and base_kl > kl > 0:
        return difference_estimate(wins_P - _on_chord(base_wins_P, base_kls_P, kls_P), confidence=confidence)
    return difference_estimate(wins_P - base_wins_P, confidence=confidence)


def _on_chord(wins_P: np.ndarray, kls_P: np.ndarray, target_kls_P: np.ndarray) -> np.ndarray:
    """Win rate at the target KL on the chord from (0, ½), as values whose mean and spread are right to first order."""
    gain, kl, target = wins_P.mean() - 0.5, kls_P.mean(), target_kls_P.mean()
    ratio = target / kl
    return 0.5 + ratio * (wins_P - 0.5) + gain / kl * ((target_kls_P - target) - ratio * (kls_P - kl))


def _procedure_result(
    procedure: InferenceProcedure, rate: Estimate, kl: Estimate, judged: dict[str, Measured]
) -> ProcedureResult:
    """Win rate, limit at the measured KL, and the share of the limit's gain that was reached."""
    captured = None
    step = 0.01 * kl.estimate
    around = limit_within_reach(procedure, [kl.estimate - step, kl.estimate, kl.estimate + step])
    best = None if around is None else around[1]
    if around is not None and best is not None:
        below, _, above = around
        gain = best - 0.5
        if gain > 0:
            share = (rate.estimate - 0.5) / gain
            slope = (above - below) / (2 * step)
            influence_P = (
                share + ((rate.per_prompt - rate.estimate) - share * slope * (kl.per_prompt - kl.estimate)) / gain
            )
            captured = Measured.of(mean_estimate(influence_P, confidence=rate.confidence))
    try:
        spec = procedure.to_dict()
    except InputError:  # a user's own procedure need not be storable
        spec = None
    return ProcedureResult(procedure.label, procedure.n, spec, Measured.of(rate), best, captured, judged)


def limit_within_reach(procedure: InferenceProcedure, kls: Sequence[float]) -> list[float] | None:
    """Best win rate at each KL, or None if one of them is not above zero or beyond what the theory can compute.

    Args:
        procedure: What is done with policy and reference.
        kls: KLs in nats.
    """
    if min(kls) <= 0:
        return None
    try:
        return [float(value) for value in limit(procedure, kls)]
    except InputError:  # a KL of many nats, where the win rate is one for all that matters
        return None


def _sentence(
    result: MethodResult,
    base: MethodResult,
    procedure: str,
    difference: Difference,
    matched: Difference,
    adjusted_p_value: float,
    resolved: bool,
) -> str:
    """The finding in words that claim no more than the numbers."""
    points = 100 * difference.estimate
    low, high = (100 * end for end in difference.confidence_interval)
    numbers = (
        f"{points:+.1f} points, {base.confidence:.0%} interval {low:+.1f} to {high:+.1f}; "
        f"KL {result.kl.estimate:.2f} against {base.kl.estimate:.2f} nats"
    )
    if resolved:
        verb = "ahead of" if points > 0 else "behind"
        return f"{procedure}: {result.label} is {verb} {base.label} ({numbers})."
    if not difference.resolved:
        why = "the interval includes zero"
    elif adjusted_p_value >= 1 - base.confidence:
        why = "it does not stand once all comparisons made here are counted"
    else:
        why = f"it does not stand at matched KL ({100 * matched.estimate:+.1f} points) with all comparisons counted"
    return f"{procedure}: not resolved whether {result.label} differs from {base.label} ({numbers}): {why}."


def _check_paired(result: MethodResult, base: MethodResult) -> None:
    """Refuse to pair results of different prompts or rewards."""
    if result.num_prompts != base.num_prompts or (
        result.prompt_ids is not None and base.prompt_ids is not None and result.prompt_ids != base.prompt_ids
    ):
        raise MismatchError(
            f"{result.label} and {base.label} were evaluated on different prompts",
            mend="Evaluate both on the same list of prompts, in the same order",
        )
    if result.reward != base.reward:
        raise MismatchError(
            f"{result.label} was judged by {result.reward} and {base.label} by {base.reward}",
            mend="Compare results of one reward",
        )


def _tie_share(rewards_PG: np.ndarray, ref_rewards_PK: np.ndarray) -> float:
    """Share of policy-reference pairs of one prompt with equal reward."""
    ties = sum(
        int((np.searchsorted(ref, ours, "right") - np.searchsorted(ref, ours, "left")).sum())
        for ours, ref in zip(rewards_PG, np.sort(ref_rewards_PK, axis=1), strict=True)
    )
    return ties / (rewards_PG.size * ref_rewards_PK.shape[1])


def _mean(values: ArrayLike | None) -> float | None:
    """Mean, or None where nothing was given."""
    return None if values is None else float(np.mean(np.asarray(values, np.float64)))


def _known(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
