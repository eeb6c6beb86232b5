"""Every procedure by its kind, as files and recipes describe it, and by its name, as people write it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from infalign.errors import InputError
from infalign.procedures.base import InferenceProcedure
from infalign.procedures.early_stopping import EarlyStopping
from infalign.procedures.fitted import FittedProcedure
from infalign.procedures.mixture import Mixture
from infalign.procedures.order_statistics import BestOfN, OrderStatistic, Standard, WorstOfN


def _mixture(parts: Iterable[Mapping[str, Any]]) -> Mixture:
    return Mixture((part["weight"], procedure_from_dict(part["procedure"])) for part in parts)


# The kind that each one's `to_dict` writes, and what makes one of that description's other fields.
_BY_KIND: dict[str, Callable[..., InferenceProcedure]] = {
    "standard": Standard,
    "best-of-n": BestOfN,
    "worst-of-n": WorstOfN,
    "order-statistic": OrderStatistic,
    "mixture": _mixture,
    "fitted": FittedProcedure,
    "early-stopping": EarlyStopping,
}


def procedure_from_dict(description: Mapping[str, Any]) -> InferenceProcedure:
    """Read back what `InferenceProcedure.to_dict` wrote.

    Args:
        description: A mapping with "kind" (standard, best-of-n, worst-of-n, order-statistic, mixture, fitted,
            early-stopping) and that kind's own fields (n; k and n; parts; weights and num_samples; n, stop_at,
            block, num_ref).

    Raises:
        InputError: If the kind is unknown or a field is missing, unknown or out of range.
    """
    given = cast(object, description)  # from a file, it may be anything
    if not isinstance(given, Mapping):
        raise InputError(f"{description!r} does not describe a procedure", where="procedure", hint="Give a mapping")
    fields = dict(description)
    kind = fields.pop("kind", None)
    make = _BY_KIND.get(kind) if isinstance(kind, str) else None
    if make is None:
        raise InputError(
            f"unknown procedure kind {kind!r}", where="procedure", hint=f"Use one of {', '.join(_BY_KIND)}"
        )
    try:
        return make(**fields)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"the description of a {kind} procedure does not fit: {error}",
            where="procedure",
            hint="Give exactly the fields that its to_dict writes",
        ) from error


def procedure_from_name(name: str) -> InferenceProcedure | None:
    """The procedure that people write as standard, best-of-4, worst-of-8 or 3-of-5; None for any other name.

    Raises:
        InputError: If a number is out of range.
    """
    if name == "standard":
        return Standard()
    numbered = re.fullmatch(r"(best|worst|\d+)-of-(\d+)", name)
    if numbered is None:
        return None
    which, n = numbered[1], int(numbered[2])
    if which == "best":
        return BestOfN(n)
    return WorstOfN(n) if which == "worst" else OrderStatistic(k=int(which), n=n)
