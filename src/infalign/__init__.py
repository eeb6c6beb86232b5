"""Align language models for the way they are used: Best-of-N, Worst-of-N and any other inference-time procedure.

The public names load on first use (PEP 562): `import infalign` is immediate and brings in no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infalign.calibration.calibrator import RefinedCalibrator, RewardCalibrator
    from infalign.calibration.combined import CombinedCalibrator
    from infalign.calibration.report import CalibrationReport, calibration_report
    from infalign.errors import InfalignError, InputError, MismatchError, RewardError, StorageError, TrainingError
    from infalign.estimators import win_rate
    from infalign.integrations.trl import load_transformed_reward
    from infalign.procedures import (
        BestOfN,
        EarlyStopping,
        FittedProcedure,
        InferenceProcedure,
        Mixture,
        OrderStatistic,
        Standard,
        WorstOfN,
        check_procedure,
        procedure_from_dict,
    )
    from infalign.reshape import (
        ExactCounts,
        Reshaping,
        ReshapingData,
        fit_reshaping,
        predict_reshaping,
    )
    from infalign.rollouts.mixture import MixturePolicy
    from infalign.rollouts.opening import open_policy, save_policy
    from infalign.rollouts.reshaped import ReshapedPolicy
    from infalign.rollouts.split import SplitPolicy
    from infalign.select.decoder import Decoder
    from infalign.select.local import LocalSampler
    from infalign.select.remote import EndpointSampler
    from infalign.theory.finite_k import finite_k_prediction, rank_conditional_tilt
    from infalign.theory.optimal import OptimalTransform, optimal_transform
    from infalign.theory.plan import Plan, limit, plan
    from infalign.theory.tilt import TiltedPolicy
    from infalign.transforms import Exponential, Identity, Log, RewardTransform, Tabulated, transform_from_dict

__version__ = "0.1.0"

_HOME = {
    "infalign.calibration.calibrator": ("RefinedCalibrator", "RewardCalibrator"),
    "infalign.calibration.report": ("CalibrationReport", "calibration_report"),
    "infalign.calibration.combined": ("CombinedCalibrator",),
    "infalign.select.decoder": ("Decoder",),
    "infalign.select.local": ("LocalSampler",),
    "infalign.select.remote": ("EndpointSampler",),
    "infalign.errors": (
        "InfalignError",
        "InputError",
        "MismatchError",
        "RewardError",
        "StorageError",
        "TrainingError",
    ),
    "infalign.estimators": ("win_rate",),
    "infalign.procedures": (
        "BestOfN",
        "EarlyStopping",
        "FittedProcedure",
        "InferenceProcedure",
        "Mixture",
        "OrderStatistic",
        "Standard",
        "WorstOfN",
        "check_procedure",
        "procedure_from_dict",
    ),
    "infalign.reshape": (
        "ExactCounts",
        "Reshaping",
        "ReshapingData",
        "fit_reshaping",
        "predict_reshaping",
    ),
    "infalign.rollouts.mixture": ("MixturePolicy",),
    "infalign.rollouts.opening": ("open_policy", "save_policy"),
    "infalign.rollouts.reshaped": ("ReshapedPolicy",),
    "infalign.rollouts.split": ("SplitPolicy",),
    "infalign.theory.finite_k": ("finite_k_prediction", "rank_conditional_tilt"),
    "infalign.theory.optimal": ("OptimalTransform", "optimal_transform"),
    "infalign.theory.plan": ("Plan", "limit", "plan"),
    "infalign.theory.tilt": ("TiltedPolicy",),
    "infalign.integrations.trl": ("load_transformed_reward",),
    "infalign.transforms": (
        "Exponential",
        "Identity",
        "Log",
        "RewardTransform",
        "Tabulated",
        "transform_from_dict",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # noqa: RUF022 (grouped by meaning)
    "InferenceProcedure",
    "SplitPolicy",
    "Standard",
    "BestOfN",
    "WorstOfN",
    "OrderStatistic",
    "Mixture",
    "FittedProcedure",
    "EarlyStopping",
    "check_procedure",
    "procedure_from_dict",
    "RewardTransform",
    "Identity",
    "Log",
    "Exponential",
    "Tabulated",
    "transform_from_dict",
    "TiltedPolicy",
    "OptimalTransform",
    "optimal_transform",
    "Plan",
    "plan",
    "limit",
    "rank_conditional_tilt",
    "finite_k_prediction",
    "Reshaping",
    "ReshapingData",
    "fit_reshaping",
    "predict_reshaping",
    "ExactCounts",
    "RewardCalibrator",
    "CombinedCalibrator",
    "RefinedCalibrator",
    "CalibrationReport",
    "calibration_report",
    "load_transformed_reward",
    "win_rate",
    "Decoder",
    "LocalSampler",
    "EndpointSampler",
    "MixturePolicy",
    "ReshapedPolicy",
    "open_policy",
    "save_policy",
    "InfalignError",
    "InputError",
    "MismatchError",
    "RewardError",
    "StorageError",
    "TrainingError",
]


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'infalign' has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
