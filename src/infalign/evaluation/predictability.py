"""How well a finished policy tells the reward from its own text: ρ from its standard win rate at its KL (M14, M15)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infalign.errors import InputError
from infalign.estimators.clustered import checked, mean_and_error
from infalign.estimators.intervals import t_quantile
from infalign.evaluation.results import Measured, MethodResult, Predictability
from infalign.numerics.special import ndtr
from infalign.procedures import InferenceProcedure, procedure_from_dict
from infalign.theory.channel import HIGHEST, LOWEST, reward_of
from infalign.theory.plan import limit
from infalign.transforms import Identity, RewardTransform

FloatArray = NDArray[np.float64]

_S = np.arange(-9.0, 14.0, 0.06)
_WEIGHTS = np.exp(-0.5 * _S**2) * 0.06 / math.sqrt(2 * math.pi)
_RHOS = np.concatenate([np.linspace(LOWEST, 0.95, 37), [0.97, 0.985, HIGHEST, 1.0]])
_NOT_ABOVE = "it wins no more than half of single samples, or spends no KL"


def implied_predictability(
    kls_P: ArrayLike,
    wins_P: ArrayLike,
    transform: RewardTransform | None = None,
    *,
    label: str = "identity",
    confidence: float = 0.95,
) -> Predictability:
    """The predictability at which the Gaussian channel gives a policy's standard win rate at its KL.

    Args:
        kls_P: (P,) per-prompt KL, in nats.
        wins_P: (P,) per-prompt standard win rates.
        transform: What the policy was aligned with; identity if None.
        label: The policy's name.
        confidence: Level of the interval.

    Returns:
        ρ with the error of the jackknife over prompts. Without an estimate, and with the reason, where the policy
        spends no KL or wins no more than half: then nothing can be told. An estimate of 1 says that the policy wins at
        least as much as one that tilts the rank itself.

    Raises:
        InputError: If the two do not have one value for each prompt.
    """
    kls_P, wins_P = checked(kls_P, "kls_P", axes="P"), checked(wins_P, "wins_P", axes="P")
    if kls_P.shape != wins_P.shape:
        raise InputError("one KL and one win rate are needed for each prompt", where="implied_predictability")
    transform = transform or Identity()
    aligned = isinstance(transform, Identity)
    kl, win = float(kls_P.mean()), float(wins_P.mean())
    if kl <= 0 or win <= 0.5:
        reason = f"{label} does not show it: {_NOT_ABOVE}"
        return Predictability(None, None, None, None, label, aligned, reason)
    invert = _inverter(transform)
    estimate = float(invert(np.array([kl]), np.array([win]))[0])
    count = kls_P.size
    if count < 2:
        return Predictability(estimate, None, None, None, label, aligned, None)
    left_kl, left_win = (count * kl - kls_P) / (count - 1), (count * win - wins_P) / (count - 1)
    if left_kl.min() <= 0 or left_win.min() <= 0.5:
        reason = "no error is known: without one of the prompts there is no estimate"
        return Predictability(estimate, None, None, None, label, aligned, reason)
    left = invert(left_kl, left_win)
    # Pseudo-values: their mean and spread are those of the jackknife.
    _, error = mean_and_error(count * estimate - (count - 1) * left, confidence)
    margin = t_quantile(count, confidence) * error
    low, high = max(0.0, estimate - margin), min(1.0, estimate + margin)
    return Predictability(estimate, error, low, high, label, aligned, None)


def _inverter(transform: RewardTransform) -> Callable[[FloatArray, FloatArray], FloatArray]:
    kls, wins = _table(transform)

    def invert(kl: FloatArray, win: FloatArray) -> FloatArray:
        # The win rate at these KLs for every ρ of the table: smooth in sqrt(KL). Then ρ from it, which rises with it.
        by_rho = np.stack([np.interp(np.sqrt(kl), np.sqrt(k), w) for k, w in zip(kls, wins, strict=True)])
        by_rho = np.maximum.accumulate(by_rho, axis=0) + 1e-12 * np.arange(_RHOS.size)[:, None]
        return np.array([np.interp(w, column, _RHOS) for w, column in zip(win, by_rho.T, strict=True)])

    return invert


@lru_cache(maxsize=8)
def _table(transform: RewardTransform) -> tuple[FloatArray, FloatArray]:
    """KL and standard win rate for every ρ of `_RHOS` and many β, shape (ρ, β), KL increasing."""
    kls, wins = [], []
    for rho in _RHOS:
        reward = reward_of(transform, float(rho))(_S) if rho < 1.0 else transform(np.clip(ndtr(_S), 1e-16, 1 - 1e-16))
        at = ndtr(rho * _S / math.sqrt(2.0 - rho**2))
        spread = math.sqrt(float(_WEIGHTS @ (reward - _WEIGHTS @ reward) ** 2))
        # KL is near (spread/β)²/2: finely spaced in sqrt(KL) where it is small.
        strength = np.concatenate([[0.0], np.linspace(0.02, 3.0, 250), np.geomspace(3.05, 60.0, 120)]) / spread
        logs = strength[:, None] * (reward - reward[-1])
        masses = _WEIGHTS * np.exp(logs)
        total = masses.sum(axis=1, keepdims=True)
        masses /= total
        kl = np.sum(masses * (logs - np.log(total)), axis=1)
        kls.append(np.maximum.accumulate(np.maximum(kl, 0.0)))
        wins.append(masses @ at)
    return np.array(kls), np.array(wins)


def with_predictability(
    results: Sequence[MethodResult],
    procedures: Sequence[InferenceProcedure],
    transforms: Mapping[str, RewardTransform] | None = None,
) -> tuple[list[MethodResult], Predictability | None]:
    """Add to every result the limit for a policy that predicts the reward as well as one of them does.

    Args:
        results: Methods, measured with standard sampling among their procedures, or left as they are.
        procedures: The procedures that they were measured under.
        transforms: What each calibrated policy was aligned with, by label; None where that is not known.

    Returns:
        The results, and the predictability with the policy it is from: identity where there is one, else the first
        calibrated one. None where no policy was measured by single samples, reshaped ones aside.
    """
    source = _source(results, transforms)
    if source is None:
        return list(results), None
    result, transform = source
    found = implied_predictability(
        result.kl.per_prompt,
        _standard(result).per_prompt,
        transform,
        label=result.label,
        confidence=result.confidence,
    )
    if transforms is None and (result.series or result.label) != "identity":
        found = replace(found, identity=False)  # nobody said what it was aligned with
    if found.estimate is None:
        return list(results), found
    by_label = {procedure.label: procedure for procedure in procedures}
    return [_limited(one, found.estimate, by_label) for one in results], found


def _source(
    results: Sequence[MethodResult], transforms: Mapping[str, RewardTransform] | None
) -> tuple[MethodResult, RewardTransform] | None:
    """The policy that ρ is taken from, and what it was aligned with."""
    # A reshaped policy hides what its model knows: it was made to win by many samples, not by one.
    usable = [
        one
        for one in results
        if one.reshaped is None and any(entry.procedure == "Standard" for entry in one.procedures)
    ]
    if transforms is not None:
        usable = [one for one in usable if one.label in transforms]
        identity = [one for one in usable if isinstance(transforms[one.label], Identity)]
        chosen = (identity or usable)[:1]
        return (chosen[0], transforms[chosen[0].label]) if chosen else None
    named = [one for one in usable if (one.series or one.label) == "identity"]
    # Of several checkpoints the one furthest from the reference shows it best.
    chosen = max(named, key=lambda one: one.kl.estimate, default=usable[0] if usable else None)
    return None if chosen is None else (chosen, Identity())


def _standard(result: MethodResult) -> Measured:
    return result.of("Standard").win_rate


def _limited(result: MethodResult, rho: float, procedures: Mapping[str, InferenceProcedure]) -> MethodResult:
    """A result with the limit at ρ and its own KL beside the idealised one."""
    kl = result.kl.estimate
    if kl <= 0:
        return result
    entries = [
        replace(entry, predictable_limit=_limit_at(procedures[entry.procedure], kl, rho))
        if entry.procedure in procedures
        else entry
        for entry in result.procedures
    ]
    return replace(result, procedures=entries)


def limit_name(found: Predictability) -> str:
    """What the second curve is called: "limit for a policy that predicts this reward as well as identity does (…)"."""
    assert found.estimate is not None
    error = "" if found.standard_error is None else f" ± {found.standard_error:.2f}"
    return (
        f"limit for a policy that predicts this reward as well as {found.policy} does "
        f"(ρ = {found.estimate:.2f}{error}; Gaussian model)"
    )


def _limit_at(procedure: InferenceProcedure, kl: float, rho: float) -> float | None:
    try:
        return float(limit(procedure, kl, predictability=resolvable(rho)))
    except InputError:  # far beyond what a policy could spend there
        return None


def resolvable(rho: float) -> float:
    """ρ as the channel can compute it: what lies between `HIGHEST` and 1 is rounded."""
    if rho > HIGHEST:
        return 1.0 if rho > 0.5 * (HIGHEST + 1.0) else HIGHEST
    return rho


def limit_curve(spec: Mapping[str, object], kls: Sequence[float], rho: float) -> list[float]:
    """The limit at ρ for a stored procedure at many KLs; empty where the curve does not reach so far."""
    from infalign.theory.channel_path import channel_frontier
    from infalign.theory.plan import Frontier

    procedure, wanted = procedure_from_dict(dict(spec)), np.asarray(kls)
    rho = resolvable(rho)
    try:
        if rho == 1.0:
            return [float(value) for value in limit(procedure, wanted)]
        curve = Frontier(*channel_frontier(procedure, rho, float(wanted.max())))
        return [float(value) for value in curve.at(np.minimum(wanted, curve.kl[-1]))]
    except InputError:
        return []
