"""The methods, one file each: how a policy is trained.

`calibrated.py` and `self_consistent.py` are the transforms of this library. Every other file without a leading
underscore, but for `base.py`, is a comparator: what others do, on the same rollouts and with the same solvers. A file
that is put here is found; nothing else has to know of it.

Two things others do are transforms and have no file: calibrated RLHF is the transform `identity`, and distillation of
Best-of-n (BOND, Sessa et al. 2024, arXiv 2407.14622; vBoN, Amini et al. 2024, arXiv 2407.06057) is the transform `log`
with β = 1/(n − 1).
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from infalign.procedures import InferenceProcedure
from infalign.theory.plan import optimum_at_kl
from infalign.training.methods.base import Comparator, Method, comparator, comparator_from_dict, comparator_kinds
from infalign.training.methods.calibrated import CalibratedMethod, TransformMethod
from infalign.training.methods.self_consistent import SelfConsistentMethod
from infalign.training.mixture import beta_in_mixture
from infalign.training.self_consistent import SelfConsistentTransform
from infalign.transforms import RewardTransform

__all__ = [
    "CalibratedMethod",
    "Comparator",
    "Method",
    "SelfConsistentMethod",
    "TransformMethod",
    "comparator",
    "comparator_from_dict",
    "comparator_kinds",
    "find_methods",
    "method_from_dict",
    "transform_method",
]


def find_methods() -> None:
    """Import every file of this folder; the decorator `comparator` then makes it known."""
    for module in pkgutil.iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")


find_methods()


def transform_method(
    name: str, transform: RewardTransform | None, procedure: InferenceProcedure, kl: float, weight: float = 1.0
) -> tuple[Method, float]:
    """A transform of a recipe as a method, and its β at a KL.

    Args:
        name: The recipe's name for it.
        transform: Φ; None for "optimal" and "self-consistent", which are made for the procedure.
        procedure: What the policy will be used through.
        kl: Of the policy or, below weight 1, of the mixture, in nats.
        weight: The policy's share of the mixture that it is trained in (M19).

    Raises:
        InputError: If the transform cannot have that KL.
    """
    if transform is not None:
        method = CalibratedMethod(name, transform)
        return method, method.beta_for_kl(kl) if weight == 1.0 else beta_in_mixture(transform, weight, kl)
    if name == SelfConsistentTransform.label:
        method = SelfConsistentMethod(name, SelfConsistentTransform(procedure))
        return method, method.beta_for_kl(kl)
    optimum = optimum_at_kl(procedure, kl)
    return CalibratedMethod(name, optimum.transform), optimum.beta


def method_from_dict(content: Mapping[str, Any]) -> Method:
    """The method of an entry in `plan.json`.

    Raises:
        InputError: If it is a comparator that is not known.
    """
    if "baseline" in content:
        return comparator_from_dict(content["baseline"])
    described = content["transform"]
    kind = SelfConsistentMethod if described["kind"] == SelfConsistentTransform.label else CalibratedMethod
    return kind.from_dict(content["name"], described)
