"""Ways in which a win can be less than it seems: bought with length, or with the loss of variety."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from infalign.errors import InputError
from infalign.estimators import Estimate, mean_estimate


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
        raise InputError("a reward is NaN", where="rewards_PG, ref_rewards_PK", mend="Score those responses again")
    if lengths_PG.shape != rewards_PG.shape or ref_lengths_PK.shape != ref_rewards_PK.shape:
        raise InputError("lengths and rewards differ in shape", where="lengths_PG, ref_lengths_PK")
    if not (lengths_PG > 0).all() or not (ref_lengths_PK > 0).all():
        raise InputError("lengths must be positive", where="lengths_PG, ref_lengths_PK", mend="Count the end token")
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
        raise InputError("no two responses match in length", where="tolerance", mend="Raise the tolerance")
    ratio = float(wins_P.mean()) / matched
    return mean_estimate(ratio + (wins_P - ratio * pairs_P) / matched, confidence=confidence)


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
        raise InputError(f"no response has {n} words", where="texts_PG", mend="Use a smaller n")
    return mean_estimate(shares, confidence=confidence)


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
    return mean_estimate(means, confidence=confidence)


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Runs of n words."""
    words = text.lower().split()
    return list(zip(*(words[start:] for start in range(n)), strict=False))
