"""What one aligned model achieved: orchestration over arrays, no model in sight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from infalign.errors import InputError
from infalign.estimators import (
    Estimate,
    WinRate,
    efficiency_of,
    mean_estimate,
    moved,
    sequence_kl,
    useful_kl,
    win_rates,
)
from infalign.evaluation.diagnostics import diagnose
from infalign.evaluation.results import Band, Measured, MethodResult, OverN, ProcedureResult, known
from infalign.evaluation.tied_limit import limit_at, ref_levels
from infalign.procedures import BestOfN, InferenceProcedure, WorstOfN

CURVE_POINTS = 40  # N at most on a curve over N; with more samples they are spread evenly in log N


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
    finish_reasons_PG: ArrayLike | None = None,
    ref_finish_reasons_PK: ArrayLike | None = None,
    texts_PG: Sequence[Sequence[str]] | None = None,
    ref_texts_PK: Sequence[Sequence[str]] | None = None,
    prompt_ids: Sequence[str] | None = None,
    confidence: float = 0.95,
    series: str | None = None,
    step: int | None = None,
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
        finish_reasons_PG: (P, G) how each policy response ended; "length" where it was cut off.
        ref_finish_reasons_PK: (P, K) the same for the reference.
        texts_PG: (P, G) the policy's responses, for their variety.
        ref_texts_PK: (P, K) the reference's.
        prompt_ids: P names.
        confidence: Level of every interval.
        series: What the results of one curve share; see `MethodResult`.
        step: Training step, of a checkpoint.

    Raises:
        InputError: If arrays do not fit together, a value is missing, or there are fewer samples than some n.
    """
    rewards_PG, ref_rewards_PK = np.asarray(rewards_PG, np.float64), np.asarray(ref_rewards_PK, np.float64)
    log_ratios_PG = np.asarray(log_ratios_PG, np.float64)
    rates = win_rates(rewards_PG, ref_rewards_PK, procedures, confidence=confidence)
    for name, array, like in (
        ("log_ratios_PG", log_ratios_PG, rewards_PG),
        ("lengths_PG", lengths_PG, rewards_PG),
        ("finish_reasons_PG", finish_reasons_PG, rewards_PG),
        ("texts_PG", texts_PG, rewards_PG),
        ("ref_lengths_PK", ref_lengths_PK, ref_rewards_PK),
        ("ref_finish_reasons_PK", ref_finish_reasons_PK, ref_rewards_PK),
        ("ref_texts_PK", ref_texts_PK, ref_rewards_PK),
    ):
        if array is not None and np.shape(array) != like.shape:
            raise InputError(
                f"one value for each response is needed, {like.shape}, not {np.shape(array)}", where=f"{label}: {name}"
            )
    if prompt_ids is not None and len(prompt_ids) != len(rewards_PG):
        raise InputError(f"{len(prompt_ids)} names for {len(rewards_PG)} prompts", where=f"{label}: prompt_ids")
    judged: dict[str, list[WinRate]] = {}
    for name, scores in (judges or {}).items():
        try:
            judged[name] = win_rates(rewards_PG, ref_rewards_PK, procedures, judged_by=scores, confidence=confidence)
        except InputError as error:
            raise InputError(error.what, where=f"{label}: {name}", hint=error.hint) from error
    kl = sequence_kl(log_ratios_PG, confidence=confidence)
    useful = useful_kl(rewards_PG, ref_rewards_PK, confidence=confidence)
    efficiency = efficiency_of(useful, kl) if moved(kl.estimate, kl.confidence_interval[0]) else None
    levels = ref_levels(ref_rewards_PK)
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
        kl_efficiency_error=None if efficiency is None else known(efficiency.standard_error),
        procedures=[
            _procedure_result(
                procedure, rates[i], kl, levels, {name: Measured.of(values[i]) for name, values in judged.items()}
            )
            for i, procedure in enumerate(procedures)
        ],
        over_n={
            family: _over_n(make, rewards_PG, ref_rewards_PK, judges or {}, confidence)
            for family, make in (("best-of-n", BestOfN), ("worst-of-n", WorstOfN))
        },
        diagnostics=diagnose(
            rewards_PG,
            ref_rewards_PK,
            lengths_PG=lengths_PG,
            ref_lengths_PK=ref_lengths_PK,
            texts_PG=texts_PG,
            ref_texts_PK=ref_texts_PK,
            finish_reasons_PG=finish_reasons_PG,
            ref_finish_reasons_PK=ref_finish_reasons_PK,
            confidence=confidence,
        ),
        tie_share=_tie_share(rewards_PG, ref_rewards_PK),
        mean_length=_mean(lengths_PG),
        ref_mean_length=_mean(ref_lengths_PK),
        truncated_share=_truncated(finish_reasons_PG),
        ref_truncated_share=_truncated(ref_finish_reasons_PK),
        prompt_ids=None if prompt_ids is None else [str(name) for name in prompt_ids],
        series=series,
        step=step,
        kl_efficiency_at_least=None if efficiency is None else known(efficiency.at_least),
    )


def _over_n(
    make: Callable[[int], InferenceProcedure],
    rewards_PG: np.ndarray,
    ref_rewards_PK: np.ndarray,
    judges: Mapping[str, tuple[ArrayLike, ArrayLike]],
    confidence: float,
) -> OverN:
    """Win rates of one family for every N that the samples allow, thinned out where there are many."""
    most = min(rewards_PG.shape[1], ref_rewards_PK.shape[1])
    sizes = np.unique(np.round(np.geomspace(1, most, CURVE_POINTS)).astype(int)) if most > CURVE_POINTS else None
    ns = list(range(1, most + 1)) if sizes is None else [int(n) for n in sizes]
    procedures = [make(n) for n in ns]

    def band(judged_by: tuple[ArrayLike, ArrayLike] | None) -> Band:
        return Band.of(win_rates(rewards_PG, ref_rewards_PK, procedures, judged_by=judged_by, confidence=confidence))

    return OverN(ns, band(None), {name: band(scores) for name, scores in judges.items()})


def _procedure_result(
    procedure: InferenceProcedure,
    rate: Estimate,
    kl: Estimate,
    levels: np.ndarray | None,
    judged: dict[str, Measured],
) -> ProcedureResult:
    """Win rate, limit at the measured KL, and the share of the limit's gain that was reached."""
    best = captured = None
    if kl.estimate > 0:  # below the reference's own KL there is nothing to be had
        best = limit_at(procedure, kl.estimate, levels)
        gain = best.win_rate - 0.5
        if gain > 0 and moved(kl.estimate, kl.confidence_interval[0]):
            share = (rate.estimate - 0.5) / gain
            influence_P = (
                share + ((rate.per_prompt - rate.estimate) - share * best.slope * (kl.per_prompt - kl.estimate)) / gain
            )
            captured = Measured.of(mean_estimate(influence_P, confidence=rate.confidence))
    try:
        spec = procedure.to_dict()
    except InputError:  # a user's own procedure need not be storable
        spec = None
    return ProcedureResult(
        procedure.label,
        procedure.n,
        spec,
        Measured.of(rate),
        None if best is None else best.win_rate,
        captured,
        judged,
        limit_without_ties=None if best is None else best.without_ties,
        tied_limit=None if best is None else best.tied,
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


def _truncated(reasons: ArrayLike | None) -> float | None:
    """Share of responses that were cut off, or None where it is not known how they ended."""
    return None if reasons is None else float(np.mean(np.asarray(reasons, dtype=object) == "length"))
