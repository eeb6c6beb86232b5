"""Is a calibration fit to be trained on? What scored references tell about themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infalign.calibration.calibrator import RewardCalibrator
from infalign.errors import InputError
from infalign.theory.finite_k import finite_k_prediction
from infalign.theory.optimal import OptimalTransform


@dataclass(frozen=True)
class CalibrationReport:
    """What `calibration_report` found.

    Attributes:
        num_prompts: P.
        num_ref: K.
        tie_mass: Share of pairs of references of one prompt with equal rewards.
        effective_num_ref: Different rewards per prompt, on average: the levels that C can take.
        constant_prompts: Prompts whose references all have the same reward: nothing can be learned from them.
        held_out_mean: Mean calibrated reward of the later half of the references against the earlier half. ½ unless
            the two halves come from different policies or rewards.
        held_out_standard_error: Standard error of `held_out_mean` if they come from the same (exact without ties).
        held_out_p_value: Chance of a mean at least as far from ½, for all prompts together.
        worst_prompt: The prompt that is furthest off.
        worst_prompt_p_value: Chance that the furthest of all P prompts is as far off (Bonferroni).
        rank_shares: Share of the held-out references in each tenth of the calibrated range (fewer parts where K is
            small), for all prompts together.
        expected_shares: What they are without ties if nothing changed in between; a tenth each, up to rounding of K.
        share_standard_errors: Standard errors of `rank_shares` then (beta-binomial, exact without ties).
        prompt_scores: The prompts' own held-out means in standard errors from ½: their 5 %, 10 %, …, 95 % quantiles
            over prompts. If nothing changed they are the normal distribution's, nearly.
        drift: Share of the rewards' variance that lies between prompts. Calibration removes it; raw rewards train on
            it.
        win_rate_lost: Win rate that this K costs at matched KL in theory (`finite_k_prediction`); None without an
            optimum.
    """

    num_prompts: int
    num_ref: int
    tie_mass: float
    effective_num_ref: float
    constant_prompts: int
    held_out_mean: float
    held_out_standard_error: float
    held_out_p_value: float
    worst_prompt: int
    worst_prompt_p_value: float
    rank_shares: tuple[float, ...]
    expected_shares: tuple[float, ...]
    share_standard_errors: tuple[float, ...]
    prompt_scores: tuple[float, ...]
    drift: float
    win_rate_lost: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> CalibrationReport:
        """Inverse of `to_dict`."""
        sequences = {field.name for field in fields(cls) if str(field.type).startswith("tuple")}
        values: dict[str, Any] = {
            name: tuple(content[name]) if name in sequences else content[name] for name in content
        }
        return cls(**values)


def calibration_report(ref_rewards_PK: ArrayLike, *, optimum: OptimalTransform | None = None) -> CalibrationReport:
    """Check scored references before anything is trained on them.

    The later half of each prompt's references is ranked among the earlier half. If both are draws of one policy under
    one reward, ranks are uniform whatever the reward is like (M4), and their mean has the variance of the rank-sum
    statistic, (m + k + 1) / (12 m k) for m held-out and k fitted references; ties make it smaller, so the test errs on
    the quiet side.

    Args:
        ref_rewards_PK: Rewards of K references per prompt in the order they were drawn, shape (P, K), K at least 4.
        optimum: The optimal transform that is to be used, to say what this K costs.

    Raises:
        InputError: There are fewer than four references per prompt, or one is NaN or infinite.
    """
    rewards_PK = np.asarray(ref_rewards_PK, dtype=np.float64)
    if rewards_PK.ndim != 2 or rewards_PK.shape[1] < 4:
        raise InputError(f"references have shape {rewards_PK.shape}", where="calibration_report",
                         hint="Give shape (P, K) with K at least 4")  # fmt: skip
    calibrator = RewardCalibrator().fit(rewards_PK)
    num_prompts, num_ref = rewards_PK.shape
    fitted = num_ref // 2
    held = num_ref - fitted
    ranks_PH = RewardCalibrator().fit(rewards_PK[:, :fitted]).ranks(rewards_PK[:, fitted:])
    mean_P = ranks_PH.mean(axis=1) / fitted
    shares, expected, errors = _rank_shares(ranks_PH, fitted)
    error = math.sqrt((held + fitted + 1) / (12.0 * held * fitted))
    pooled_error = error / math.sqrt(num_prompts)
    worst = int(np.argmax(np.abs(mean_P - 0.5)))
    ordered = np.sort(rewards_PK, axis=1)
    within, between = float(rewards_PK.var(axis=1, ddof=1).mean()), 0.0
    if num_prompts > 1:
        # The means of K rewards scatter even where prompts do not differ.
        between = max(float(rewards_PK.mean(axis=1).var(ddof=1)) - within / num_ref, 0.0)
    return CalibrationReport(
        num_prompts=num_prompts,
        num_ref=num_ref,
        tie_mass=calibrator.tie_mass,
        effective_num_ref=float(1.0 + (np.diff(ordered, axis=1) > 0).sum(axis=1).mean()),
        constant_prompts=int((ordered[:, 0] == ordered[:, -1]).sum()),
        held_out_mean=float(mean_P.mean()),
        held_out_standard_error=pooled_error,
        held_out_p_value=_two_sided(float(mean_P.mean() - 0.5) / pooled_error),
        worst_prompt=worst,
        worst_prompt_p_value=min(1.0, num_prompts * _two_sided(float(mean_P[worst] - 0.5) / error)),
        rank_shares=shares,
        expected_shares=expected,
        share_standard_errors=errors,
        prompt_scores=tuple(np.quantile((mean_P - 0.5) / error, np.arange(1, 20) / 20).tolist()),
        drift=between / (between + within) if between + within > 0 else 0.0,
        win_rate_lost=None if optimum is None else finite_k_prediction(optimum, num_ref).win_rate_lost,
    )


def _rank_shares(
    ranks_PH: NDArray[np.float64], num_ref: int
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Share of ranks 0..K in each of ten parts (or K + 1), what it is expected to be, and its standard error."""
    num_prompts, held = ranks_PH.shape
    num_parts = min(10, num_ref + 1)
    part_of_rank = np.arange(num_ref + 1) * num_parts // (num_ref + 1)
    expected = np.bincount(part_of_rank) / (num_ref + 1)
    # A rank b + ½ is a tie: half of it counts as b, half as b + 1.
    halves = np.stack([np.floor(ranks_PH), np.ceil(ranks_PH)]).astype(np.int64)
    shares = np.bincount(part_of_rank[halves].ravel(), minlength=num_parts) / halves.size
    # A part that holds c of the K + 1 gaps has a Beta(c, K + 1 - c) share of the reference, the same for all held out.
    variance = expected * (1.0 - expected) / held * (num_ref + 1 + held) / (num_ref + 2)
    errors = np.sqrt(variance / num_prompts)
    return tuple(shares.tolist()), tuple(expected.tolist()), tuple(errors.tolist())


def _two_sided(z: float) -> float:
    return math.erfc(abs(z) / math.sqrt(2.0))
