"""Ways in which a win can be less than it seems: bought with length, or with the loss of variety."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri

from infalign.errors import InputError
from infalign.estimators import Estimate, mean_estimate, share_estimate
from infalign.evaluation.results import Diagnostics, LengthBucket, Measured, WorsePrompts

COMPARED_TEXTS = 8  # of a prompt's responses, for self-similarity: all pairs of 128 would take minutes
CLEARLY = 0.025  # level of the one-sided test of a prompt


def diagnose(
    rewards_PG: np.ndarray,
    ref_rewards_PK: np.ndarray,
    *,
    lengths_PG: ArrayLike | None = None,
    ref_lengths_PK: ArrayLike | None = None,
    texts_PG: Sequence[Sequence[str]] | None = None,
    ref_texts_PK: Sequence[Sequence[str]] | None = None,
    finish_reasons_PG: ArrayLike | None = None,
    ref_finish_reasons_PK: ArrayLike | None = None,
    confidence: float = 0.95,
) -> Diagnostics:
    """Everything here that can be computed from what is given.

    Args:
        rewards_PG: (P, G) rewards of policy responses.
        ref_rewards_PK: (P, K) rewards of reference responses.
        lengths_PG: (P, G) their lengths, positive.
        ref_lengths_PK: (P, K) lengths of reference responses.
        texts_PG: For each prompt the policy's responses.
        ref_texts_PK: For each prompt the reference's.
        finish_reasons_PG: (P, G) how each policy response ended.
        ref_finish_reasons_PK: (P, K) the same for the reference.
        confidence: Level of every interval.

    Raises:
        InputError: If shapes differ, or a length is not positive.
    """
    matched, buckets = None, []
    if lengths_PG is not None:
        buckets = win_rate_by_length(rewards_PG, ref_rewards_PK, lengths_PG, confidence=confidence)
        if ref_lengths_PK is not None:
            matched = _unless(
                "tolerance",  # no two responses are of a length
                lambda: length_matched_win_rate(
                    rewards_PG, ref_rewards_PK, lengths_PG, ref_lengths_PK, confidence=confidence
                ),
            )
    return Diagnostics(
        worse=worse_prompts(rewards_PG, ref_rewards_PK, confidence=confidence),
        length_matched=matched,
        by_length=buckets,
        distinct=_distinct(texts_PG, confidence),
        ref_distinct=_distinct(ref_texts_PK, confidence),
        self_similarity=_similarity(texts_PG, confidence),
        ref_self_similarity=_similarity(ref_texts_PK, confidence),
        finish_reasons=_shares(finish_reasons_PG),
        ref_finish_reasons=_shares(ref_finish_reasons_PK),
    )


def worse_prompts(rewards_PG: ArrayLike, ref_rewards_PK: ArrayLike, *, confidence: float = 0.95) -> WorsePrompts:
    """Share of prompts that got worse under standard sampling, beside what chance alone gives; see `WorsePrompts`.

    What prompts alike would show uses the normal approximation with the variance of DeLong et al. (1988), averaged over
    prompts; the test of a prompt is Mann and Whitney's with ties and continuity corrected.

    Args:
        rewards_PG: (P, G) rewards of policy responses.
        ref_rewards_PK: (P, K) rewards of reference responses.
        confidence: Level of the intervals.
    """
    wins_PG, ref_wins_PK = _wins(rewards_PG, ref_rewards_PK), _wins(ref_rewards_PK, rewards_PG)
    num_policy, num_ref = wins_PG.shape[1], ref_wins_PK.shape[1]
    total = num_policy + num_ref
    wins_P = wins_PG.mean(axis=1)
    noise = float(np.mean(_spread(wins_PG) / num_policy + _spread(ref_wins_PK) / num_ref))
    short = 0.5 - float(wins_P.mean())
    alike = float(ndtr(short / math.sqrt(noise))) if noise > 0 else 0.5 * (1 + float(np.sign(short)))
    pooled = np.sort(np.concatenate([np.asarray(rewards_PG), np.asarray(ref_rewards_PK)], axis=1), axis=1)
    ties_P = np.array(
        [float(np.sum(counts**3 - counts)) for counts in (np.unique(r, return_counts=True)[1] for r in pooled)]
    )
    variance_P = (total + 1) / (12 * num_policy * num_ref) * (1 - ties_P / (total**3 - total))
    behind_P = 0.5 - wins_P - 0.5 / (num_policy * num_ref)
    clearly_P = behind_P > float(ndtri(1 - CLEARLY)) * np.sqrt(variance_P)
    return WorsePrompts(
        share=Measured.of(share_estimate((wins_P < 0.5) + 0.5 * (wins_P == 0.5), confidence=confidence)),
        by_chance_unchanged=0.5,
        by_chance_alike=alike,
        clearly=Measured.of(share_estimate(clearly_P.astype(np.float64), confidence=confidence)),
        clearly_by_chance=CLEARLY,
    )


def win_rate_by_length(
    rewards_PG: ArrayLike,
    ref_rewards_PK: ArrayLike,
    lengths_PG: ArrayLike,
    *,
    buckets: int = 4,
    confidence: float = 0.95,
) -> list[LengthBucket]:
    """Standard win rate by length of the policy's response, in buckets of about equal size.

    A reward that pays for length shows as a rising column. Errors are clustered by prompt, to first order.

    Args:
        rewards_PG: (P, G) rewards of policy responses.
        ref_rewards_PK: (P, K) rewards of reference responses.
        lengths_PG: (P, G) lengths of policy responses.
        buckets: At most so many; fewer where many responses have one length.
        confidence: Level of the intervals.

    Raises:
        InputError: If lengths and rewards differ in shape.
    """
    wins_PG, lengths_PG = _wins(rewards_PG, ref_rewards_PK), np.asarray(lengths_PG, np.float64)
    if lengths_PG.shape != wins_PG.shape:
        raise InputError("lengths and rewards differ in shape", where="lengths_PG")
    cuts = np.unique(np.quantile(lengths_PG, np.linspace(0, 1, buckets + 1)[1:-1], method="inverted_cdf"))
    bucket_PG = np.searchsorted(cuts, lengths_PG, side="left")
    found: list[LengthBucket] = []
    for bucket in np.unique(bucket_PG):
        in_PG = bucket_PG == bucket
        share_P, won_P = in_PG.mean(axis=1), (in_PG * wins_PG).mean(axis=1)
        share = float(share_P.mean())
        rate = float(won_P.mean()) / share
        estimate = mean_estimate(rate + (won_P - rate * share_P) / share, confidence=confidence, bounds=(0.0, 1.0))
        inside = lengths_PG[in_PG]
        found.append(LengthBucket(float(inside.min()), float(inside.max()), share, Measured.of(estimate)))
    return found


def length_matched_win_rate(
    rewards_PG: ArrayLike,
    ref_rewards_PK: ArrayLike,
    lengths_PG: ArrayLike,
    ref_lengths_PK: ArrayLike,
    *,
    tolerance: float = 0.1,
    confidence: float = 0.95,
) -> Estimate:
    """Standard win rate among pairs of responses of about equal length: what is left once length is held fixed.

    A ratio over all pairs, so prompts with more matching pairs weigh more; the error is clustered by prompt, to first
    order. Compare it with the standard win rate to see whether wins were bought with length.

    Args:
        rewards_PG: (P, G) rewards of policy responses.
        ref_rewards_PK: (P, K) rewards of reference responses.
        lengths_PG: (P, G) their lengths, positive.
        ref_lengths_PK: (P, K) lengths of reference responses.
        tolerance: Lengths match if the longer exceeds the shorter by at most this share.
        confidence: Level of the interval.

    Raises:
        InputError: If shapes differ, a reward is NaN, a length is not positive, or no pair matches.
    """
    rewards_PG, ref_rewards_PK = np.asarray(rewards_PG, np.float64), np.asarray(ref_rewards_PK, np.float64)
    lengths_PG, ref_lengths_PK = np.asarray(lengths_PG, np.float64), np.asarray(ref_lengths_PK, np.float64)
    if np.isnan(rewards_PG).any() or np.isnan(ref_rewards_PK).any():
        raise InputError("a reward is NaN", where="rewards_PG, ref_rewards_PK", hint="Score those responses again")
    if lengths_PG.shape != rewards_PG.shape or ref_lengths_PK.shape != ref_rewards_PK.shape:
        raise InputError("lengths and rewards differ in shape", where="lengths_PG, ref_lengths_PK")
    if not (lengths_PG > 0).all() or not (ref_lengths_PK > 0).all():
        raise InputError("lengths must be positive", where="lengths_PG, ref_lengths_PK", hint="Count the end token")
    widest = math.log1p(tolerance) + 1e-12
    pairs_P, wins_P = np.zeros(len(rewards_PG)), np.zeros(len(rewards_PG))
    for p in range(len(rewards_PG)):  # a prompt at a time: all pairs of all prompts would not fit in memory
        match_GK = np.abs(np.log(lengths_PG[p])[:, None] - np.log(ref_lengths_PK[p])[None, :]) <= widest
        ahead_GK = rewards_PG[p][:, None] > ref_rewards_PK[p][None, :]
        equal_GK = rewards_PG[p][:, None] == ref_rewards_PK[p][None, :]
        pairs_P[p] = match_GK.mean()
        wins_P[p] = (match_GK * (ahead_GK + 0.5 * equal_GK)).mean()
    matched = float(pairs_P.mean())
    if matched == 0:
        raise InputError("no two responses match in length", where="tolerance", hint="Raise the tolerance")
    ratio = float(wins_P.mean()) / matched
    return mean_estimate(ratio + (wins_P - ratio * pairs_P) / matched, confidence=confidence, bounds=(0.0, 1.0))


def distinct_ngrams(texts_PG: Sequence[Sequence[str]], *, n: int = 2, confidence: float = 0.95) -> Estimate:
    """Variety of a prompt's responses: distinct word n-grams as a share of all, averaged over prompts.

    It falls with the number and length of responses, so compare models only at the same number, and look at lengths.

    Args:
        texts_PG: For each prompt its responses.
        n: Words in a row.
        confidence: Level of the interval.

    Raises:
        InputError: If no prompt has a response of n words.
    """
    shares: list[float] = []
    for texts in texts_PG:
        grams = [gram for text in texts for gram in _ngrams(text, n)]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    if not shares:
        raise InputError(f"no response has {n} words", where="texts_PG", hint="Use a smaller n")
    return share_estimate(shares, confidence=confidence)


def self_similarity(texts_PG: Sequence[Sequence[str]], *, n: int = 2, confidence: float = 0.95) -> Estimate:
    """How alike a prompt's responses are: mean overlap (Jaccard) of the word n-gram sets of two of them.

    0 is nothing in common, 1 the same n-grams. Two responses without any n-gram overlap fully if they are equal,
    else not. An average over pairs does not depend on the number of responses.

    Args:
        texts_PG: For each prompt its responses, at least two.
        n: Words in a row.
        confidence: Level of the interval.

    Raises:
        InputError: If a prompt has fewer than two responses.
    """
    means: list[float] = []
    for index, texts in enumerate(texts_PG):
        if len(texts) < 2:
            raise InputError(f"prompt {index} has fewer than two responses", where="texts_PG")
        sets = [(text, set(_ngrams(text, n))) for text in texts]
        overlaps = [
            len(a & b) / len(a | b) if a or b else float(text_a == text_b)
            for (text_a, a), (text_b, b) in combinations(sets, 2)
        ]
        means.append(float(np.mean(overlaps)))
    return share_estimate(means, confidence=confidence)


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Runs of n words."""
    words = text.lower().split()
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def _wins(rewards_PG: ArrayLike, ref_rewards_PK: ArrayLike) -> np.ndarray:
    """(P, G) share of the prompt's reference responses that each policy response beats, ties counted one half."""
    sorted_PK = np.sort(np.asarray(ref_rewards_PK, np.float64), axis=1)
    rows = [
        np.searchsorted(ref, ours, "left") + np.searchsorted(ref, ours, "right")
        for ours, ref in zip(np.asarray(rewards_PG, np.float64), sorted_PK, strict=True)
    ]
    return np.stack(rows) / (2 * sorted_PK.shape[1])


