"""What a recipe asks to train with, by name: the solver's or baseline's own objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from infalign.calibration import RewardCalibrator
from infalign.combined_calibration import CombinedCalibrator
from infalign.errors import InputError
from infalign.procedures import InferenceProcedure
from infalign.rollouts.rewards import RewardSource
from infalign.theory.alternatives import tilt_at_kl
from infalign.training.baselines import (
    DPO,
    IPO,
    QRPO,
    BoNBoN,
    LogSigmoidReward,
    RawReward,
    StandardisedReward,
    UncalibratedReward,
    beta_for_kl,
)
from infalign.training.losses import OfflineLoss, Regression, WeightedLikelihood
from infalign.training.self_consistent import SelfConsistentTransform
from infalign.transforms import Identity, RewardTransform

_REWARDS: dict[str, type[UncalibratedReward]] = {
    "raw": RawReward,
    "standardised": StandardisedReward,
    "log-sigmoid": LogSigmoidReward,
}
_PAIRS: dict[str, type[DPO] | type[IPO] | type[BoNBoN]] = {"dpo": DPO, "ipo": IPO, "bonbon": BoNBoN}


def solver_loss(solver: str, transform: RewardTransform | SelfConsistentTransform, beta: float) -> OfflineLoss:
    """The loss of an offline or mixed solver.

    Raises:
        InputError: If the transform follows the policy's own rollouts.
    """
    if isinstance(transform, SelfConsistentTransform) and solver != "mixed":
        raise InputError(
            f"the self-consistent transform follows the policy's own rollouts, which {solver} does not have",
            where="training.solver",
            hint="Use transform: optimal, or solver: online or mixed",
        )
    if solver == "weighted-likelihood":
        assert not isinstance(transform, SelfConsistentTransform), "refused above"
        return WeightedLikelihood(transform, beta)
    return Regression(transform, beta)


def baseline_reward(
    described: Mapping[str, Any],
    source: RewardSource,
    calibrator: RewardCalibrator | CombinedCalibrator,
    prompt_ids: Sequence[str],
    beta: float,
    procedure: InferenceProcedure | None = None,
) -> UncalibratedReward:
    """The reward of an online baseline.

    Raises:
        InputError: If there are several rewards: raw ones have no common scale.
    """
    name, settings = _split(described)
    if isinstance(calibrator, CombinedCalibrator):
        raise InputError(f"{name} needs one reward: raw rewards of several sources have no common scale",
                         where="compare_with", hint="Leave it out, or give one reward")  # fmt: skip
    return _REWARDS[name](source, calibrator, prompt_ids, beta, procedure=procedure, **settings)


def baseline_loss(described: Mapping[str, Any], beta: float) -> OfflineLoss:
    """The loss of an offline baseline."""
    name, settings = _split(described)
    if name == "qrpo":
        return QRPO(beta)
    return _PAIRS[name](**settings) if name == "bonbon" else _PAIRS[name](**{"beta": beta, **settings})


def is_online(described: Mapping[str, Any]) -> bool:
    """Whether a baseline is a reward for the online solver; otherwise it is a loss on stored rollouts."""
    return described["baseline"] in _REWARDS


def baseline_beta(
    described: Mapping[str, Any],
    source: RewardSource,
    calibrator: RewardCalibrator | CombinedCalibrator,
    prompt_ids: Sequence[str],
    kl: float,
) -> float:
    """The β at which a baseline has this KL in nats, as far as that is known before training.

    For rewards it is found on the references. QRPO's optimum, and that of IPO on pairs, is near that of the identity,
    whose β serves. DPO on pairs that are always won has no optimum: its β is its own, and the KL depends on training.

    Raises:
        InputError: If the references cannot spend that KL, or there are several rewards.
    """
    name, settings = _split(described)
    if is_online(described):
        return beta_for_kl(baseline_reward(described, source, calibrator, prompt_ids, 1.0), kl)
    if name in ("qrpo", "ipo"):
        return float(settings.get("beta", tilt_at_kl(Identity(), kl).beta))
    return baseline_loss(described, DPO.beta).beta


def _split(described: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    settings = {key: int(value) if key == "n" else value for key, value in described.items() if key != "baseline"}
    return described["baseline"], settings
