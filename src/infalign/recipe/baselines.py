"""Baselines as a recipe names them: `{baseline: raw}`, `{baseline: dpo, n: 8}`; see `training/baselines.py`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

# The settings that each one takes, and what a usable value is.
_POSITIVE = ("a positive number", lambda value: value > 0)
_SHARE = ("a number between 0 and 1", lambda value: 0 <= value <= 1)
_GROUP = ("a whole number of at least 2", lambda value: value >= 2 and value == int(value))
SETTINGS: dict[str, dict[str, Any]] = {
    "raw": {},
    "standardised": {},
    "log-sigmoid": {"quantile": _SHARE},
    "qrpo": {},
    "dpo": {"beta": _POSITIVE, "n": _GROUP},
    "ipo": {"beta": _POSITIVE, "n": _GROUP},
    "bonbon": {"n": _GROUP, "alpha": _SHARE},
}


def baseline_value(value: Mapping[str, Any]) -> dict[str, Any]:
    """A baseline's name and settings, checked.

    Raises:
        ValueError: If the name or a setting is unknown or unusable.
    """
    name = value["baseline"]
    if name not in SETTINGS:
        close = difflib.get_close_matches(str(name), SETTINGS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are: {', '.join(SETTINGS)}"
        raise ValueError(f"unknown baseline {name!r}; {hint}")
    known = SETTINGS[name]
    for key, setting in value.items():
        if key == "baseline":
            continue
        if key not in known:
            hint = f"it takes: {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"the baseline {name} has no setting {key!r}; {hint}")
        wanted, usable = known[key]
        if isinstance(setting, bool) or not isinstance(setting, int | float) or not usable(setting):
            raise ValueError(f"{key} of the baseline {name} must be {wanted}, not {setting!r}")
    return dict(value)


def baseline_name(value: Mapping[str, Any]) -> str:
    """A short name that can be a folder: `raw`, `dpo-n8-beta0.2`."""
    settings = [f"{key}{setting:g}" for key, setting in value.items() if key != "baseline"]
    return "-".join([value["baseline"], *settings])