def _spread(values_PG: np.ndarray) -> np.ndarray:
    """(P,) variance within each prompt; zero where a prompt has one value."""
    return values_PG.var(axis=1, ddof=1) if values_PG.shape[1] > 1 else np.zeros(len(values_PG))


def _unless(where: str, compute: Callable[[], Estimate]) -> Measured | None:
    """What is computed, or None if it is refused for this reason."""
    try:
        return Measured.of(compute())
    except InputError as error:
        if error.where != where:
            raise
        return None


def _distinct(texts_PG: Sequence[Sequence[str]] | None, confidence: float) -> Measured | None:
    return None if texts_PG is None else _unless("texts_PG", lambda: distinct_ngrams(texts_PG, confidence=confidence))


def _similarity(texts_PG: Sequence[Sequence[str]] | None, confidence: float) -> Measured | None:
    if texts_PG is None or len(texts_PG[0]) < 2:
        return None
    return Measured.of(self_similarity([texts[:COMPARED_TEXTS] for texts in texts_PG], confidence=confidence))


def _shares(reasons_PG: ArrayLike | None) -> dict[str, float]:
    """Share of each reason, the most frequent first."""
    if reasons_PG is None:
        return {}
    flat = [str(reason) for reason in np.asarray(reasons_PG, dtype=object).ravel()]
    return {reason: count / len(flat) for reason, count in Counter(flat).most_common()}
