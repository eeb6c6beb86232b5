"""How methods differ, paired by prompt, as measured and at the smaller of two KLs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from infalign.errors import InputError, MismatchError
from infalign.estimators import Difference, difference_estimate, holm, paired_difference, share_estimate
from infalign.evaluation.results import Measured, MethodResult


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
        raise InputError(f"two results share a name: {', '.join(labels)}", hint="Give each method its own label")
    if baseline not in labels:
        raise InputError(
            f"no result is named {baseline!r}", where="baseline", hint=f"Choose one of {', '.join(labels)}"
        )
    base = results[labels.index(baseline)]
    return compare_pairs([(result, base) for result in results if result is not base])


def compare_pairs(pairs: Sequence[tuple[MethodResult, MethodResult]]) -> list[Comparison]:
    """Each method against a baseline of its own, under each procedure of the baseline, paired by prompt.

    Args:
        pairs: (method, baseline), measured on the same prompts with the same reward.

    Returns:
        One comparison for each pair and procedure; Holm's adjustment runs over them all.

    Raises:
        InputError: If a procedure was not measured for both.
        MismatchError: If prompts or rewards differ.
    """
    found: list[tuple[MethodResult, MethodResult, str, Difference, Difference]] = []
    for result, base in pairs:
        _check_paired(result, base)
        for entry in base.procedures:
            ours = result.of(entry.procedure).win_rate
            difference = paired_difference(
                share_estimate(ours.per_prompt), share_estimate(entry.win_rate.per_prompt), confidence=base.confidence
            )
            matched = matched_difference(
                ours.per_prompt,
                entry.win_rate.per_prompt,
                result.kl.per_prompt,
                base.kl.per_prompt,
                confidence=base.confidence,
            )
            found.append((result, base, entry.procedure, difference, matched))
    adjusted = holm([difference.p_value for *_, difference, _ in found])
    adjusted_matched = holm([matched.p_value for *_, matched in found])
    comparisons: list[Comparison] = []
    for (result, base, procedure, difference, matched), p, p_matched in zip(
        found, adjusted, adjusted_matched, strict=True
    ):
        level = 1 - base.confidence
        resolved = p < level and p_matched < level and difference.estimate * matched.estimate > 0
        comparisons.append(
            Comparison(
                method=result.label,
                baseline=base.label,
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
    A KL that is measured at or below zero, which noise can do near zero, counts as zero: there the side ahead has ½.
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
    if win >= base_win and kl > base_kl:
        wins_P = _on_chord(wins_P, kls_P, base_kls_P)
    elif win < base_win and base_kl > kl:
        base_wins_P = _on_chord(base_wins_P, base_kls_P, kls_P)
    return difference_estimate(wins_P - base_wins_P, confidence=confidence, bounds=(-1.0, 1.0))


def _on_chord(wins_P: np.ndarray, kls_P: np.ndarray, target_kls_P: np.ndarray) -> np.ndarray:
    """Win rate at the target KL on the chord from (0, ½), as values whose mean and spread are right to first order."""
    win, kl, target = wins_P.mean(), kls_P.mean(), target_kls_P.mean()
    if kl <= 0:  # neither side has moved: what was won at such a KL was won by chance
        return 0.5 + (wins_P - win)
    ratio = max(target, 0.0) / kl
    return 0.5 + ratio * (wins_P - 0.5) + (win - 0.5) / kl * ((target_kls_P - target) - ratio * (kls_P - kl))


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
    if not difference.per_prompt.any():
        same = result.kl.per_prompt == base.kl.per_prompt
        why = "they agree on every prompt" + (", in KL as well, as a model does with itself" if same else "")
    elif not difference.resolved:
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
            hint="Evaluate both on the same list of prompts, in the same order",
        )
    if result.reward != base.reward:
        raise MismatchError(
            f"{result.label} was judged by {result.reward} and {base.label} by {base.reward}",
            hint="Compare results of one reward",
        )
